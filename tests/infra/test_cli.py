"""`python -m infra_pulumi`: output, exit codes and imported packages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from infra_pulumi.__main__ import main
from tests.infra.helpers import TYPES

pytestmark = pytest.mark.infra

ROOT = Path(__file__).parents[2]
EXAMPLE = ["--provider", "aws", "--instance-type", "g5.xlarge", "--region", "us-west-2"]
EXAMPLE += ["--spot", "--min", "0", "--max", "4", "--budget", "500"]


def test_a_plan_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *EXAMPLE]) == 0
    output = capsys.readouterr().out
    assert "serve-app on aws, us-west-2 (us-west-2a, us-west-2b): gpu 0 to 4 x g5.xlarge, spot" in output
    assert "aws.eks.NodeGroup" in output
    assert "warning budget-tells-nobody" in output
    assert "The expected cost is above the budget of 500.00 USD" in output


def test_the_cold_start_is_listed_by_phase_and_scaled_by_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *EXAMPLE, "--image-gb", "5.8", "--weights-gib", "30"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"image of 5\.8 GB is pulled, after the prepull +24 +-\n", output)  # half of 121 s, less 36 s
    assert re.search(r"30 GiB of weights are read +36 +36\n", output)
    assert "measured on AWS by data-on-eks" in output


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        (["{kind: native}"], "native"),
        (["{kind: native}", "{kind: vllm}"], "vllm"),
        (["{kind: vllm, enforce_eager: true}"], "vllm-eager"),
        (["{kind: vllm, enforce_eager: true}", "{kind: auto}"], "vllm"),
    ],
)
def test_the_start_is_that_of_the_engine_in_the_serve_config(
    engines: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "serve.yaml"
    models = ", ".join(f"{{engine: {engine}}}" for engine in engines)
    config.write_text(f"applications: [{{args: {{models: [{models}]}}}}]")
    spec = tmp_path / "cluster.yaml"
    spec.write_text(f"provider: aws\nserve: {{config: {config}}}\n")
    assert main(["plan", "--spec", str(spec), *EXAMPLE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cold_start"]["engine"] == expected
    assert main(["plan", "--spec", str(spec), *EXAMPLE, "--json", "--engine", "native"]) == 0
    assert json.loads(capsys.readouterr().out)["cold_start"]["engine"] == "native"


def test_two_json_plans_are_equal_byte_by_byte(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        assert main(["plan", *EXAMPLE, "--json"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    plan = json.loads(texts[0])
    assert set(plan) == {"spec", "plan", "findings", "cost", "cold_start", "warnings"}
    assert plan["spec"]["budget"]["monthly_usd"] == 500


def test_flags_override_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("provider: gcp\ngpu_pools:\n  - {name: big, instance_types: [g2-standard-4], max: 2}\n")
    assert main(["cost", "--spec", str(path), "--max", "7", "--spot"]) == 0
    assert "big 0 to 7 x g2-standard-4, spot" in capsys.readouterr().out


def test_an_invalid_description_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--provider", "aws", "--instance-type", "p3.2xlarge", "--json"]) == 2
    captured = capsys.readouterr()
    assert "take g5.xlarge" in captured.err
    assert json.loads(captured.out)["faults"][0]["path"] == "gpu_pools.0.instance_types.0"
    assert main(["cost"]) == 2
    assert "provider: missing" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--spec", "nowhere.yaml"], ["--prices", "nowhere.yaml", *EXAMPLE]])
def test_missing_files_are_a_usage_error(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *flags]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_a_policy_error_sets_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--provider", "gcp", "--instance-type", "g2-standard-4", "--production", "--zone", "us-central1-a"]
    assert main(["policy", *flags]) == 1
    assert "error production-in-one-zone" in capsys.readouterr().out


def test_the_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "--rules"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 30


def test_machines_that_hold_a_model_are_ranked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalogue", "--fits", "7b", "--dtype", "int8", "--measured", "g5.xlarge=5000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "g5.xlarge" in lines[1]
    assert "measured" in lines[1]
    assert main(["catalogue", "--fits", "405b", "--dtype", "float32"]) == 0
    assert "no machine holds the" in capsys.readouterr().out


def test_a_measurement_of_an_unknown_machine_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalogue", "--fits", "7b", "--measured", "g5.xlagre=5000"]) == 2
    assert "g5.xlagre is not in the catalogue" in capsys.readouterr().err


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    """A catalogue file with a machine and a GPU that the shipped catalogue does not have."""
    machine = {"vcpu": 16, "memory_gib": 128, "usd_per_hour": 3.5, "as_of": "2026-11-01", "source": "a quote"}
    gpu = {"gpu": "B300", "gpu_count": 1, "gpu_memory_gib": 288, "compute_capability": "10.3"}
    types = [
        {"provider": "aws", "type": "p7.4xlarge", "region": "us-west-2", **machine, **gpu},
        {"provider": "gcp", "type": "a9-highgpu-1g", "region": "us-central1", **machine, **gpu},
        {"provider": "aws", "type": "m7i.2xlarge", "region": "us-west-2", **machine},
        {"provider": "gcp", "type": "n2-standard-8", "region": "us-central1", **machine},
    ]
    path = tmp_path / "prices.yaml"
    path.write_text(json.dumps({"instance_types": types}))
    return path


def test_all_commands_use_another_catalogue(prices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prices", str(prices), "--provider", "aws", "--instance-type", "p7.4xlarge"]
    assert main(["plan", *flags]) == 0
    spec = tmp_path / "cluster.yaml"
    spec.write_text(f"provider: aws\nserve: {{config: {ROOT / 'serve_config.yaml'}}}\n")
    assert main(["render", "--spec", str(spec), *flags, "--output", str(tmp_path / "rendered")]) == 0
    service = yaml.safe_load((tmp_path / "rendered/kubernetes/rayservice.yaml").read_text())
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["rayStartParams"]["num-cpus"] == "15"
    capsys.readouterr()
    assert main(["catalogue", "--prices", str(prices), "--fits", "7b", "--measured", "p7.4xlarge=9000"]) == 0
    output = capsys.readouterr().out
    assert "p7.4xlarge" in output.splitlines()[1]
    assert "a9-highgpu-1g is not ranked: the speed of its B300 is unknown; pass --measured" in output


def test_a_gpu_without_a_known_google_name_is_refused(prices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prices", str(prices), "--provider", "gcp", "--instance-type", "a9-highgpu-1g"]
    assert main(["plan", *flags]) == 2
    assert "Google's name of its GPU is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("provider", "step"),
    [
        ("aws", "aws ce update-cost-allocation-tags-status"),
        ("gcp", "gcloud services enable artifactregistry.googleapis.com billingbudgets.googleapis.com"),
        ("azure", "az feature register --namespace Microsoft.Compute --name EncryptionAtHost"),
        ("azure", "az vm list-skus --location eastus --size Standard_NC24ads_A100_v4 --zone"),
        ("azure", "AKS cannot switch between a private and a public Kubernetes API later"),
    ],
)
def test_a_plan_lists_manual_steps(provider: str, step: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--provider", provider, "--instance-type", TYPES[provider], "--budget", "500"]
    assert main(["plan", *flags]) == 0
    assert step in capsys.readouterr().out
    page = " ".join((ROOT / "docs/deploy.md").read_text().split())
    if step.startswith(("aws ", "gcloud ", "az feature")):
        assert step in page


def test_the_catalogue_lists_refused_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalogue"]) == 0
    assert "p3.2xlarge: torch's CUDA 13 builds have no Volta" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["deploy", "destroy", "outputs"])
def test_without_pulumis_cli_a_command_prints_how_to_install_it(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([command, *EXAMPLE]) == 3
    assert "curl -fsSL https://get.pulumi.com | sh" in capsys.readouterr().err


def test_doctor_lists_missing_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["pulumi"] is True
    assert found["programs"]["pulumi"] is None


def run(*arguments: str) -> tuple[str, float]:
    """Run Python in a new process; return its output and its wall time in seconds."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - start


