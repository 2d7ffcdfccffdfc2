"""Why a sequence cannot be computed, and the error that its request gets."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.engines.protocol import Cause
from serve_app.errors import InternalError, ServeAppError

# Parts of the messages of RuntimeErrors that mean a failed allocation: of PyTorch's CPU allocator, of the C++ standard
# library and of cuBLAS. torch.OutOfMemoryError is found by its name, because this module does not import torch.
_MEMORY_TEXTS = ("DefaultCPUAllocator", "std::bad_alloc", "ALLOC_FAILED")


@dataclass(frozen=True, slots=True)
class Failure:
    """Ends one sequence: the cause, which is counted, and the error of its request."""

    cause: Cause
    error: ServeAppError


def cause_of(error: BaseException) -> Cause:
    """The cause that an exception of the model means."""
    if isinstance(error, FloatingPointError):
        return Cause.NOT_FINITE
    named = any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)
    if named or isinstance(error, MemoryError) or any(text in str(error) for text in _MEMORY_TEXTS):
        return Cause.MEMORY
    return Cause.ERROR


def failure(cause: Cause) -> Failure:
    """The failure of a sequence that the model cannot compute."""
    match cause:
        case Cause.MEMORY:
            message = "the memory of this replica does not suffice for this request; send a shorter one, or try later"
        case Cause.NOT_FINITE:
            message = (
                "the model computed NaN or infinite numbers for this request; the precision of the model may not "
                "suffice for this text"
            )
        case Cause.ERROR:
            message = "the model failed on this request"
    return Failure(cause, InternalError(message))
