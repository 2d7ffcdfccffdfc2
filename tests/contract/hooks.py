"""A check of schemathesis: a body that the document describes is refused only for what the document cannot state."""

from __future__ import annotations

import json
from typing import Any, get_args

import schemathesis

from serve_app.api.body import parse_document
from serve_app.api.operations import OPERATIONS
from serve_app.api.schema import Body
from serve_app.errors import InvalidRequest

BODIES: dict[tuple[str, str], tuple[type[Body], ...]] = {
    (operation.method, operation.path): get_args(operation.body) or (operation.body,)
    for operation in OPERATIONS
    if operation.body is not None and not operation.form
}


@schemathesis.check
def a_documented_body_is_valid_for_its_type(ctx: Any, response: Any, case: Any) -> None:
    """A schema cannot state the tokens of a model, or that two fields contradict each other.

    A 400 or 422 for such a reason answers a body that its type accepts. Such a status for a body that its type refuses
    shows that the document is wrong.
    """
    generation = case.meta.generation if case.meta is not None else None
    if response.status_code not in (400, 422) or generation is None or not generation.mode.is_positive:
        return
    bodies = BODIES.get((case.method.lower(), case.operation.path))
    if bodies is None:  # a parameter was refused
        return
    errors = [error for error in (_error(body, case.body) for body in bodies) if error is not None]
    assert len(errors) < len(bodies), f"the document describes a body that is refused: {errors}"


def _error(body: type[Body], document: object) -> str | None:
    try:
        body.parse(parse_document(json.dumps(document).encode()))
    except InvalidRequest as error:
        return error.message
    return None
