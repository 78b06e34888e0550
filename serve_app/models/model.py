"""What a runner needs to know of a model, whoever wrote it: its facts, and its face. Computes nothing.

Two models have this face: `decoder.Decoder`, our own page, and `transformers_model.TransformersModel`, which runs what
transformers has. `decoder_config.load_model_config` says which.

Shape suffixes: N tokens of the step, S rows whose logits are wanted, E hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from serve_app.kernels.metadata import AttentionMetadata


class ModelConfig(Protocol):
    """The facts of a model, read from its config alone. Printable: it goes into the numerics fingerprint."""

    @property
    def architecture(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def bytes_per_token_and_layer(self, dtype_size: int) -> int:
        """Bytes of K and V that one token takes in one layer, for cache elements of ``dtype_size`` bytes."""
        ...


class Model(Protocol):
    """A model with its weights, for one device."""

    embedding_VE: torch.Tensor
    """Its element type is the model's."""

    can_be_captured: bool
    """Whether a CUDA graph can hold its `hidden_states`."""

    @property
    def linears(self) -> Sequence[Any]:
        """Every product, the head last: layers of the ops' own kind, for whoever sets how they run."""
        ...

    @property
    def row_linears(self) -> Sequence[Any]:
        """Some of them that compute every row of a step: what they pad, the step pads."""
        ...

    def forward(
        self,
        input_ids: torch.Tensor,
        metadata: AttentionMetadata,
        logits_indices: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """input_ids integer [N] -> logits [S, V] of the rows ``logits_indices``, in the model's dtype. Fills the caches."""
        ...

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        metadata: AttentionMetadata,
        logits_indices: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """All of `forward` but the head: [S, E]."""
        ...

    def head(self, hidden_SE: torch.Tensor, /) -> torch.Tensor:
        """[S, E] -> logits [S, V]."""
        ...
