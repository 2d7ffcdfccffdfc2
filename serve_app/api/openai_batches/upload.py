"""Reads the multipart/form-data body of an upload, in bounded memory: the file is spooled to the disk."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve_app.errors import InvalidRequest

# Of one upload: fields beside the file, and bytes of each.
_MAX_FIELDS, _MAX_FIELD_BYTES = 16, 4096
_MAX_NAME = 255
# OpenAI's bounds of `expires_after[seconds]`.
_SHORTEST_S, _LONGEST_S = 3600, 2_592_000
_FIELDS = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}


@dataclass(frozen=True, slots=True)
class Upload:
    """An uploaded file. `expires_after_s` is None unless the caller has set it. Its `file` must be closed."""

    file: UploadFile
    filename: str
    purpose: str
    expires_after_s: int | None


async def read_upload(http: Request) -> Upload:
    """The upload in a body. Raises InvalidRequest, BodyTooLarge, RequestTimeout."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequest("Send the file as multipart/form-data, with the fields 'file' and 'purpose'.")
    parser = MultiPartParser(
        http.headers, http.stream(), max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"The body is not valid multipart/form-data: {error.message}") from None
    try:
        return _upload(form)
    except InvalidRequest:
        with suppress(OSError):
            await form.close()
        raise


def _upload(form: FormData) -> Upload:
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise InvalidRequest("Field 'file' is required, and should be a file.", param="file")
    if purpose != "batch":
        raise InvalidRequest("Field 'purpose' should be 'batch'.", param="purpose")
    if unknown := sorted(form.keys() - _FIELDS - {"file"}):
        raise InvalidRequest(f"Unknown field '{unknown[0][:64]}'. Known fields: file, {', '.join(sorted(_FIELDS))}.")
    filename = re.sub(r"[^\w .()+,=@-]", "_", file.filename or "").strip()[:_MAX_NAME]
    return Upload(file, filename or "file.jsonl", purpose, _expires_after(form))


def _expires_after(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("Field 'expires_after.anchor' should be 'created_at'.", param="expires_after.anchor")
    if not (isinstance(seconds, str) and re.fullmatch("[0-9]{1,8}", seconds)):
        raise InvalidRequest("Field 'expires_after.seconds' should be a number.", param="expires_after.seconds")
    if not _SHORTEST_S <= int(seconds) <= _LONGEST_S:
        raise InvalidRequest(
            f"Field 'expires_after.seconds' should be from {_SHORTEST_S} to {_LONGEST_S}.",
            param="expires_after.seconds",
        )
    return int(seconds)
