"""Command line of `python -m infra_pulumi`: plan, price, check, render and deploy one GPU cluster."""

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

from infra_pulumi import (
    account,
    catalogue as catalogues,
    cold_start,
    cost,
    model_sizing,
    options,
    quotas,
    serve_config,
    show,
)
from infra_pulumi.catalogue import Catalogue, CatalogueError
from infra_pulumi.sizing_facts import GIB, Load
from infra_pulumi.spec import ClusterSpec, SpecError
from infra_pulumi.vllm_sizing import VllmSetup

if TYPE_CHECKING:
    from infra_pulumi.policy import Finding
    from infra_pulumi.record import Recording

SDKS = {"aws": "pulumi_aws", "gcp": "pulumi_gcp", "azure": "pulumi_azure_native"}
ADDONS_SDK = "pulumi_kubernetes"
INSTALL = "in the repository, run: .venv/bin/pip install --no-deps -r requirements-infra.lock"


class Exit(IntEnum):
    """Exit codes; `python -m infra_pulumi --help` documents them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    MISSING = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = options.parser().parse_args(arguments)
    try:
        return _COMMANDS[args.command](args)
    except SpecError as error:
        if getattr(args, "json", False):
            print(json.dumps({"faults": [asdict(fault) for fault in error.faults]}, indent=2))
        return _fail(str(error), Exit.USAGE)
    except CatalogueError as error:
        return _fail(str(error), Exit.USAGE)
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has closed it
        sys.stderr.close()
        return Exit.OK


def _fail(text: str, code: Exit) -> int:
    print(f"infra_pulumi: {text}", file=sys.stderr)
    return code


def _load_inputs(args: argparse.Namespace) -> tuple[ClusterSpec, Catalogue]:
    spec = options.spec_from_args(args)
    catalogue = catalogues.load(args.prices)
    catalogues.check(spec, catalogue)
    return spec, catalogue


def _missing_packages(spec: ClusterSpec) -> str | None:
    """A sentence that names the packages to install before this description can be planned; None if none is missing."""
    required = ["pulumi", SDKS[spec.provider], *([ADDONS_SDK] if spec.addons.by_pulumi else [])]
    missing = [name for name in required if importlib.util.find_spec(name) is None]
    return f"cannot import {' and '.join(missing)}; {INSTALL}" if missing else None


def _evaluate(spec: ClusterSpec, catalogue: Catalogue) -> tuple[Recording, tuple[Finding, ...]]:
    from infra_pulumi import plan, policy

    recording = plan.evaluate(spec, catalogue)
    gc.freeze()  # the SDK's objects live until the process ends, so that collecting them at exit only costs time
    return recording, policy.findings(recording, spec)


def _plan(args: argparse.Namespace) -> int:
    spec, catalogue = _load_inputs(args)
    if missing := _missing_packages(spec):
        return _fail(missing, Exit.MISSING)
    recording, findings = _evaluate(spec, catalogue)
    estimate = cost.estimate(spec, catalogue, _busy_share(args))
    warnings = [
        *catalogues.warnings(spec, catalogue, datetime.date.today()),
        *quotas.warnings(spec, catalogue),
        *account.steps(spec),
    ]
    engine = args.engine or _engine(spec)
    phases = cold_start.phases(args.image_gb, args.weights_gib, engine, spec.addons.image_prepull)
    if args.json:
        data = _plan_data(spec, recording, findings, estimate, warnings)
        data["cold_start"] = {
            "phases": [asdict(phase) for phase in phases],
            "seconds": cold_start.total(phases),
            "seconds_again": cold_start.total_again(phases),
            "engine": engine,
            "source": cold_start.source(spec.provider),
        }
        print(json.dumps(data, indent=2, sort_keys=True))
    else:
        print(show.summary(spec), show.tree(recording), show.findings(findings), sep="\n\n")
        print("", show.cost(estimate, spec.budget.monthly_usd if spec.budget else None), "", sep="\n")
        print(show.cold_start(phases, cold_start.source(spec.provider)), "", sep="\n")
        print("warnings:", *show.bullets(warnings or ["none"]), sep="\n")
    return _exit_code(findings)


def _engine(spec: ClusterSpec) -> cold_start.Engine:
    """The engine that takes longest to start, of the models in the Serve config; native if the file does not exist."""
    if not spec.serve.config.exists():
        return "native"
    models = serve_config.vllm_models(serve_config.read_config(spec.serve.config))
    if not models:
        return "native"
    return "vllm-eager" if all(model.enforce_eager for model in models) else "vllm"


def _plan_data(
    spec: ClusterSpec,
    recording: Recording,
    findings: Sequence[Finding],
    estimate: cost.Estimate,
    warnings: Sequence[str],
) -> dict[str, Any]:
    return {
        "spec": spec.model_dump(mode="json"),
        "plan": json.loads(recording.json()),
        "findings": [asdict(each) for each in findings],
        "cost": show.estimate_data(estimate),
        "warnings": list(warnings),
    }


def _exit_code(findings: Sequence[Finding]) -> int:
    return Exit.FAILED if any(each.severity == "error" for each in findings) else Exit.OK


def _busy_share(args: argparse.Namespace) -> float:
    return cost.BUSY_SHARE if args.busy_share is None else float(args.busy_share)


def _cost(args: argparse.Namespace) -> int:
    spec, catalogue = _load_inputs(args)
    estimate = cost.estimate(spec, catalogue, _busy_share(args))
    if args.json:
        print(json.dumps(show.estimate_data(estimate), indent=2))
        return Exit.OK
    print(show.summary(spec), show.cost(estimate, spec.budget.monthly_usd if spec.budget else None), sep="\n\n")
    print("\nsources:", *show.bullets(sorted({f"{line.source} ({line.as_of})" for line in estimate.lines})), sep="\n")
    return Exit.OK


def _policy(args: argparse.Namespace) -> int:
    if args.rules:
        if importlib.util.find_spec("pulumi") is None:
            return _fail(f"cannot import pulumi; {INSTALL}", Exit.MISSING)
        from infra_pulumi import policy

        rows = [(each.name, each.severity, each.why) for each in policy.rules()]
        print(show.table(("rule", "severity", "reason"), rows))
        return Exit.OK
    spec, catalogue = _load_inputs(args)
    if missing := _missing_packages(spec):
        return _fail(missing, Exit.MISSING)
    _, findings = _evaluate(spec, catalogue)
    print(json.dumps([asdict(each) for each in findings], indent=2) if args.json else show.findings(findings))
    return _exit_code(findings)


def _render(args: argparse.Namespace) -> int:
    from infra_pulumi import render

    spec, catalogue = _load_inputs(args)
    files = render.files(spec, catalogue, spec.serve.config, args.output)
    try:
        written = [str(path) for path in render.write(files, args.output)]
    except OSError as error:
        return _fail(f"cannot write {error.filename}: {error.strerror}", Exit.FAILED)
    print(json.dumps(written, indent=2) if args.json else "\n".join(f"wrote {path}" for path in written))
    return Exit.OK


def _catalogue(args: argparse.Namespace) -> int:
    catalogue = catalogues.load(args.prices)
    if args.provider:
        chosen = tuple(each for each in catalogue.instance_types if each.provider == args.provider)
        catalogue = catalogue.model_copy(update={"instance_types": chosen})
    if args.fits is not None:
        return _fits(args, catalogue)
    if args.json:
        print(json.dumps([each.model_dump(mode="json") for each in catalogue.instance_types], indent=2))
    else:
        print(show.machines(catalogue.instance_types))
        print(*(f"\n{each.type}: {each.refused}" for each in catalogue.instance_types if each.refused), sep="")
    return Exit.OK


def _fits(args: argparse.Namespace, catalogue: Catalogue) -> int:
    load = Load(args.streams, args.context)
    measured = dict(args.measured or ())
    if unknown := sorted(set(measured) - {each.type for each in catalogue.instance_types}):
        return _fail(f"--measured: {', '.join(unknown)} is not in the catalogue", Exit.USAGE)
    try:
        vllm = options.vllm_setup(args)
    except ValueError as error:
        return _fail(str(error), Exit.USAGE)
    fits = model_sizing.ranked(catalogue, args.fits, args.dtype, load, measured, vllm)
    if args.json:
        print(json.dumps([show.fit_data(fit) for fit in fits], indent=2))
    elif fits:
        print(show.fits(fits), "", show.about_fits(load, vllm is not None), sep="\n")
        for machine in catalogue.instance_types:
            if machine.gpu and not model_sizing.derivable(machine) and machine.type not in measured:
                print(f"{machine.type} is not ranked: the speed of its {machine.gpu} is unknown; pass --measured")
    else:
        print(_too_large(args, load, vllm))
    return Exit.OK


def _too_large(args: argparse.Namespace, load: Load, vllm: VllmSetup | None) -> str:
    if vllm is None:
        required = model_sizing.required_bytes(args.fits, args.dtype, load) / GIB
        return f"no machine holds the required {required:.0f} GiB; take int8 or int4, or fewer --streams"
    required = model_sizing.required_bytes(args.fits, args.dtype, Load(1, load.context)) / GIB
    return (
        f"no machine holds the weights and one sequence of {load.context} tokens, {required:.0f} GiB; take fp8 or "
        "int4, a smaller --context, or leave out --tensor-parallel"
    )


def _doctor(args: argparse.Namespace) -> int:
    """List the packages and programs that this package uses, with the purpose of each missing one."""
    required = ("pulumi", *SDKS.values())
    packages = {name: importlib.util.find_spec(name) is not None for name in (*required, ADDONS_SDK)}
    programs = {name: shutil.which(name) for name in _PROGRAMS}
    if args.json:
        print(json.dumps({"packages": packages, "programs": programs}, indent=2))
    else:
        hints = dict.fromkeys(required, INSTALL) | {ADDONS_SDK: f"for addons.by_pulumi; {INSTALL}"}
        rows = [
            (f"package {name}", "installed" if found else f"missing: {hints[name]}") for name, found in packages.items()
        ]
        rows += [(f"program {name}", path or f"missing: {_PROGRAMS[name]}") for name, path in programs.items()]
        print(show.table(("", ""), rows).strip())
    return Exit.OK if all(packages[name] for name in required) and programs["pulumi"] else Exit.MISSING


_PROGRAMS = {
    "pulumi": "for deploy; https://get.pulumi.com",
    "kubectl": "to manage what runs in the cluster",
    "helm": "to install the addons without Pulumi",
    "aws": "to write a kubeconfig on AWS",
    "gcloud": "to write a kubeconfig on GCP",
    "az": "to write a kubeconfig on Azure",
    "gke-gcloud-auth-plugin": "to get a token on GCP",
    "kubelogin": "to get a token on Azure",
}


def _pulumi_command(args: argparse.Namespace) -> int:
    """Run deploy, outputs or destroy, which need Pulumi's CLI."""
    spec, catalogue = _load_inputs(args)
    if missing := _missing_packages(spec):
        return _fail(missing, Exit.MISSING)
    from infra_pulumi import deploy

    if args.command == "deploy":
        _, findings = _evaluate(spec, catalogue)
        if _exit_code(findings):
            return _fail(
                f"nothing was deployed, because the policy found errors:\n{show.findings(findings)}", Exit.FAILED
            )
    try:
        command = deploy.find_command()
        if args.command != "outputs" and not args.yes and not _confirmed(args.command, spec):
            return _fail("not confirmed; nothing was changed", Exit.FAILED)
        stack = deploy.open_stack(spec, catalogue, deploy.StateLocation(args.state, args.backend), command)
        return _run(args.command, stack, spec)
    except deploy.MissingError as error:
        return _fail(str(error), Exit.MISSING)
    except deploy.DeployError as error:
        return _fail(str(error), Exit.FAILED)


def _run(command: str, stack: Any, spec: ClusterSpec) -> int:
    from infra_pulumi import deploy

    def log(text: str) -> None:
        print(text, file=sys.stderr)

    if command == "destroy":
        deploy.destroy(stack, log)
    else:
        outputs = deploy.update(stack, spec.provider, log) if command == "deploy" else deploy.outputs(stack)
        print(json.dumps(outputs, indent=2, sort_keys=True))
    return Exit.OK


def _confirmed(command: str, spec: ClusterSpec) -> bool:
    if not sys.stdin.isatty():
        print("standard input is not a terminal, so that the command cannot ask; pass --yes", file=sys.stderr)
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
    "deploy": _pulumi_command,
    "outputs": _pulumi_command,
    "destroy": _pulumi_command,
}


if __name__ == "__main__":
    sys.exit(main())
