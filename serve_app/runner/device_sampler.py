"""Logits -> tokens on a GPU, without waiting for it. Knows sampling parameters and slots; the arithmetic is kernels/sampling.py.

Same order of operations, parameters and errors as runner/sampler.py. By design the tokens of a sampling row are others:
there one uniform number goes through the inverse CDF, here every token of the vocabulary has its own number and the
largest weight / exponential wins (the Gumbel argmax). Greedy rows, kept sets, edited logits and log-probabilities are
the same. Shapes: S rows that sample, V vocab, A rows that ask for log-probabilities.

    plan = sampler.prepare(sequences, positions)      host: parameters into plan.rows, int32 [S, 16]
    step = sampler.sample(logits_SV, plan)            launches only; step.token_ids stays on the device for the next step
    step.start_copy()                                 the device -> host copy, with an event behind it
    step.read() -> SampledTokens                      waits for the event; raises StepFailedError
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from serve_app.engine.request import TokenLogprobs
from serve_app.engine.sequence import Sequence
from serve_app.runner.sampler import SampledTokens


@dataclass
class SamplingPlan:
    """What a step's rows ask for, on the host."""

    sequences: list[Sequence]
    rows: npt.NDArray[np.int32]
    """[num_rows, 16], C order: the packed parameters. Goes to the device as it is (K4's packed copy, or sample's own)."""
    draws: bool
    """Some row is not greedy."""
    truncates: bool
    """Some row has top_k or top_p."""
    edits: bool
    """Some row edits its logits (penalties, bias, masks, min_tokens): not for a CUDA graph."""

    @property
    def is_plain(self) -> bool:
        """Nothing but kernels over fixed buffers: `DeviceSampler.launch` of it can be captured in a CUDA graph."""
        raise NotImplementedError


class SampledStep:
    """The results of one step, on the device until they are read."""

    token_ids: torch.Tensor
    """int32 [num_rows], on the device, contiguous. 0 in a row that failed or is padding."""

    def start_copy(self) -> None:
        """Queue the copy to the host on the current stream; returns at once. `read` does it if nobody did."""
        raise NotImplementedError

    def read(self) -> SampledTokens:
        """Waits. Raises StepFailedError naming the first request whose row has NaN, +inf or nothing allowed."""
        raise NotImplementedError


class PendingLogprobs:
    """Log-probabilities of given tokens (prompt_logprobs), on the device until they are read."""

    def read(self) -> list[TokenLogprobs]:
        raise NotImplementedError


class DeviceSampler:
    """``max_num_seqs``: slots, and the most rows of a step. ``device``: a CUDA device, or "cpu" in the interpreter."""

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device | str) -> None: ...

    def prepare(
        self,
        sequences: SequenceOf[Sequence],
        positions: SequenceOf[int] | None = None,
        masks: Mapping[int, npt.NDArray[np.bool_]] | None = None,
        num_rows: int | None = None,
    ) -> SamplingPlan:
        """Pack the parameters of a step; row i of its logits belongs to ``sequences[i]``.

        ``positions[i]``: the place the token will take, start + num_tokens of the scheduled sequence; by default
        len(token_ids). ``num_rows``: rows of the padded batch; those behind the sequences are greedy and ignored.
        Queues the copies that put a new sequence's state into its slot. Raises StepFailedError naming the request for a
        token id beyond the vocabulary.
        """
        raise NotImplementedError

    def sample(self, logits_SV: torch.Tensor, plan: SamplingPlan, rows: torch.Tensor | None = None) -> SampledStep:
        """Launch whatever the plan needs. ``rows``: plan.rows on the device, if the caller has copied it."""
        raise NotImplementedError

    def launch(
        self, logits_SV: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, *, draws: bool, truncates: bool
    ) -> None:
        """The launches of a plain plan, for capture in a CUDA graph: out int32 [2, S] = token ids, flags."""
        raise NotImplementedError

    def finish(self, plan: SamplingPlan, out: torch.Tensor) -> SampledStep:
        """The step of a plain plan whose `launch` (or its graph) has filled ``out``."""
        raise NotImplementedError

    def token_logprobs(
        self, logits_NV: torch.Tensor, rows: SequenceOf[int], token_ids: SequenceOf[int], num_top: SequenceOf[int]
    ) -> PendingLogprobs:
        """Log-probabilities of ``token_ids[i]`` in row ``rows[i]`` with the ``num_top[i]`` likeliest tokens."""
        raise NotImplementedError

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile every variant for logits of that type, so that no step compiles anything."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Device memory that may still be allocated when somebody first asks for edits: to be kept free."""
        raise NotImplementedError
