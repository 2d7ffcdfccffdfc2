"""What schemathesis checks beyond its own: that a documented body is one that our types take."""

from __future__ import annotations

import json
from typing import Any, get_args

import schemathesis

from serve_app.api.body import parse_document
from serve_app.api.openapi import OPERATIONS
from serve_app.api.schema import Body
from serve_app.errors import InvalidRequest

BODIES: dict[tuple[str, str], tuple[type[Body], ...]] = {
    (operation.method, operation.path): get_args(operation.body) or (operation.body,)
    for operation in OPERATIONS
    if operation.body is not None
}


@schemathesis.check
def documented_body_is_judged_by_its_meaning(ctx: Any, response: Any, case: Any) -> None:
    """A schema cannot say which tokens a model has, or that one field is at odds with another.

    Whoever is refused for that has sent what our types take; whoever is not has found the document wrong.
    """
    generation = case.meta.generation if case.meta is not None else None
    if response.status_code != 422 or generation is None or not generation.mode.is_positive:
        return
    bodies = BODIES[case.method.lower(), case.operation.path]
    refusals = [refusal for refusal in (_refusal(body, case.body) for body in bodies) if refusal is not None]
    assert len(refusals) < len(bodies), f"documented, and refused: {refusals}"


def _refusal(kind: type[Body], document: object) -> str | None:
    try:
        kind.parse(parse_document(json.dumps(document).encode()))
    except InvalidRequest as error:
        return error.message
    return None
