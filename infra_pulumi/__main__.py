"""`python -m infra_pulumi`: the cluster under the service, planned without a cloud and made on one."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from infra_pulumi import account, catalogue as catalogues, coldstart, cost, options, quotas, show, sizing
from infra_pulumi.catalogue import Catalogue, CatalogueError
from infra_pulumi.spec import ClusterSpec, SpecError

if TYPE_CHECKING:
    from infra_pulumi.policy import Finding
    from infra_pulumi.record import Recording

SDKS = {"aws": "pulumi_aws", "gcp": "pulumi_gcp", "azure": "pulumi_azure_native"}
ADDONS_SDK = "pulumi_kubernetes"
INSTALL = "in the repository: .venv/bin/pip install --no-deps -r requirements-infra.lock"


class Exit(IntEnum):
    OK = 0
    WRONG = 1
    USAGE = 2
    MISSING = 3


def main(arguments: Sequence[str] | None = None) -> int:
    asked = options.parser().parse_args(arguments)
    try:
        return _COMMANDS[asked.command](asked)
    except SpecError as error:
        if getattr(asked, "json", False):
            print(json.dumps({"faults": [asdict(fault) for fault in error.faults]}, indent=2))
        return _fail(str(error), Exit.USAGE)
    except CatalogueError as error:
        return _fail(str(error), Exit.USAGE)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stderr.close()
        return Exit.OK


def _fail(text: str, code: Exit) -> int:
    print(f"infra_pulumi: {text}", file=sys.stderr)
    return code


def _given(asked: argparse.Namespace) -> tuple[ClusterSpec, Catalogue]:
    spec = options.described(asked)
    known = catalogues.load(asked.prices)
    catalogues.check(spec, known)
    return spec, known


def _lacking(spec: ClusterSpec) -> str | None:
    """What has to be installed before this description can be planned."""
    wanted = ["pulumi", SDKS[spec.provider], *([ADDONS_SDK] if spec.addons.by_pulumi else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} cannot be imported; {INSTALL}" if missing else None


def _judged(spec: ClusterSpec, known: Catalogue) -> tuple[Recording, tuple[Finding, ...]]:
    from infra_pulumi import plan, policy

    recording = plan.evaluate(spec, known)
    gc.freeze()  # the SDK stays until the end: nobody needs to look through it then
    return recording, policy.findings(recording, spec)


def _plan(asked: argparse.Namespace) -> int:
    spec, known = _given(asked)
    if lacking := _lacking(spec):
        return _fail(lacking, Exit.MISSING)
    recording, found = _judged(spec, known)
    estimate = cost.estimate(spec, known, _busy(asked))
    warnings = [
        *catalogues.warnings(spec, known, datetime.date.today()),
        *quotas.warnings(spec, known),
        *account.steps(spec),
    ]
    cold = coldstart.phases(asked.image_gb, asked.weights_gib)
    if asked.json:
        told = _plain_plan(spec, recording, found, estimate, warnings)
        told["cold_start"] = {
            "phases": [asdict(phase) for phase in cold],
            "seconds": coldstart.total(cold),
            "source": coldstart.caveat(spec.provider),
        }
        print(json.dumps(told, indent=2, sort_keys=True))
    else:
        print(show.summary(spec), show.tree(recording), show.findings(found), sep="\n\n")
        print("", show.cost(estimate, spec.budget.monthly_usd if spec.budget else None), "", sep="\n")
        print(show.cold_start(cold, coldstart.caveat(spec.provider)), "", sep="\n")
        print("warnings:", *show.bullets(warnings or ["none"]), sep="\n")
    return _verdict(found)


def _plain_plan(
    spec: ClusterSpec,
    recording: Recording,
    found: Sequence[Finding],
    estimate: cost.Estimate,
    warnings: Sequence[str],
) -> dict[str, Any]:
    return {
        "spec": spec.model_dump(mode="json"),
        "plan": json.loads(recording.json()),
        "findings": [asdict(each) for each in found],
        "cost": show.plain_estimate(estimate),
        "warnings": list(warnings),
    }


def _verdict(found: Sequence[Finding]) -> int:
    return Exit.WRONG if any(each.severity == "error" for each in found) else Exit.OK


def _busy(asked: argparse.Namespace) -> float:
    return cost.BUSY_SHARE if asked.busy_share is None else float(asked.busy_share)


def _cost(asked: argparse.Namespace) -> int:
    spec, known = _given(asked)
    estimate = cost.estimate(spec, known, _busy(asked))
    if asked.json:
        print(json.dumps(show.plain_estimate(estimate), indent=2))
        return Exit.OK
    print(show.summary(spec), show.cost(estimate, spec.budget.monthly_usd if spec.budget else None), sep="\n\n")
    print("\nsources:", *show.bullets(sorted({f"{line.source} ({line.as_of})" for line in estimate.lines})), sep="\n")
    return Exit.OK


def _policy(asked: argparse.Namespace) -> int:
    if asked.rules:
        if importlib.util.find_spec("pulumi") is None:
            return _fail(f"pulumi cannot be imported; {INSTALL}", Exit.MISSING)
        from infra_pulumi import policy

        print(show.table(("rule", "", "why"), [(each.name, each.severity, each.why) for each in policy.rules()]))
        return Exit.OK
    spec, known = _given(asked)
    if lacking := _lacking(spec):
        return _fail(lacking, Exit.MISSING)
    _, found = _judged(spec, known)
    print(json.dumps([asdict(each) for each in found], indent=2) if asked.json else show.findings(found))
    return _verdict(found)


def _render(asked: argparse.Namespace) -> int:
    from infra_pulumi import render

    spec, known = _given(asked)
    try:
        written = [str(path) for path in render.write(render.every(spec, known, spec.serve.config), asked.output)]
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}", Exit.WRONG)
    print(json.dumps(written, indent=2) if asked.json else "\n".join(f"wrote {path}" for path in written))
    return Exit.OK


def _catalogue(asked: argparse.Namespace) -> int:
    known = catalogues.load(asked.prices)
    if asked.provider:
        chosen = tuple(each for each in known.instance_types if each.provider == asked.provider)
        known = known.model_copy(update={"instance_types": chosen})
    if asked.fits is not None:
        return _fits(asked, known)
    if asked.json:
        print(json.dumps([each.model_dump(mode="json") for each in known.instance_types], indent=2))
    else:
        print(show.machines(known.instance_types))
        print(*(f"\n{each.type}: {each.refused}" for each in known.instance_types if each.refused), sep="")
    return Exit.OK


def _fits(asked: argparse.Namespace, known: Catalogue) -> int:
    load = sizing.Load(asked.streams, asked.context)
    measured = dict(asked.measured or ())
    if strange := sorted(set(measured) - {each.type for each in known.instance_types}):
        return _fail(f"--measured: {', '.join(strange)} is no machine of the catalogue", Exit.USAGE)
    found = sizing.ranked(known, asked.fits, asked.dtype, load, measured)
    if asked.json:
        print(json.dumps([show.plain_fit(fit) for fit in found], indent=2))
    elif found:
        print(show.fits(found))
        print(
            f"\nWith {load.streams} streams of {load.context} tokens on each replica, all of them busy. `derived` is"
            "\nfrom the GPU's memory bandwidth and arithmetic, good for a ranking. Measure with python -m perf.suite,"
            "\nand say --measured TYPE=TOKENS_PER_S."
        )
        for machine in known.instance_types:
            if machine.gpu and not sizing.derivable(machine) and machine.type not in measured:
                print(f"{machine.type} is not ranked: how fast its {machine.gpu} is, is not known; say --measured")
    else:
        needed = sizing.needed_bytes(asked.fits, asked.dtype, load) / sizing.GIB
        print(f"no machine holds the {needed:.0f} GiB that it needs; take int8 or int4, or fewer --streams")
    return Exit.OK


def _doctor(asked: argparse.Namespace) -> int:
    """What is here, and what it is for."""
    needed = ("pulumi", *SDKS.values())
    packages = {name: importlib.util.find_spec(name) is not None for name in (*needed, ADDONS_SDK)}
    programs = {name: shutil.which(name) for name in _NEEDED}
    if asked.json:
        print(json.dumps({"packages": packages, "programs": programs}, indent=2))
    else:
        missing = dict.fromkeys(needed, INSTALL) | {ADDONS_SDK: f"for addons.by_pulumi; {INSTALL}"}
        rows = [
            (f"package {name}", "here" if there else f"missing: {missing[name]}") for name, there in packages.items()
        ]
        rows += [(f"program {name}", where or f"missing: {_NEEDED[name]}") for name, where in programs.items()]
        print(show.table(("", ""), rows).strip())
    return Exit.OK if all(packages[name] for name in needed) and programs["pulumi"] else Exit.MISSING


_NEEDED = {
    "pulumi": "for deploy; https://get.pulumi.com",
    "kubectl": "for what runs in the cluster",
    "helm": "for the addons without Pulumi",
    "aws": "for a kubeconfig on AWS",
    "gcloud": "for a kubeconfig on GCP",
    "az": "for a kubeconfig on Azure",
    "gke-gcloud-auth-plugin": "for a token on GCP",
    "kubelogin": "for a token on Azure",
}


def _engine(asked: argparse.Namespace) -> int:
    """deploy, outputs and destroy: those that need Pulumi's CLI."""
    spec, known = _given(asked)
    if lacking := _lacking(spec):
        return _fail(lacking, Exit.MISSING)
    from infra_pulumi import deploy

    if asked.command == "deploy":
        _, found = _judged(spec, known)
        if _verdict(found):
            return _fail(f"nothing was deployed:\n{show.findings(found)}", Exit.WRONG)
    try:
        command = deploy.find_command()
        if asked.command != "outputs" and not asked.yes and not _agreed(asked.command, spec):
            return _fail("nothing was changed", Exit.WRONG)
        stack = deploy.open_stack(spec, known, deploy.Place(asked.state, asked.backend), command)
        return _run(asked.command, stack, spec)
    except deploy.MissingError as error:
        return _fail(str(error), Exit.MISSING)
    except deploy.DeployError as error:
        return _fail(str(error), Exit.WRONG)


def _run(command: str, stack: Any, spec: ClusterSpec) -> int:
    from infra_pulumi import deploy

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    if command == "destroy":
        deploy.destroy(stack, say)
    else:
        told = deploy.update(stack, spec.provider, say) if command == "deploy" else deploy.outputs(stack)
        print(json.dumps(told, indent=2, sort_keys=True))
    return Exit.OK


def _agreed(command: str, spec: ClusterSpec) -> bool:
    if not sys.stdin.isatty():
        print("nobody can be asked here; say --yes", file=sys.stderr)
        return False
    try:
        return input(f"{command} {show.summary(spec)}? Type the cluster's name: ").strip() == spec.name
    except EOFError:
        return False


_COMMANDS = {
    "plan": _plan,
    "cost": _cost,
    "policy": _policy,
    "render": _render,
    "catalogue": _catalogue,
    "doctor": _doctor,
    "deploy": _engine,
    "outputs": _engine,
    "destroy": _engine,
}


if __name__ == "__main__":
    sys.exit(main())
