"""SimulatedRunner: a Runner with a cost model and scripted tokens. The whole service without weights or torch.

It keeps a KV cache of its own, in which the entry of a position is a digest of every token up to it, read and written
through the block tables it is given. A token, and a hidden state, depends on the digest before it, so a lost block, a
wrong slot, a skipped token or a block shared with the wrong prefix changes the output, as it would with a real model.
With ``verify`` every entry behind a token is read, as attention does, and one that is not the sequence's own raises.

Cost of a step in seconds: ``a + b * tokens + c * sum(query_len * kv_len)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import numpy as np

from serve_app.engine.pooling import FRACTION_BITS, Pooled
from serve_app.engine.request import TokenLogprobs
from serve_app.engine.scheduler import Key, ScheduledSequence, SchedulerOutput
from serve_app.engine.sequence import Sequence
from serve_app.errors import UnsupportedParameterError

_MASK = (1 << 64) - 1
_ROOT = 0x243F6A8885A308D3
_EMPTY = 0
"""What a slot holds before anybody writes it, and what no digest is."""

Script = Callable[[Sequence, int], int]
"""(sequence, index of the output token) -> token id."""


class VirtualClock:
    """Monotonic seconds that pass only when somebody computes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SimulatedRunner:
    """``script`` chooses the tokens (by default a digest of the prefix does). ``sleep`` spends a step's cost."""

    has_position_classes = False
    hidden_size = 16

    def __init__(
        self,
        *,
        num_kv_blocks: int = 1024,
        block_size: int = 32,
        max_model_len: int = 4096,
        vocab_size: int = 32000,
        eos_token_ids: frozenset[int] = frozenset(),
        seconds_per_step: float = 0.0,
        seconds_per_token: float = 0.0,
        seconds_per_pair: float = 0.0,
        script: Script | None = None,
        sleep: Callable[[float], None] = time.sleep,
        max_steps_in_flight: int = 1,
        verify: bool = False,
    ) -> None:
        self.num_kv_blocks = num_kv_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.max_steps_in_flight = max_steps_in_flight
        self.seconds_per_step = seconds_per_step
        self.seconds_per_token = seconds_per_token
        self.seconds_per_pair = seconds_per_pair
        self.script = script
        self.sleep = sleep
        self.verify = verify
        self.num_steps = 0
        self._cache = np.full((num_kv_blocks, block_size), _EMPTY, dtype=np.uint64)
        self._sampled: dict[Key, tuple[int, int]] = {}
        """Sequence -> (position, token) sampled by the last launched step: on a GPU this never leaves the device."""

    def cost(self, plan: SchedulerOutput) -> float:
        """Seconds the step takes."""
        pairs = sum(item.num_tokens * (item.start + item.num_tokens) for item in plan.scheduled)
        return self.seconds_per_step + self.seconds_per_token * plan.num_tokens + self.seconds_per_pair * pairs

    def compile_grammar(self, text: str) -> object:
        if self.script is not None:
            return text  # what a script says is its own affair
        raise UnsupportedParameterError("grammar", "needs a model: the simulated runner has no logits to mask")

    def launch(self, plan: SchedulerOutput) -> SimulatedStep:
        self.num_steps += 1
        for source, destination in plan.block_copies:
            self._cache[destination] = self._cache[source]
        step = SimulatedStep(self.cost(plan), self.sleep)
        sampled: dict[Key, tuple[int, int]] = {}
        for item in plan.scheduled:
            sequence = item.sequence
            digest = self._compute(item, step)
            if item.samples:
                end = item.start + item.num_tokens
                token = self._sample(sequence, end, digest)
                sampled[sequence.key] = (end, token)
                if (num_top := sequence.request.sampling.logprobs) is not None:
                    step.logprobs[len(step.sampled)] = self._logprobs(digest, token, num_top)
                step.sampled.append(token)
        self._sampled = sampled
        return step

    def _compute(self, item: ScheduledSequence, step: SimulatedStep) -> int:
        """Writes the digests of the scheduled positions and returns the last one."""
        sequence = item.sequence
        digest = int(self._read(sequence, item.start - 1)) if item.start else _ROOT
        if self.verify:
            self._check_context(sequence, item.start)
        num_top = sequence.request.sampling.prompt_logprobs
        prompt_logprobs = []
        pooled: Pooled | None = None
        for position in range(item.start, item.start + item.num_tokens):
            digest = _mix(digest, self._token_at(sequence, position))
            if position >= sequence.num_shared_tokens:
                self._write(sequence, position, digest)
            if num_top is not None and position + 1 < sequence.num_prompt_tokens:
                prompt_logprobs.append(self._logprobs(digest, sequence.token_ids[position + 1], num_top))
            if sequence.request.pooling is not None:
                row = self._hidden_state(digest)
                if sequence.request.pooling.kind == "mean":
                    row = row.astype(np.int64) << FRACTION_BITS
                    pooled = row if pooled is None else pooled + row
                elif position == sequence.num_prompt_tokens - 1:
                    pooled = row
        if prompt_logprobs:
            step.prompt_logprobs[sequence.key] = prompt_logprobs
        if pooled is not None:
            step.embeddings[sequence.key] = pooled
        return digest

    def _sample(self, sequence: Sequence, position: int, digest: int) -> int:
        if self.script is not None:
            return self.script(sequence, position - sequence.num_prompt_tokens)
        draw = _mix(digest, _mix(sequence.request.sampling.seed or 0, sequence.request.choice_index))
        token = draw % self.vocab_size
        if position - sequence.num_prompt_tokens < sequence.request.sampling.min_tokens:
            while token in sequence.stop_ids:
                token = (token + 1) % self.vocab_size
        return token

    def _hidden_state(self, digest: int) -> Pooled:
        """float32 [hidden_size]: whole numbers from -8 to 7."""
        return np.array([_mix(digest, i) % 16 - 8 for i in range(self.hidden_size)], dtype=np.float32)

    def _logprobs(self, digest: int, token_id: int, num_top: int) -> TokenLogprobs:
        """Made up, but of one piece: token ``digest % V`` is the likeliest, each next one an eighth of a nat less."""
        first = digest % self.vocab_size
        top = tuple(((first + i) % self.vocab_size, -(i + 1) / 8) for i in range(min(num_top, self.vocab_size)))
        return TokenLogprobs(token_id, -((token_id - first) % self.vocab_size + 1) / 8, top)

    def _token_at(self, sequence: Sequence, position: int) -> int:
        if position < len(sequence.token_ids):
            return sequence.token_ids[position]
        at, token = self._sampled.get(sequence.key, (-1, -1))
        assert at == position, f"{sequence} needs token {position}, the device holds token {at}"
        return token

    def _read(self, sequence: Sequence, position: int) -> np.uint64:
        value: np.uint64 = self._cache[sequence.block_ids[position // self.block_size], position % self.block_size]
        return value

    def _write(self, sequence: Sequence, position: int, digest: int) -> None:
        self._cache[sequence.block_ids[position // self.block_size], position % self.block_size] = digest

    def _check_context(self, sequence: Sequence, num_tokens: int) -> None:
        digest = _ROOT
        for position in range(num_tokens):
            digest = _mix(digest, self._token_at(sequence, position))
            found = int(self._read(sequence, position))
            assert found == digest, f"{sequence}: the KV entry of position {position} is not its own ({found:#x})"


class SimulatedStep:
    """Reading it spends the step's cost, once."""

    num_padded_tokens = 0
    ended: Collection[int] = ()

    def __init__(self, cost: float, sleep: Callable[[float], None]) -> None:
        self.sampled: list[int] = []
        self.logprobs: dict[int, TokenLogprobs] = {}
        self.prompt_logprobs: dict[Key, list[TokenLogprobs]] = {}
        self.embeddings: dict[Key, Pooled] = {}
        self.seconds = {"model": cost}
        self._cost = cost
        self._sleep = sleep

    def sample(self) -> None:
        """It sampled when it was launched."""

    def token_ids(self) -> list[int]:
        if self._cost > 0.0:
            self._sleep(self._cost)
            self._cost = 0.0
        return self.sampled


def _mix(state: int, value: int) -> int:
    """SplitMix64's finalizer (Steele et al., OOPSLA 2014) over both arguments; never _EMPTY."""
    z = (state + 0x9E3779B97F4A7C15 * (value + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) | 1
