"""Tests of tests: a fault is planted, and one check must notice it by name. Has no tests itself."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

Patch = pytest.MonkeyPatch
Check = Callable[[Patch], None]
"""Runs something that the fault spoils. Passes without it."""
Fault = tuple[Callable[[Patch], None], Check, str]
"""What plants it, the check, and how the check's message begins (a regular expression)."""


def scenario(test: Callable[..., None], *args: object) -> Check:
    """A test function as a check."""

    def check(patch: Patch) -> None:
        test(*args)

    check.__name__ = test.__name__
    return check


def expect_noticed(fault: Fault, patch: Patch) -> None:
    """Plants the fault; its check must fail, and with its own message."""
    plant, check, named = fault
    plant(patch)
    with pytest.raises(AssertionError) as failure:
        check(patch)
    assert re.match(named, str(failure.value), re.DOTALL), f"another check failed: {failure.value}"
