"""Turns the token ids of one answer into text: whole characters, and never a part of a stop string."""

from __future__ import annotations

from serve_app.engines.text.overlap import overlap
from serve_app.engines.text.protocol import Decoder


class Detokenizer:
    """Decodes one sequence and searches for its stop strings across token borders.

    Text is held back only while it can still become a stop string. With `include_stop` the text ends with the stop
    string that ended it; of several that begin at the same character, the shortest one.
    """

    def __init__(self, decoder: Decoder, stop: tuple[str, ...], include_stop: bool = False) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, str | None]:
        """The text to send now, and the stop string that ended the text, or None.

        Text after a stop string is dropped. With `may_stop` false, a stop string is ordinary text.
        """
        text = self._held + self._decoder.step(token_id)
        self._held = ""
        if not self._stop:
            return text, None
        if may_stop:
            found = [(text.find(stop), len(stop)) for stop in self._stop if stop in text]
            if found:
                start, length = min(found)
                end = start + length
                return text[: end if self._include_stop else start], text[start:end]
        keep = max(overlap(text, stop) for stop in self._stop)
        if keep:
            self._held = text[-keep:]
            text = text[:-keep]
        return text, None

    def flush(self) -> str:
        """The text still held back; called after the last token."""
        text, self._held = self._held, ""
        return text
