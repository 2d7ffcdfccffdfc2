"""The command `python -m serve_app batch`: submits files of requests to a running service, and fetches the answers."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve_app.direct import opener

# The environment variable with the API key.
KEY_VARIABLE = "SERVE_APP_API_KEY"
_TIMEOUT_S = 60.0
_POLL_S = 1.0
# Polls that may fail in a row: about the time in which an ingress is replaced.
_FAILED_POLLS = 60
_PIECE = 65_536
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_ENDED = ("completed", "failed", "expired", "cancelled")


class BatchError(Exception):
    """The service did not do what was asked. The message says why, and what to do."""


class Unreachable(BatchError):
    """The service did not answer."""


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 if the command succeeded, 1 after an error, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    # Ray, which `python -m serve_app` imports, changes the handler, and so do shells for programs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    service = Service(arguments.url.rstrip("/"), os.environ.get(KEY_VARIABLE, ""))
    try:
        run: Callable[[Service, argparse.Namespace], int] = arguments.run
        return run(service, arguments)
    except BatchError as error:
        print(f"serve_app: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app batch",
        description="Run many requests at low priority: a file with one request in each line goes in, a file with one "
        "answer in each line comes out.",
        epilog=f"The environment variable {KEY_VARIABLE} has the API key, if the service needs one.",
    )
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[Service, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.add_argument("--url", default="http://127.0.0.1:8000", help="the service (default: %(default)s)")
        added.set_defaults(run=run)
        return added

    submit = command("submit", _submit, "upload a file of requests and show the progress until all are answered")
    submit.add_argument("file", type=Path, help="JSON lines in the form of OpenAI's batches")
    submit.add_argument("--endpoint", choices=_ENDPOINTS, help="default: the 'url' of the first line")
    submit.add_argument("--output", type=Path, help="the file of the answers (default: FILE with .answers.jsonl)")
    submit.add_argument("--no-wait", action="store_true", help="only submit the batch, and print its id")
    status = command("status", _status, "show a batch, and with --wait its progress until it has ended")
    status.add_argument("batch", help="the id of a batch")
    status.add_argument("--wait", action="store_true", help="wait until the batch has ended")
    fetch = command("fetch", _fetch, "write the answers of a batch that has ended to files")
    fetch.add_argument("batch", help="the id of a batch")
    fetch.add_argument("--output", type=Path, help="the file of the answers (default: BATCH.answers.jsonl)")
    cancel = command("cancel", _cancel, "cancel a batch; the answers that it has can be fetched")
    cancel.add_argument("batch", help="the id of a batch")
    listing = command("list", _list, "list the batches, the newest first")
    listing.add_argument("--limit", type=int, default=20, help="how many, up to 100 (default: %(default)s)")
    return parser


def _submit(service: Service, arguments: argparse.Namespace) -> int:
    file: Path = arguments.file
    endpoint = arguments.endpoint or _endpoint_of(file)
    file_id = service.upload(file)
    body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
    batch = service.ask("POST", "/v1/batches", body)
    if arguments.no_wait:
        print(batch["id"])
        return 0
    print(f"Batch {batch['id']} is submitted.", file=sys.stderr)
    batch = _followed(service, batch)
    if batch["status"] == "failed":
        return _report(batch)
    return _report(batch) or _write(service, batch, arguments.output or file.with_suffix(".answers.jsonl"))


def _status(service: Service, arguments: argparse.Namespace) -> int:
    batch = service.batch(arguments.batch)
    if arguments.wait:
        batch = _followed(service, batch)
    return _report(batch, sys.stdout)


def _fetch(service: Service, arguments: argparse.Namespace) -> int:
    batch = service.batch(arguments.batch)
    if batch["status"] not in _ENDED:
        raise BatchError(
            f"batch {batch['id']} is {batch['status']}; wait for its end with `python -m serve_app batch status --wait "
            f"{batch['id']}`"
        )
    return _report(batch) or _write(service, batch, arguments.output or Path(f"{batch['id']}.answers.jsonl"))


def _cancel(service: Service, arguments: argparse.Namespace) -> int:
    return _report(service.ask("POST", f"/v1/batches/{_quoted(arguments.batch)}/cancel"), sys.stdout)


def _list(service: Service, arguments: argparse.Namespace) -> int:
    found = service.ask("GET", f"/v1/batches?limit={arguments.limit}")["data"]
    for batch in found:
        print(_summary(batch))
    if not found:
        print("There are no batches. `python -m serve_app batch submit FILE` submits one.")
    return 0


def _followed(service: Service, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch when it has ended. Shows its progress; Ctrl-C stops only that. Raises BatchError."""
    failures = 0
    with tqdm(total=batch["request_counts"]["total"] or None, unit="line", desc=batch["status"]) as bar:
        try:
            while batch["status"] not in _ENDED:
                time.sleep(_POLL_S)
                try:
                    batch, failures = service.batch(batch["id"]), 0
                except Unreachable:
                    failures += 1
                    if failures >= _FAILED_POLLS:
                        raise
                _show(bar, batch)
        except KeyboardInterrupt:
            bar.close()
            print(
                f"Batch {batch['id']} goes on. To look at it: python -m serve_app batch status --wait {batch['id']} "
                f"--url {service.url}\nTo stop it: python -m serve_app batch cancel {batch['id']} --url {service.url}",
                file=sys.stderr,
            )
            raise
    return batch


