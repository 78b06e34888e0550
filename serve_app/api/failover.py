"""Failover: how long a stream is moved from replica to replica, and which request is the one that kills them. Knows no
lease, no channel, no text.

A stream that has lost its replica is *moving* until its next token has come. It may move for max_seconds at a time and
lose max_losses replicas in all; then its client hears an error.

A request may be the reason why replicas die. Nobody can tell that from one death: every request on the replica was there.
But who is to blame does not get past the place where it happens. So deaths are counted that a request saw in a row without
getting TRIAL_TOKENS further. After SUSPECT_AFTER it goes on *on trial*: of all suspects of an ingress one at a time, until
it has got further. A replica that dies meanwhile speaks against this one request; after MAX_DEATHS_ON_TRIAL in a row it is
refused, alone. The others have lost a few seconds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

from serve_app.errors import EngineUnavailableError, ReplicaKillerError, ReplicaLostError

SUSPECT_AFTER = 2
MAX_DEATHS_ON_TRIAL = 3
"""More than chance does: a machine may lose replicas for other reasons while a suspect runs."""
TRIAL_TOKENS = 4
"""Of each choice: steps that may have been under way when a replica died, and a few more."""
KINDS = (
    *("lost", "resumed", "trials", "replica_killers", "given_up"),
    *("resumed_with_other_numerics", "resumed_in_fast_mode", "came_back"),
)
"""What happens to streams: lost and resumed count each time, and of the resumed ones those with other numerics or in fast
mode (a valid continuation, perhaps not the same bytes). came_back: a client that had lost its connection."""


@dataclass(frozen=True)
class FailoverLimits:
    """How far a stream is carried."""

    max_seconds: float = 60.0
    """From the loss of a replica to the next token."""

    max_losses: int = 32
    """Replicas that one request may lose."""


class Failover:
    """What the streams of one ingress share. For one event loop."""

    def __init__(self, limits: FailoverLimits | None = None) -> None:
        self.limits = limits or FailoverLimits()
        self.counters: Counter[str] = Counter()
        """By kind."""
        self.trial = asyncio.Lock()


class Journey:
    """One stream's way through replicas. ``num_tokens`` everywhere: what its reader has, of all choices."""

    def __init__(self, failover: Failover, num_choices: int = 1) -> None:
        self.is_moving = False
        """It is not yet past the place where it lost a replica: `progress` wants to know of tokens."""
        self.num_losses = 0
        self._failover = failover
        self._trial_tokens = TRIAL_TOKENS * num_choices
        self._num_deaths = 0
        """In a row, without getting further."""
        self._num_deaths_on_trial = 0
        self._num_tokens_at_loss = 0
        self._since: float | None = None
        """Of the first loss since its last token: seconds of the loop."""
        self._is_on_trial = False
        self._is_lost = False
        """No token has come since."""

    @property
    def seconds_left(self) -> float | None:
        """For the next token. None: nothing was lost."""
        if self._since is None:
            return None
        return self._since + self._failover.limits.max_seconds - asyncio.get_running_loop().time()

    async def begin_attempt(self) -> None:
        """Before a lease is asked for. A suspect waits for its turn here. Raises EngineUnavailableError at the bound."""
        if self._num_deaths < SUSPECT_AFTER:
            return
        try:
            async with asyncio.timeout(self.seconds_left):
                await self._failover.trial.acquire()
        except TimeoutError:
            raise self.give_up("other requests that may kill replicas were before it") from None
        self._is_on_trial = self.is_moving = True
        self._failover.counters["trials"] += 1

    def progress(self, num_tokens: int) -> bool:
        """Tokens have come. Call it while `is_moving`. Returns whether they are the first ones since a loss."""
        self._since = None
        is_first, self._is_lost = self._is_lost, False
        if is_first:
            self._failover.counters["resumed"] += 1
        if num_tokens >= self._num_tokens_at_loss + self._trial_tokens:
            self._num_deaths = self._num_deaths_on_trial = 0
            self.is_moving = False
            self.end_attempt()
        return is_first

    def end_attempt(self) -> None:
        """However it ended."""
        if self._is_on_trial:
            self._is_on_trial = False
            self._failover.trial.release()

    def lost(self, error: ReplicaLostError, num_tokens: int) -> None:
        """Its replica is lost. Raises the error for the client if this was once too often. Ends the attempt."""
        counters = self._failover.counters
        was_on_trial = self._is_on_trial
        self.end_attempt()
        self.hindered()
        counters["lost"] += 1
        self._is_lost = True
        if not error.may_be_a_death:
            return
        self.num_losses += 1
        self._num_deaths += 1
        self._num_deaths_on_trial += was_on_trial
        self._num_tokens_at_loss = num_tokens
        if self._num_deaths_on_trial >= MAX_DEATHS_ON_TRIAL:
            counters["replica_killers"] += 1
            raise ReplicaKillerError(
                f"{self._num_deaths} replicas in a row died at the same place of this request,"
                f" {self._num_deaths_on_trial} of them with no other request in suspicion; it is not tried again"
            ) from error
        if self.num_losses >= self._failover.limits.max_losses:
            raise self.give_up(f"it has lost {self.num_losses} replicas, and the limit is that") from error

    def hindered(self) -> None:
        """It must be placed again, and time counts from now, if it does not already."""
        self.is_moving = True
        if self._since is None:
            self._since = asyncio.get_running_loop().time()

    def check_time(self, reason: object) -> None:
        """Raises EngineUnavailableError when the time for the next token is over."""
        left = self.seconds_left
        if left is not None and left <= 0:
            raise self.give_up(str(reason))

    def give_up(self, reason: str) -> EngineUnavailableError:
        self._failover.counters["given_up"] += 1
        seconds = self._failover.limits.max_seconds
        return EngineUnavailableError(
            f"this request has lost {self.num_losses} replicas and cannot go on within {seconds:g} s: {reason}"
        )
