"""Device: all that differs between a CPU and a GPU, behind one seam. Knows who is asked what; computes nothing.

ModelRunner asks in this order, once each, and then launches steps:

    load -> make_cache -> get_ready -> launch, launch, ...
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch

from serve_app.engine.engine import Step
from serve_app.engine.pooling import Pooled
from serve_app.engine.request import TokenLogprobs
from serve_app.engine.scheduler import Key, SchedulerOutput
from serve_app.kernels.ops import Ops
from serve_app.models.model import Model
from serve_app.runner.kv_cache import KVCache

MakeModel = Callable[[torch.dtype], Model]


class Device(Protocol):
    """One machine part that runs steps. Made for one model; raises ConfigurationError for shapes it has no kernels for."""

    ops: Ops
    torch_device: torch.device
    max_steps_in_flight: int
    has_position_classes: bool
    """True if bits follow the class of a position, prompt or output (see `engine.Runner`)."""

    @property
    def deterministic(self) -> bool:
        """Whether bits are independent of the batch. Holds once the model is loaded."""
        ...

    def load(self, make: MakeModel, dtype: torch.dtype | None) -> Model:
        """The model in the element type that was asked for, or (None) in the one that suits the device."""
        ...

    def make_cache(self, model: Model, dtype: torch.dtype) -> KVCache:
        """As many blocks as the configuration and the memory give."""
        ...

    def get_ready(self, model: Model, cache: KVCache) -> None:
        """Everything that must not happen during a step: compile, capture, allocate."""
        ...

    def launch(self, plan: SchedulerOutput) -> Step:
        """See `engine.Runner`. Called in inference mode."""
        ...

    def describe(self) -> tuple[str, str]:
        """(where it runs, in which mode), for the log."""
        ...

    def fingerprint(self, parts: dict[str, object]) -> str:
        """See `machine.fingerprint`: the parts, and what of this machine decides bits."""
        ...


class ComputedStep:
    """A step whose results are there already (see engine.Step)."""

    def __init__(
        self,
        token_ids: list[int],
        logprobs: Mapping[int, TokenLogprobs],
        prompt_logprobs: Mapping[Key, list[TokenLogprobs]],
        num_padded_tokens: int,
        seconds: Mapping[str, float],
        embeddings: Mapping[Key, Pooled] | None = None,
        ended: Collection[int] = (),
    ) -> None:
        self._token_ids = token_ids
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.num_padded_tokens = num_padded_tokens
        self.seconds = seconds
        self.embeddings = embeddings or {}
        self.ended = ended

    def sample(self) -> None:
        """It is sampled."""

    def token_ids(self) -> list[int]:
        return self._token_ids
