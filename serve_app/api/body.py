"""The JSON document of a request body. Whatever cannot be read is the caller's fault, with a sentence that says why."""

from __future__ import annotations

import json
from typing import NoReturn

from starlette.requests import Request

from serve_app.errors import InvalidRequest

# Up to here a double is a whole number as written.
_EXACT = 2**53


async def read_document(http: Request) -> object:
    """The parsed body, whatever its content type says. Raises InvalidRequest, BodyTooLarge."""
    return parse_document(await http.body())


def parse_document(body: bytes) -> object:
    """Strict JSON in UTF-8; a byte order mark before it is ignored. Raises InvalidRequest."""
    try:
        text = body.decode("utf-8-sig")
        document: object = json.loads(text, parse_constant=_not_json, parse_float=_number)
        if "\\u" in text:
            # Half of a surrogate pair passes the parser but can never be tokenised or answered in UTF-8.
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("the body holds half of a \\u surrogate pair; send whole characters") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 (byte {error.start}); encode it as UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply; send a flat JSON object") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON ({error}); send one JSON object") from None
    except ValueError:  # Python's bound on the digits of one integer
        raise InvalidRequest("the body holds an integer of thousands of digits; no field takes that many") from None
    return document


def _number(text: str) -> float | int:
    """A whole number is an integer in JSON Schema, however it is written."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) <= _EXACT else number


def _not_json(constant: str) -> NoReturn:
    raise InvalidRequest(f"the body is not valid JSON ({constant} is not a JSON number); send a finite number")
