"""From token ids to text that can be sent: whole characters, and never a part of a stop string."""

from __future__ import annotations

from serve_app.engines.text.overlap import overlap
from serve_app.engines.text.protocol import Decoder


class Detokenizer:
    """Decodes one sequence and looks for its stop strings across token borders.

    Text is held back only while it can still become a stop string. With `include_stop` the one that ends the text is
    its end, of several that begin at the same place the shortest.
    """

    def __init__(self, decoder: Decoder, stop: tuple[str, ...], include_stop: bool = False) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, str | None]:
        """The text to send now, and the stop string if one was met (all after it is dropped, and it as well or not).

        With `may_stop` false, a stop string is text like any other.
        """
        text = self._held + self._decoder.step(token_id)
        self._held = ""
        if not self._stop:
            return text, None
        if may_stop:
            found = [(text.find(stop), len(stop)) for stop in self._stop if stop in text]
            if found:
                at, length = min(found)
                end = at + length
                return text[: end if self._include_stop else at], text[at:end]
        keep = max(overlap(text, stop) for stop in self._stop)
        if keep:
            self._held = text[-keep:]
            text = text[:-keep]
        return text, None

    def flush(self) -> str:
        """The text still held back, once no stop string can follow."""
        text, self._held = self._held, ""
        return text
