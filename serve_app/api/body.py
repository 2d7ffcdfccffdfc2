"""Reads the JSON document of a request body. A body that cannot be read is an InvalidRequest with the reason."""

from __future__ import annotations

import json
from typing import NoReturn

from starlette.requests import Request

from serve_app.errors import InvalidRequest

# A double represents every whole number up to this one exactly.
_EXACT = 2**53


async def read_document(http: Request) -> object:
    """The parsed body, whatever its content type is. Raises InvalidRequest, BodyTooLarge, RequestTimeout."""
    return parse_document(await http.body())


def parse_document(body: bytes) -> object:
    """Strict JSON in UTF-8; a byte order mark at the beginning is ignored. Raises InvalidRequest."""
    try:
        text = body.decode("utf-8-sig")
        document: object = json.loads(text, parse_constant=_not_json, parse_float=_number)
        if "\\u" in text:
            # The parser accepts half of a surrogate pair, but no tokenizer and no UTF-8 answer can hold it.
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("The body contains half of a \\u surrogate pair. Send whole characters.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 (byte {error.start}). Encode it as UTF-8.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply. Send a flat JSON object.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON ({error}). Send one JSON object.") from None
    except ValueError:  # Python's bound on the digits of one integer
        raise InvalidRequest("The body contains an integer of thousands of digits. Send a smaller number.") from None
    return document


def _number(text: str) -> float | int:
    """JSON Schema takes a whole number as an integer, also if it is written with a fraction or an exponent."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) <= _EXACT else number


def _not_json(constant: str) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {constant} is not a JSON number. Send a finite number.")