def _show(bar: tqdm[Any], batch: dict[str, Any]) -> None:
    counts = batch["request_counts"]
    bar.total = counts["total"] or None
    bar.set_description(batch["status"], refresh=False)
    if counts["failed"]:
        bar.set_postfix(failed=counts["failed"], refresh=False)
    bar.n = counts["completed"] + counts["failed"]
    bar.refresh()


def _report(batch: dict[str, Any], stream: Any = None) -> int:
    """Print what became of a batch. 1 if its file was refused, with the reasons."""
    print(_summary(batch), file=stream or sys.stderr)
    faults = (batch["errors"] or {}).get("data", [])
    for fault in faults:
        place = f"line {fault['line']}: " if fault["line"] else ""
        print(f"  {place}{fault['message']}", file=sys.stderr)
    if batch["status"] == "failed":
        print("Correct the file, and submit it again.", file=sys.stderr)
        return 1
    return 0


def _summary(batch: dict[str, Any]) -> str:
    counts, created = batch["request_counts"], datetime.fromtimestamp(batch["created_at"], UTC)
    return (
        f"{batch['id']}  {batch['status']:<11}  {counts['completed']} of {counts['total']} lines answered, "
        f"{counts['failed']} failed  {batch['endpoint']}  {created.isoformat(timespec='seconds')}"
    )


def _write(service: Service, batch: dict[str, Any], output: Path) -> int:
    """Write the answers to a file, and the errors to one beside it. 1 if there are errors."""
    errors = output.with_suffix(".errors.jsonl")
    for file_id, path, what in (
        (batch["output_file_id"], output, "answers"),
        (batch["error_file_id"], errors, "errors"),
    ):
        if file_id is not None:
            service.download(file_id, path)
            print(f"{what}: {path}")
    return int(batch["error_file_id"] is not None)


def _endpoint_of(file: Path) -> str:
    """The endpoint that the first line of a file names. Raises BatchError."""
    try:
        with file.open("rb") as lines:
            first = json.loads(next((line for line in lines if line.strip()), b"null"))
    except (OSError, ValueError) as error:
        raise BatchError(f"{file} cannot be read: {error}") from None
    url = first.get("url") if isinstance(first, dict) else None
    if url not in _ENDPOINTS:
        raise BatchError(f"the first line of {file} has no 'url' of {', '.join(_ENDPOINTS)}; set --endpoint")
    return str(url)


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


class Service:
    """The HTTP API of a running service at `url`, with an API key or "". All methods raise BatchError."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._key = key
        self._opener = opener(url)

    def batch(self, batch_id: str) -> dict[str, Any]:
        return self.ask("GET", f"/v1/batches/{_quoted(batch_id)}")

    def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """The JSON object of an answer."""
        content = None if body is None else json.dumps(body).encode()
        with self._open(method, path, content, {"content-type": "application/json"}) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def upload(self, file: Path) -> str:
        """The id of the uploaded file, which is sent piece by piece."""
        boundary = secrets.token_hex(16)
        begin = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{_filename(file)}"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        ).encode()
        end = f"\r\n--{boundary}--\r\n".encode()
        with ExitStack() as stack:
            try:
                source, size = stack.enter_context(file.open("rb")), file.stat().st_size
            except OSError as error:
                raise BatchError(f"{file} cannot be read: {error}") from None
            bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, desc="uploading", leave=False))

            def pieces() -> Iterator[bytes]:
                yield begin
                while piece := source.read(_PIECE):
                    yield piece
                    bar.update(len(piece))
                yield end

            headers = {
                "content-type": f"multipart/form-data; boundary={boundary}",
                "content-length": str(len(begin) + size + len(end)),
            }
            answer = stack.enter_context(self._open("POST", "/v1/files", pieces(), headers))
            return str(json.load(answer)["id"])

    def download(self, file_id: str, path: Path) -> None:
        """Write a file of the service to `path`, which is there when it is complete."""
        part = path.with_name(path.name + ".part")
        with self._open("GET", f"/v1/files/{file_id}/content") as answer:
            size = int(answer.headers.get("content-length", 0)) or None
            try:
                with part.open("wb") as out, tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
                    while piece := answer.read(_PIECE):
                        out.write(piece)
                        bar.update(len(piece))
                part.replace(path)
            except (OSError, http.client.HTTPException) as error:
                part.unlink(missing_ok=True)
                raise BatchError(f"{path} could not be written: {error}") from None

    def _open(self, method: str, path: str, content: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The answer to a request. Raises Unreachable without an answer of the service, or if it cannot answer now."""
        key = {"authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            request = urllib.request.Request(self.url + path, content, {**(headers or {}), **key}, method=method)  # noqa: S310 (an http URL)
            return self._opener.open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                message = _message(error)
            if error.code == 401:
                message += f" Set the environment variable {KEY_VARIABLE}."
            raise (Unreachable if error.code >= 502 else BatchError)(message) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(f"{self.url} does not answer: {reason}; set the address with --url") from None


def _filename(file: Path) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in file.name)


def _message(error: urllib.error.HTTPError) -> str:
    """The message of an error of the service, or the status of an error that is not from the service."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return f"{error.url} answered with the status {error.code}"