# Prints the imported packages of Pulumi after each step; the steps import ever more.
IMPORTS = """
import sys

def report(step):
    print(step, *sorted({name for name in sys.modules if name.startswith("pulumi") and "." not in name}))

import infra_pulumi.render
report("render")
from infra_pulumi.__main__ import main
report("main")
main(["catalogue"])
report("catalogue")
import infra_pulumi.base
report("base")
main(["policy", *sys.argv[1:]])
report("policy")
"""


def test_commands_import_only_the_packages_that_they_need() -> None:
    lines = [line.split() for line in run("-c", IMPORTS, *EXAMPLE)[0].splitlines() if line]
    steps = ("render", "main", "catalogue", "base", "policy")
    assert [(line[0], line[1:]) for line in lines if line[0] in steps] == [
        ("render", []),
        ("main", []),
        ("catalogue", []),
        ("base", ["pulumi"]),
        ("policy", ["pulumi", "pulumi_aws"]),
    ]


@pytest.mark.long
@pytest.mark.perf
@pytest.mark.parametrize(("provider", "limit_s"), [("aws", 3.0), ("gcp", 3.0), ("azure", 6.0)])
def test_a_plan_takes_a_few_seconds(provider: str, limit_s: float) -> None:
    flags = ["--provider", provider, "--instance-type", TYPES[provider], "--json"]
    run("-m", "infra_pulumi", "plan", *flags)  # the first run writes bytecode
    assert any(run("-m", "infra_pulumi", "plan", *flags)[1] <= limit_s for _ in range(3))
