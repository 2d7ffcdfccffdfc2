"""Each log record of a replica becomes one JSON object with documented fields."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from datetime import datetime
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from serve_app.telemetry.logs import write_json


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """The file of Ray Serve's logger, with the buffer that Ray Serve sets up in a replica."""
    logger = logging.getLogger("ray.serve")
    before = logger.handlers[:], logger.level
    path = tmp_path / "replica.log"
    file = logging.FileHandler(path)
    logger.handlers[:] = [MemoryHandler(1000, target=file)]
    logger.setLevel(logging.INFO)
    yield path
    file.close()
    logger.handlers[:] = before[0]
    logger.setLevel(before[1])


def test_a_record_is_written_at_once_as_one_object(log: Path) -> None:
    write_json("small", "abc")
    logging.getLogger("ray.serve").warning("%s line\nof two", "one", extra={"fields": {"status": 200, "error": None}})
    (line,) = map(json.loads, log.read_text().splitlines())
    assert time.time() - 60 < _timestamp(line.pop("time")) <= time.time() + 1
    assert line == {
        "level": "WARNING",
        "logger": "ray.serve",
        "message": "one line\nof two",
        "status": 200,
        "model": "small",
        "replica": "abc",
    }


def test_attributes_that_ray_adds_to_a_record_are_not_written(log: Path) -> None:
    write_json("small", "abc")
    of_ray = {"request_id": "of Ray", "replica": "of Ray", "route": "/", "component_name": "replica"}
    logging.getLogger("ray.serve").info("hello", extra=of_ray)
    (line,) = map(json.loads, log.read_text().splitlines())
    assert set(line) == {"time", "level", "logger", "message", "model", "replica"}
    assert line["replica"] == "abc"


def test_a_line_has_the_traceback_of_an_exception(log: Path) -> None:
    write_json("", "abc")
    try:
        raise ValueError("odd")
    except ValueError:
        logging.getLogger("ray.serve").exception("it failed")
    (line,) = map(json.loads, log.read_text().splitlines())
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: odd")
    assert "model" not in line


def _timestamp(text: str) -> float:
    assert text.endswith("Z")
    return datetime.fromisoformat(text).timestamp()
