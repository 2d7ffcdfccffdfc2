"""The text of an API key: `sk-serve-<id>-<secret>`. The id is public; of the secret only a digest is stored."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from dataclasses import dataclass

PREFIX = "sk-serve-"
_ALPHABET = string.ascii_letters + string.digits
# 12 hexadecimal digits name a key; 43 of 62 characters are 256 random bits, so that a fast digest cannot be reversed.
_ID_BYTES, _SECRET_LENGTH = 6, 43
_FORM = re.compile(rf"{PREFIX}([0-9a-f]{{{2 * _ID_BYTES}}})-([A-Za-z0-9]{{{_SECRET_LENGTH}}})")


@dataclass(frozen=True, slots=True)
class ApiKey:
    id: str
    secret: str

    def __str__(self) -> str:
        return f"{PREFIX}{self.id}-{self.secret}"

    def __repr__(self) -> str:
        """Without the secret, which must not be in logs."""
        return f"ApiKey({self.id!r})"

    @property
    def digest(self) -> str:
        """The SHA-256 of the secret in hexadecimal digits."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


# A key that no service has, with the form of a key.
NO_KEY = ApiKey("0" * 2 * _ID_BYTES, "0" * _SECRET_LENGTH)


def new_key() -> ApiKey:
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_LENGTH))
    return ApiKey(secrets.token_hex(_ID_BYTES), secret)


def parse_key(text: str) -> ApiKey | None:
    """None if the text does not have the form of a key."""
    found = _FORM.fullmatch(text)
    return None if found is None else ApiKey(found[1], found[2])
