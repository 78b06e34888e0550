"""Server-sent events as the load clients read them: where one ends, and what its `data` says. Knows no socket and no JSON.
Uses the standard library alone.
"""

from __future__ import annotations

DONE = b"[DONE]"
_END = b"\n\n"


def data_of(event: bytes) -> bytes | None:
    """What stands behind ``data: `` in one event; None without. What is before it (an id, a chunk's size) is left out."""
    at = event.find(b"data: ")
    return None if at < 0 else event[at + 6 :].split(b"\n", 1)[0]


class EventReader:
    """Puts events together from pieces that may end anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that is whole with this piece."""
        *events, self._rest = (self._rest + piece).split(_END)
        return [data for event in events if (data := data_of(event)) is not None]
