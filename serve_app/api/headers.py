"""Headers of a request that have an effect: names, meanings, and the values that one may have. Knows no request model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from serve_app.errors import InvalidParameterError

RESUMABLE_HEADER = "X-Resumable"
EVENT_ID_HEADER = "Last-Event-ID"
TIMEOUT_HEADER = "X-Request-Timeout-Ms"
MAX_TIMEOUT_MS = 10**9

HEADERS: Mapping[str, str] = {
    "Authorization": "`Bearer <key>`, or the key in `X-Api-Key`, where the server asks for one.",
    "X-Request-Id": "Names the request in logs and in the answer, where it comes back. Made up if it is missing.",
    TIMEOUT_HEADER: "Milliseconds after which nobody wants the answer. What cannot be done in time is refused at once with"
    " 429 and Retry-After where requests wait for room; what is not done in time is ended and its KV cache freed: 504,"
    " or an error event where the stream has begun. Both say so in `code`: `overloaded`, `deadline_exceeded`.",
    RESUMABLE_HEADER: "`1`: the client may come back to this stream. Each event has an `id`, and what is generated is kept"
    " for a while after the stream has ended or the client has gone. Only with `stream`. `0`: as without the header.",
    EVENT_ID_HEADER: "The `id` of the last event that the client has: the answer goes on behind it. Body, key and path must"
    " be those of the first request, byte for byte; any ingress will do. 400: no id of this server; 404: another body or"
    " key; 410: nothing is kept any more; 409, or an error event `stream_resumed`: a later resume has it; 503: a replica"
    " that may keep it does not answer.",
}
"""Headers of a request that have an effect."""


def timeout_ms(given: str | None) -> float | None:
    """TIMEOUT_HEADER's milliseconds. Raises InvalidParameterError."""
    if given is None:
        return None
    if re.fullmatch(r"[0-9]{1,10}", given) is None or not 1 <= int(given) <= MAX_TIMEOUT_MS:
        raise InvalidParameterError(TIMEOUT_HEADER, given, f"a whole number of milliseconds from 1 to {MAX_TIMEOUT_MS}")
    return float(given)
