"""What runs a line of a batch, and the line of the output file that is made of its answer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

from serve_app.core.engine import EngineLoad
from serve_app.core.tenants import Identity


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The answer that the endpoint gives to a line: its status, its JSON body and the id of the request.

    `retry_after_s` is the time after which the service asks to try again, if it does.
    """

    status: int
    body: str
    request_id: str
    retry_after_s: float | None = None

    @property
    def failed(self) -> bool:
        return self.status >= 400


class LineRunner(Protocol):
    """Answers the lines of batches as the endpoints of the service do."""

    def parse(self, line: bytes) -> object:
        """The JSON of a line. Raises ServeAppError."""
        ...

    def load(self, body: object, identity: Identity) -> tuple[str, EngineLoad] | None:
        """The model of a line's body, and how busy it is; None if there is no such model for the caller."""
        ...

    async def answer(self, endpoint: str, body: object, identity: Identity) -> LineAnswer:
        """The answer to the body of a line. Errors are answers too."""
        ...


def request_name(batch_id: str, line: int) -> str:
    """The id of a line in the output, which is the same whenever and wherever the line is run."""
    return "batch_req_" + hashlib.sha256(f"{batch_id}/{line}".encode()).hexdigest()[:24]


def encode_answer(batch_id: str, line: int, custom_id: str, answer: LineAnswer) -> str:
    """The line of the output file, or of the error file, in OpenAI's form."""
    start = json.dumps({"id": request_name(batch_id, line), "custom_id": custom_id})
    status = json.dumps({"status_code": answer.status, "request_id": answer.request_id})
    return f'{start[:-1]}, "response": {status[:-1]}, "body": {answer.body}}}, "error": null}}'


def encode_missing(batch_id: str, line: int, custom_id: str, code: str, message: str) -> str:
    """The line of the error file for a line that was not run."""
    error = {"code": code, "message": message}
    return json.dumps({"id": request_name(batch_id, line), "custom_id": custom_id, "response": None, "error": error})
