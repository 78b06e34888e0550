"""Options out of their ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest

from serve_app.errors import (
    ConfigurationError,
)
from serve_app.routing.ledger_options import LedgerOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "hope"),
        ("max_queued_requests", -1),
        ("max_queued_requests", True),
        ("max_queued_tokens", 1.5),
        ("max_queue_seconds", 0),
        ("lease_seconds", math.inf),
        ("submit_seconds", math.nan),
        ("replica_seconds", 11.0),
    ],
)
def test_wrong_options_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} is {value!r}; it must be "):
        LedgerOptions(**{name: value})
