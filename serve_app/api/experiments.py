"""Experiments and feedback as the HTTP layer sees them, with their endpoints."""

from __future__ import annotations

from dataclasses import asdict
from hashlib import blake2b
from typing import Annotated, Literal, Protocol

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from serve_app.api.responses import exact
from serve_app.api.schema import Body
from serve_app.core.experiments import Assignment, Caller, Choice, Feedback, Reports
from serve_app.core.tenants import ANYONE, Identity
from serve_app.errors import InvalidRequest, NotFound

SESSION_HEADER, VARIANT_HEADER = "x-session-id", "x-variant"
_LONGEST = 128


class Experiments(Protocol):
    """The experiments of the service."""

    def names(self) -> tuple[str, ...]:
        """The names that calls use in the place of a model's."""
        ...

    def choose(self, name: str, caller: Caller) -> Choice | None:
        """The variant for a caller; None if there is no experiment of this name. Raises InvalidRequest."""
        ...

    def called(self, request_id: str, model: str, assignment: Assignment | None, tenant: str = "") -> None:
        """Remember a call, for feedback."""
        ...

    async def take_feedback(self, feedback: Feedback) -> bool:
        """Count feedback; False if no ingress knows the call."""
        ...

    async def reports(self) -> Reports:
        """The reports of all experiments, over all ingresses."""
        ...


class NoExperiments:
    """A service without experiments, which takes no feedback."""

    def names(self) -> tuple[str, ...]:
        return ()

    def choose(self, name: str, caller: Caller) -> Choice | None:
        return None

    def called(self, request_id: str, model: str, assignment: Assignment | None, tenant: str = "") -> None:
        pass

    async def take_feedback(self, feedback: Feedback) -> bool:
        return False

    async def reports(self) -> Reports:
        return Reports(())


class FeedbackBody(Body):
    request_id: Annotated[str, Field(min_length=1, max_length=128)]
    """The `x-request-id` of the answer."""
    rating: Literal["up", "down"] | None = None
    """Whether the answer is good. Send either `rating` or `score`."""
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    """How good the answer is, from 0 to 1."""
    comment: Annotated[str, Field(max_length=2000)] = ""
    """Written to the log with the request's id."""

    def to_feedback(self, tenant: str) -> Feedback:
        """Raises InvalidRequest without a rating or a score, or with both."""
        if (self.rating is None) == (self.score is None):
            raise InvalidRequest("Send either 'rating' or 'score'.", param="rating")
        score = self.score if self.score is not None else float(self.rating == "up")
        return Feedback(self.request_id, score, self.comment, tenant)


@exact
class FeedbackTaken(TypedDict):
    """The feedback was counted."""

    request_id: str
    score: float


class ExperimentRoutes:
    def __init__(self, experiments: Experiments) -> None:
        self._experiments = experiments

    async def feedback(self, http: Request, document: object) -> Response:
        feedback = FeedbackBody.parse(document).to_feedback(identity_of(http).tenant)
        if not await self._experiments.take_feedback(feedback):
            raise NotFound(
                f"Request {feedback.request_id} is not known. The service remembers the latest requests of a day.",
                param="request_id",
            )
        body: FeedbackTaken = {"request_id": feedback.request_id, "score": feedback.score}
        return JSONResponse(body)

    async def reports(self, http: Request) -> Response:
        return JSONResponse(asdict(await self._experiments.reports()))


def user_of(body: Body) -> str:
    """The user that a body names: the first of `user`, `safety_identifier` and `metadata.user_id`; "" without one."""
    metadata = getattr(body, "metadata", None)
    given = (
        getattr(body, "user", None),
        getattr(body, "safety_identifier", None),
        metadata.get("user_id") if isinstance(metadata, dict) else None,
    )
    return next((name for name in given if isinstance(name, str) and name), "")


def caller_of(http: Request, user: str) -> Caller:
    """What a call says about its caller. Of a key that the service does not check only a digest is kept."""
    headers = http.headers
    key = headers.get("authorization") or headers.get("x-api-key") or ""
    return Caller(
        key=identity_of(http).key or (blake2b(key.encode(), digest_size=16).hexdigest() if key else ""),
        user=user,
        session=session_of(http),
        request=http.state.request_id,
        variant=headers.get(VARIANT_HEADER, ""),
    )


def session_of(http: Request) -> str:
    """Requests with the same session go to the same replica, as far as its load allows. Tenants share no sessions."""
    session, tenant = http.headers.get(SESSION_HEADER, "")[:_LONGEST], identity_of(http).tenant
    return f"{tenant}\0{session}" if session and tenant else session


def identity_of(http: Request) -> Identity:
    """Who sends a call. A service without keys serves everyone."""
    identity: Identity = getattr(http.state, "identity", ANYONE)
    return identity
