"""The command line of the suite: defaults, errors and traces."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from perf.options import parser
from perf.settings import Settings, settings
from perf.suite import main


def chosen(*arguments: str) -> Settings:
    options = parser()
    return settings(options.parse_args(arguments), options.error)


def test_defaults() -> None:
    default = chosen()
    assert default.scenarios == ("single", "batch", "streaming", "concurrency")
    assert (default.concurrency, default.batch_sizes) == ((1, 2, 4, 8, 16, 32), (1, 4, 8, 16))
    assert (default.num_requests, default.max_tokens, default.slo, default.fixed_length) == (20, 64, None, True)
    assert len(chosen("--quick").concurrency) < len(default.concurrency)


def test_command_of_the_guide_is_accepted() -> None:
    options = shlex.split('--prompt "The future of AI is" --max-tokens 128 --num-requests 20 --batch-sizes 1 4 8 16')
    result = chosen(*options, "--output", "performance_results.json")
    assert (result.prompt, result.max_tokens, result.batch_sizes) == ("The future of AI is", 128, (1, 4, 8, 16))


@pytest.mark.parametrize(
    ("arguments", "scenarios"),
    [
        (["--rate", "2", "4"], ("single", "batch", "streaming", "concurrency", "rate")),
        (["--only", "streaming,single"], ("single", "streaming")),
        (["--only", "batch-profile"], ("batch-profile",)),
        (["--find-max", "--only", "single"], ("single", "find-max")),
        (["--api", "tgi"], ("single", "streaming", "concurrency")),
    ],
)
def test_options_choose_the_scenarios(arguments: list[str], scenarios: tuple[str, ...]) -> None:
    assert chosen(*arguments).scenarios == scenarios


def test_skipped_scenarios_have_a_reason() -> None:
    assert chosen("--api", "tgi").skipped == {"batch": "TGI has no call for several prompts"}


def test_search_without_an_objective_has_the_default_one() -> None:
    assert str(chosen("--only", "find-max").slo) == "ttft_p95<500ms,tpot_p95<50ms"
    assert str(chosen("--only", "find-max", "--slo", "e2e_p99<2s").slo) == "e2e_p99<2000ms"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--url", "localhost:8000"], "write http://host:port"),
        (["--url", "http://key@host"], "--api-key-file"),
        (["--concurrency", "0"], "whole number above 0"),
        (["--concurrency", "four"], "whole number above 0"),
        (["--rate", "-1"], "number above 0"),
        (["--rate", "nan"], "number above 0"),
        (["--duration", "soon"], "30s or 2m"),
        (["--slo", "fast"], "ttft_p95<500ms"),
        (["--fail-on", "5"], "write 5%"),
        (["--only", "everything"], "unknown scenario 'everything'"),
        (["--only", "rate"], "requires --rate"),
        (["--arrival", "closed", "--rate", "4"], "--concurrency"),
        (["--arrival", "trace"], "requires --trace FILE"),
        (["--trace", "/nowhere/trace.jsonl"], "No such file"),
        (["--baseline", "/nowhere/results.json"], "No such file"),
        (["--api-key-file", "/nowhere/key"], "No such file"),
        (["--instance-type", "g5.xlrge"], "g5.xlarge"),
        (["--only", "single", "--rate", "4"], "add it to --only"),
        (["--find-max", "--arrival", "ramp"], "cannot search"),
        (["--arrival", "gamma"], "applies to --rate"),
        (["--fail-on", "5%"], "requires --baseline"),
        (["--only", "batch", "--slo", "ttft_p95<500ms"], "no chosen scenario streams"),
        (["--api", "tgi", "--only", "batch"], "no scenario is left to run: TGI has no call for several prompts"),
        (["--api-key-file", __file__], "expected one line with the key"),
        (["--trace", __file__, "--rate", "4"], "the trace defines it"),
        (["--trace", __file__, "--max-tokens", "4"], "remove --max-tokens"),
        (["--warmup", "long"], "neither auto nor a number"),
    ],
)
def test_invalid_options_are_named_with_a_remedy(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_help_lists_exit_codes_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes" in text
    assert "--only batch-profile" in text


def test_trace_is_sorted_and_starts_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"timestamp": at, "input_length": 9, "output_length": 4} for at in (3000, 1000, 2500)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    result = chosen("--trace", str(path), "--only", "rate")
    assert [entry.at_s for entry in result.trace] == [0, 1.5, 2]
    assert result.arrival == "trace"


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"timestamp": 1, "input_length": 0, "output_length": 4}'])
def test_invalid_trace_line_is_named(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1, "input_length": 1, "output_length": 4}\n' + line)
    with pytest.raises(SystemExit):
        main(["--trace", str(path)])
    assert "trace.jsonl:2: invalid trace line; expected a line like {" in capsys.readouterr().err
