"""Sequence: the engine's only mutable request state. Only the scheduler changes one; everything else reads.

    token_ids  [ prompt ........ | output ..... ]  + num_pending sampled, not yet read
               ^0      ^num_computed_tokens      ^num_tokens
               [ in the KV cache |  missing      )

There are no phases. ``num_computed_tokens`` (in the cache, or in a launched step) catches up with ``num_tokens``
(known); a decode is the case where one token is missing.
"""

from __future__ import annotations

import enum

from serve_app.engine.pooling import Pooled
from serve_app.engine.request import FinishReason, GenerateRequest, TokenLogprobs


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One choice of one request inside an engine."""

    __slots__ = (
        "block_hashes",
        "block_ids",
        "deadline",
        "finish_reason",
        "followers",
        "grammar",
        "key",
        "leader",
        "max_output_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_highwater_tokens",
        "num_pending",
        "num_pooled_tokens",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_shared_tokens",
        "num_skipped",
        "order",
        "pooled",
        "prompt_logprobs",
        "queued_at",
        "request",
        "slot",
        "status",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: GenerateRequest,
        *,
        arrival: int,
        max_output_tokens: int,
        stop_ids: frozenset[int],
        deadline: float | None,
    ) -> None:
        self.request = request
        self.key = (request.request_id, request.choice_index)
        """What names this sequence everywhere: (request_id, choice_index)."""
        self.order = (request.priority, arrival, request.choice_index)
        """Sort key: lower runs first. The choices of one request arrive together."""
        self.deadline = deadline
        """Monotonic seconds by which it must have ended, or None."""
        self.stop_ids = stop_ids
        self.grammar: object | None = None
        """What the runner made of the request's grammar."""
        self.max_output_tokens = max_output_tokens

        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.token_ids: list[int] = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_pending = 0
        """Tokens sampled by launched steps whose results have not been read yet; of a request with pooling, its vector."""
        self.num_computed_tokens = 0
        self.num_highwater_tokens = 0
        """Most tokens ever computed; what is scheduled below it is recomputation."""

        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        """Chained hashes of the leading full blocks of token_ids, as far as computed."""
        self.num_registered_blocks = 0
        """Leading blocks whose content the pool knows by hash (or has found under another block)."""
        self.num_shared_tokens = 0
        """Leading tokens whose KV lies in blocks shared with others: read, never written."""
        self.num_cached_tokens = 0
        """Prompt tokens found in the prefix cache at first admission."""
        self.leader: Sequence | None = None
        """The choice that computes the common prompt; set until this one takes a copy of its blocks."""
        self.followers: list[Sequence] = []
        """The choices whose leader this is."""

        self.status = SequenceStatus.WAITING
        self.slot = -1
        """Place in the batch, 0 <= slot < max_num_seqs, while RUNNING."""
        self.finish_reason: FinishReason | None = None
        self.num_preemptions = 0
        self.queued_at: float | None = None
        """Monotonic seconds at which it began to wait for its first step; None since then."""
        self.num_skipped = 0
        """Requests admitted past this one while it waited for room."""
        self.num_prompt_logprobs = 0
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.pooled: Pooled | None = None
        """Of a request with pooling: what the chunks gave that were read."""
        self.num_pooled_tokens = 0
        """Prompt tokens that are in it."""

    @property
    def num_tokens(self) -> int:
        """Known tokens, those still pending included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_missing_tokens(self) -> int:
        """Known tokens that are not in the cache: 1 for a decode, 0 while a launched step samples the last one."""
        return len(self.token_ids) + self.num_pending - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        request_id, choice = self.key
        return (
            f"Sequence({request_id}#{choice} {self.status.value} computed {self.num_computed_tokens}"
            f" of {self.num_tokens}, {len(self.block_ids)} blocks)"
        )
