"""The replicas that Ray Serve lists now, as this process last heard. Written by TargetedRouter, read by the ingress.

A module of its own, since Serve pickles TargetedRouter's module by value: its globals would be copies.
"""

from __future__ import annotations

_current: tuple[str, ...] = ()


def replace(replica_ids: tuple[str, ...]) -> None:
    """May be called on any thread."""
    global _current
    _current = replica_ids


def current() -> list[str]:
    return list(_current)
