"""lm-eval: multiple choice, perplexity and generation by completions and by chats, with its default tokenizer."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # the data is local

import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import requests
from common import MODEL, run

ROWS = [
    {"country": "France", "cities": ["Paris", "London", "Madrid"]},
    {"country": "Spain", "cities": ["Madrid", "Rome", "Berlin"]},
]
TEXT = "The capital of {{country}} is"


def evaluate(url: str, kind: str, output: str, model: str = MODEL, options: Any = None, **task: Any) -> dict[str, Any]:
    """The results of one task over `ROWS`, and the model's responses under `responses`.

    `kind` is the API: `completions` or `chat-completions`; `output` is the kind of the task.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        data.write_text("\n".join(json.dumps(row) for row in ROWS))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(data)}, "test_split": "train"}
        path = "/v1/chat/completions" if kind == "chat-completions" else "/v1/completions"
        found = lm_eval.simple_evaluate(
            model=f"local-{kind}",
            model_args={"model": model, "base_url": url + path, "max_retries": 1},
            tasks=[{"task": "capitals", "output_type": output, "doc_to_text": TEXT, **source, **task}],
            **(options or {}),
        )
    results: dict[str, Any] = found["results"]["capitals"]
    return {**results, "responses": [sample["resps"] for sample in found["samples"]["capitals"]]}


def quickstart(url: str) -> float:
    """The log probabilities of three continuations for each row; the first one is the right one."""
    found = evaluate(
        url, "completions", "multiple_choice", doc_to_choice="{{cities}}", doc_to_target=0,
        metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    assert found["acc,none"] == 1.0, found
    return float(found["acc,none"])


def perplexity(url: str) -> float:
    found = evaluate(
        url, "completions", "loglikelihood_rolling", doc_to_text="", doc_to_target=TEXT + " {{cities[0]}}.",
        metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    assert 20 < found["word_perplexity,none"] < 2000, found
    return float(found["word_perplexity,none"])


def generated(url: str, kind: str, model: str = MODEL, **options: Any) -> list[str]:
    found = evaluate(
        url, kind, "generate_until", model, options, doc_to_target="{{cities[0]}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 12}, metric_list=[{"metric": "exact_match"}],
        fewshot_config={"sampler": "first_n", "split": "train"},
    )  # fmt: skip
    return [response for ((response,),) in found["responses"]]


def generation(url: str) -> list[str]:
    texts = generated(url, "completions")
    assert [text.strip() for text in texts] == [row["cities"][0] for row in ROWS]
    return texts


def conversation(url: str) -> list[str]:
    """A chat whose earlier turns are the solved example of another row."""
    texts = generated(
        url, "chat-completions", apply_chat_template=True, num_fewshot=1, fewshot_as_multiturn=True
    )  # fmt: skip
    assert all(texts)
    return texts


def errors(url: str) -> str:
    try:
        generated(url, "completions", model="gpt-unknown")
    except requests.HTTPError as error:
        return str(error)
    raise AssertionError("an unknown model is an error")


run(quickstart, perplexity, generation, conversation, errors)
