"""StopStrings: cuts a growing text at the first stop string. Knows characters; knows no tokens.

text so far    [ given out ........ | held back ]       held back: the longest end of the text that is the
stop "END"       Hello, this is the   EN                beginning of a stop string
"""

from __future__ import annotations


class StopStrings:
    """Looks for stop strings in a text that comes in pieces, and never gives out a part of one before it is sure.

    After each piece the text is searched as a whole: of the stop strings that stand in it, the one that begins first
    wins, the longest of those that begin together. A match is taken as soon as it is there; it does not wait for a longer
    or an earlier one that a later piece might complete. So for the same answer always push the same pieces: TextStream
    pushes token by token.
    """

    def __init__(self, stop: tuple[str, ...], include_in_output: bool = False) -> None:
        self._stop = stop
        self._include_in_output = include_in_output
        self._held = ""

    def push(self, text: str, may_match: bool = True) -> tuple[str, str | None]:
        """Takes the next piece. Returns (text that is safe to show, the stop string that matched or None).

        After a match the text is over: what followed the match is dropped, and nothing more may be pushed.
        With ``may_match=False`` stop strings that this piece completes are let through (min_tokens).
        """
        if not self._stop:
            return text, None
        buffer = self._held + text
        found = self._find(buffer, len(self._held)) if may_match and text else None
        if found is not None:
            start, string = found
            self._held = ""
            return buffer[: start + len(string) if self._include_in_output else start], string
        num_held = max(_num_held(buffer, string) for string in self._stop)
        num_shown = len(buffer) - num_held
        self._held = buffer[num_shown:]
        return buffer[:num_shown], None

    def flush(self) -> str:
        """Ends the text: returns what was held back, since nothing can complete it now."""
        held, self._held = self._held, ""
        return held

    def _find(self, buffer: str, num_old: int) -> tuple[int, str] | None:
        """(start, stop string) of the first match that ends after the ``num_old`` characters that were searched before.

        Those can hold a whole stop string only if it came while matching was off, and then it stays unmatched.
        """
        best: tuple[int, int] | None = None
        for string in self._stop:
            start = buffer.find(string, max(0, num_old - len(string) + 1))
            if start >= 0 and (best is None or (start, -len(string)) < best):
                best = (start, -len(string))
        return None if best is None else (best[0], buffer[best[0] : best[0] - best[1]])


def _num_held(buffer: str, string: str) -> int:
    """Length of the longest end of ``buffer`` that is a beginning of ``string``, the whole of it excluded."""
    start = max(0, len(buffer) - len(string) + 1)
    while (start := buffer.find(string[0], start)) >= 0:
        if string.startswith(buffer[start:]):
            return len(buffer) - start
        start += 1
    return 0
