"""`python -m infra_pulumi`: what it prints, how it ends, and that it loads no more than it needs."""

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


def test_a_plan_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *EXAMPLE]) == 0
    told = capsys.readouterr().out
    assert "serve-app on aws, us-west-2 (us-west-2a, us-west-2b): gpu 0 to 4 x g5.xlarge, spot" in told
    assert "aws.eks.NodeGroup" in told
    assert "warning budget-tells-nobody" in told
    assert "The expected cost is above the budget of 500.00 USD" in told


def test_the_cold_start_is_told_by_phase_and_scaled_by_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *EXAMPLE, "--image-gb", "5.8", "--weights-gib", "30"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"image of 5\.8 GB is pulled +60\n", told)  # half of 121 s
    assert re.search(r"30 GiB of weights are read +36\n", told)
    assert "measured on AWS by data-on-eks" in told


def test_a_plan_as_json_is_the_same_to_the_byte(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        assert main(["plan", *EXAMPLE, "--json"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    told = json.loads(texts[0])
    assert set(told) == {"spec", "plan", "findings", "cost", "cold_start", "warnings"}
    assert told["spec"]["budget"]["monthly_usd"] == 500


def test_flags_change_what_a_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("provider: gcp\ngpu_pools:\n  - {name: big, instance_types: [g2-standard-4], max: 2}\n")
    assert main(["cost", "--spec", str(path), "--max", "7", "--spot"]) == 0
    assert "big 0 to 7 x g2-standard-4, spot" in capsys.readouterr().out


def test_a_description_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--provider", "aws", "--instance-type", "p3.2xlarge", "--json"]) == 2
    told = capsys.readouterr()
    assert "take g5.xlarge" in told.err
    assert json.loads(told.out)["faults"][0]["path"] == "gpu_pools.0.instance_types.0"
    assert main(["cost"]) == 2
    assert "provider: missing" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--spec", "nowhere.yaml"], ["--prices", "nowhere.yaml", *EXAMPLE]])
def test_files_that_are_not_there(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *flags]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_an_error_of_the_policy_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--provider", "gcp", "--instance-type", "g2-standard-4", "--production", "--zone", "us-central1-a"]
    assert main(["policy", *flags]) == 1
    assert "error production-in-one-zone" in capsys.readouterr().out


def test_the_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "--rules"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 30


def test_which_machines_hold_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalogue", "--fits", "7b", "--dtype", "int8", "--measured", "g5.xlarge=5000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "g5.xlarge" in lines[1]
    assert "measured" in lines[1]
    assert main(["catalogue", "--fits", "405b", "--dtype", "float32"]) == 0
    assert "no machine holds the" in capsys.readouterr().out


def test_what_was_measured_is_of_a_machine_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalogue", "--fits", "7b", "--measured", "g5.xlagre=5000"]) == 2
    assert "g5.xlagre is no machine of the catalogue" in capsys.readouterr().err


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    """A catalogue of somebody else's, with a machine and a GPU that ours does not know."""
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


def test_another_catalogue_counts_everywhere(prices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    told = capsys.readouterr().out
    assert "p7.4xlarge" in told.splitlines()[1]
    assert "a9-highgpu-1g is not ranked: how fast its B300 is, is not known; say --measured" in told


def test_a_gpu_without_a_name_with_google_is_refused(prices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prices", str(prices), "--provider", "gcp", "--instance-type", "a9-highgpu-1g"]
    assert main(["plan", *flags]) == 2
    assert "it is not known what Google calls its GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ("aws", "aws ce update-cost-allocation-tags-status"),
        ("gcp", "gcloud services enable artifactregistry.googleapis.com billingbudgets.googleapis.com"),
        ("azure", "az feature register --namespace Microsoft.Compute --name EncryptionAtHost"),
        ("azure", "az vm list-skus --location eastus --size Standard_NC24ads_A100_v4 --zone"),
        ("azure", "AKS cannot make a private Kubernetes API public later"),
    ],
)
def test_what_is_done_by_hand_is_told(provider: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--provider", provider, "--instance-type", TYPES[provider], "--budget", "500"]
    assert main(["plan", *flags]) == 0
    assert said in capsys.readouterr().out
    page = " ".join((ROOT / "docs/deploy.md").read_text().split())
    if said.startswith(("aws ", "gcloud ", "az feature")):
        assert said in page


def test_the_catalogue_names_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["catalogue"]) == 0
    assert "p3.2xlarge: torch's CUDA 13 builds have no Volta" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["deploy", "destroy", "outputs"])
def test_without_the_cli_it_says_how_to_get_it(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([command, *EXAMPLE]) == 3
    assert "curl -fsSL https://get.pulumi.com | sh" in capsys.readouterr().err


def test_doctor_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["doctor", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["packages"]["pulumi"] is True
    assert told["programs"]["pulumi"] is None


def run(*arguments: str) -> tuple[str, float]:
    began = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - began


def test_the_package_loads_no_sdk_and_the_catalogue_no_pulumi() -> None:
    sdks = {"pulumi_aws", "pulumi_gcp", "pulumi_azure_native", "pulumi_kubernetes"}
    for module, kept_out in (
        ("infra_pulumi", sdks),
        ("infra_pulumi.base", sdks),
        ("infra_pulumi.__main__", {"pulumi"}),
    ):
        loaded, _ = run("-c", f"import sys, {module}; print(*sys.modules)")
        assert set(loaded.split()) & (kept_out | sdks) == set()


def test_one_cloud_loads_its_own_sdk_only() -> None:
    program = "import sys; from infra_pulumi.__main__ import main; main(sys.argv[1:]); print(*sys.modules)"
    loaded, _ = run("-c", program, "policy", *EXAMPLE)
    sdks = {"pulumi_aws", "pulumi_gcp", "pulumi_azure_native", "pulumi_kubernetes"}
    assert sdks & set(loaded.split()) == {"pulumi_aws"}


@pytest.mark.perf
@pytest.mark.parametrize(("provider", "bar"), [("aws", 3.0), ("gcp", 3.0), ("azure", 6.0)])
def test_a_plan_takes_seconds(provider: str, bar: float) -> None:
    flags = ["--provider", provider, "--instance-type", TYPES[provider], "--json"]
    run("-m", "infra_pulumi", "plan", *flags)  # bytecode is there from the second time on
    assert min(run("-m", "infra_pulumi", "plan", *flags)[1] for _ in range(3)) <= bar
