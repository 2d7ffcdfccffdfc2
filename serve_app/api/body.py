"""Reads the JSON document of a request body. A body that cannot be read is an InvalidRequest with the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import NoReturn

from starlette.requests import Request

from serve_app.errors import InvalidRequest

# A double represents every whole number up to this one exactly.
_EXACT = 2**53
# Tool schemas of real clients have up to 20 levels. Python's parser, encoder and pydantic fail at about 1,000.
_MAX_DEPTH = 128


async def read_document(http: Request) -> object:
    """The parsed body, whatever its content type is. Raises InvalidRequest, BodyTooLarge, RequestTimeout."""
    return parse_document(await http.body())


def parse_document(body: bytes) -> object:
    """Strict JSON in UTF-8; a byte order mark at the beginning is ignored. Raises InvalidRequest.

    Parsers disagree about an object that has a key twice, and about numbers beyond the range of a double. Therefore
    both are refused: a proxy that checks requests could see another request than the service.
    """
    try:
        text = body.decode("utf-8-sig")
        document: object = json.loads(
            text, parse_constant=_not_json, parse_float=_number, object_pairs_hook=_without_duplicates
        )
        if text.count("[") + text.count("{") > _MAX_DEPTH and _is_deeper(document, _MAX_DEPTH):
            raise RecursionError
        if "\\u" in text:
            # The parser accepts half of a surrogate pair, but no tokenizer and no UTF-8 answer can hold it.
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("The body contains half of a \\u surrogate pair. Send whole characters.") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 (byte {error.start}). Encode it as UTF-8.") from None
    except RecursionError:
        raise InvalidRequest(
            f"The body is nested too deeply. Send a flat JSON object; {_MAX_DEPTH} levels are allowed."
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON ({error}). Send one JSON object.") from None
    except ValueError:  # Python's bound on the digits of one integer
        raise InvalidRequest("The body contains an integer of thousands of digits. Send a smaller number.") from None
    return document


def _number(text: str) -> float | int:
    """JSON Schema takes a whole number as an integer, also if it is written with a fraction or an exponent."""
    number = float(text)
    if math.isinf(number):
        raise InvalidRequest(f"The body contains the number {text[:32]}, which is out of range. Send a smaller number.")
    return int(number) if number.is_integer() and abs(number) <= _EXACT else number


def _not_json(constant: str) -> NoReturn:
    raise InvalidRequest(f"The body is not valid JSON: {constant} is not a JSON number. Send a finite number.")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        unseen = set(members)
        for key, _ in pairs:
            if key not in unseen:
                raise InvalidRequest(f"The body has an object with the key {key[:64]!r} twice. Send each key once.")
            unseen.remove(key)
    return members


def _is_deeper(document: object, levels: int) -> bool:
    """Whether a list or an object that is not empty is in more than this number of others."""
    level = [document]
    for _ in range(levels):
        level = [child for parent in level for child in _members(parent) if child and isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _members(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
