"""A GPU that is the CPU: what the runner's device side is tested on. No tests.

Graphs are closures over static tensors: a replay runs the captured function again and writes into the tensor that the
capture returned. So whatever a capture has frozen that it should have read from a tensor, it would freeze here too. A
poisoned graph output and host buffers that are read late show who reads what too early.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch

from serve_app.engine.sequence import Sequence
from serve_app.errors import StepFailedError
from serve_app.runner.gpu import Measured
from serve_app.runner.sampler import SampledTokens, token_logprobs

GIB = 2**30


class FakeEvent:
    """Counts, so that a test can see who waited."""

    def __init__(self) -> None:
        self.num_records = self.num_waits = 0

    def record(self) -> None:
        self.num_records += 1

    def synchronize(self) -> None:
        self.num_waits += 1


class FakeGraph:
    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._run = run
        self.output = torch.full_like(run(), float("nan"))

    def replay(self) -> torch.Tensor:
        self.output.fill_(float("nan"))
        self.output.copy_(self._run())
        return self.output


class FakeGpu:
    """``kernels``: "reference", or "cuda" for the Triton kernels in the interpreter."""

    def __init__(self, kernels: str = "reference", *, total: int = 80 * GIB) -> None:
        self.device = torch.device("cpu")
        self.name = "a fake GPU"
        self.capability = (9, 0)
        self.kernels = kernels
        self.total = total
        self.used = 1 * GIB
        self.activations = 2 * GIB
        self.num_uses = 0
        self.captured: list[FakeGraph] = []
        self.lost: Exception | None = None

    def use(self) -> None:
        self.num_uses += 1

    def memory(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def measure(self, run: Callable[[], object]) -> Measured:
        run()
        return Measured(self.total - self.used, self.activations)

    def host_buffer(self, num_elements: int) -> torch.Tensor:
        return torch.full((num_elements,), -(2**30), dtype=torch.int32)

    def event(self) -> FakeEvent:
        return FakeEvent()

    def capture(self, run: Callable[[], torch.Tensor]) -> FakeGraph:
        self.captured.append(FakeGraph(run))
        return self.captured[-1]

    def check(self) -> None:
        if self.lost is not None:
            raise self.lost


# ---- a sampler on CPU tensors, in place of the Triton one -----------------------------------------------------------


class _Plan:
    def __init__(self, sequences: list[Sequence], positions: list[int], masked: Collection[int]) -> None:
        self.sequences = sequences
        self.masked = masked
        self.masks: Mapping[int, np.ndarray] = {}
        self.positions = positions
        self.rows = np.zeros((len(sequences), 16), dtype=np.int32)
        self.rows[:, 0] = positions

    def take_masks(self, masks: Mapping[int, np.ndarray]) -> None:
        assert set(masks) <= set(self.masked)
        self.masks = masks


class _Step:
    def __init__(self, plan: _Plan, logits: torch.Tensor) -> None:
        self.plan = plan
        logits = logits.float()
        self.bad = ~torch.isfinite(logits).all(dim=1)
        self.token_ids = torch.where(self.bad, 0, logits.argmax(dim=1)).int()
        self.logits = logits
        self.was_copied = False

    def start_copy(self) -> None:
        self.was_copied = True

    def read(self) -> SampledTokens:
        assert self.was_copied
        for sequence, bad in zip(self.plan.sequences, self.bad.tolist(), strict=True):
            if bad:
                raise StepFailedError(f"request {sequence.key[0]} (choice {sequence.key[1]}) cannot be sampled")
        ids = self.token_ids.tolist()
        wanted = {
            i: s.request.sampling.logprobs
            for i, s in enumerate(self.plan.sequences)
            if s.request.sampling.logprobs is not None
        }
        logprobs = {i: token_logprobs(self.logits[i : i + 1], [ids[i]], [num or 0])[0] for i, num in wanted.items()}
        return SampledTokens(ids, logprobs)


class _PendingLogprobs:
    def __init__(self, entries: list) -> None:  # type: ignore[type-arg]
        self.entries = entries

    def start_copy(self) -> None: ...

    def read(self) -> list:  # type: ignore[type-arg]
        return self.entries


class GreedySampler:
    """DeviceSampler's interface; every row is greedy. Checks what it is handed."""

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self.max_num_seqs = max_num_seqs
        self.steps: list[_Step] = []

    def prepare(self, sequences: list[Sequence], positions: list[int], masked: Collection[int] = ()) -> _Plan:
        return _Plan(sequences, positions, masked)

    def sample(self, logits_SV: torch.Tensor, plan: _Plan, rows: torch.Tensor) -> _Step:
        assert len(logits_SV) == len(plan.sequences) == len(rows)
        assert np.array_equal(rows.numpy(), plan.rows), "the parameters arrived, in this step's rows"
        logits_SV = logits_SV.clone()
        for row, words in plan.masks.items():
            allowed = np.unpackbits(words.view(np.uint8), count=logits_SV.shape[1], bitorder="little")
            logits_SV[row, torch.from_numpy(allowed == 0)] = -1e30
        self.steps.append(_Step(plan, logits_SV))
        return self.steps[-1]

    def token_logprobs(
        self, logits_NV: torch.Tensor, rows: range, token_ids: list[int], num_top: list[int]
    ) -> _PendingLogprobs:
        assert list(rows) == list(range(len(logits_NV)))
        assert len(token_ids) <= self.max_num_seqs
        return _PendingLogprobs(token_logprobs(logits_NV, token_ids, num_top))

    def warm_up(self, logits_SV: torch.Tensor) -> None:
        assert len(logits_SV) == 1

    def state_bytes(self) -> int:
        return 0
