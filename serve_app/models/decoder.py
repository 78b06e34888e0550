"""The decoder of Llama, Mistral, Qwen2 and Qwen3, on one page. Knows the forward pass; knows no batch policy, no text.

Shape suffixes: N tokens of the step, S rows whose logits are wanted, E hidden, F intermediate, V vocabulary,
H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from serve_app.kernels.metadata import AttentionMetadata
from serve_app.kernels.ops import LinearLayer, Ops
from serve_app.models.decoder_config import DecoderConfig
from serve_app.models.rope import rope_table
from serve_app.models.weights import EMBEDDING, HEAD, WeightSource


class Layer(NamedTuple):
    attention_norm: torch.Tensor
    qkv: LinearLayer
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: LinearLayer
    mlp_norm: torch.Tensor
    gate_up: LinearLayer
    down: LinearLayer
    sliding_window: int

    @property
    def linears(self) -> tuple[LinearLayer, ...]:
        return self.qkv, self.o, self.gate_up, self.down


class Decoder:
    """Weights packed at construction; `forward` is one step. ``max_model_len`` bounds the positions.

    ``device``: where the weights are put, tensor by tensor, and where every argument of `forward` then is.
    """

    can_be_captured = True

    def __init__(
        self,
        config: DecoderConfig,
        weights: WeightSource,
        ops: Ops,
        dtype: torch.dtype,
        max_model_len: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.ops = ops
        self._weights = weights
        self._dtype = dtype
        self._device = torch.device(device)
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim
        self.rope = rope_table(config.rope, config.head_dim, max_model_len).to(self._device)
        self.embedding_VE = self._own(EMBEDDING, config.vocab_size, hidden)
        self.layers: list[Layer] = []
        for i, window in enumerate(config.sliding_window):
            at = f"model.layers.{i}."
            attention, mlp = at + "self_attn.", at + "mlp."
            self.layers.append(
                Layer(
                    attention_norm=self._own(at + "input_layernorm.weight", hidden),
                    qkv=self._linear(
                        hidden,
                        {attention + "q_proj": heads, attention + "k_proj": kv, attention + "v_proj": kv},
                        config.qkv_bias,
                    ),
                    q_norm=self._own(attention + "q_norm.weight", config.head_dim) if config.qk_norm else None,
                    k_norm=self._own(attention + "k_norm.weight", config.head_dim) if config.qk_norm else None,
                    o=self._linear(heads, {attention + "o_proj": hidden}, config.o_bias),
                    mlp_norm=self._own(at + "post_attention_layernorm.weight", hidden),
                    gate_up=self._linear(
                        hidden,
                        {mlp + "gate_proj": config.intermediate_size, mlp + "up_proj": config.intermediate_size},
                        config.mlp_bias,
                    ),
                    down=self._linear(config.intermediate_size, {mlp + "down_proj": hidden}, config.mlp_bias),
                    sliding_window=window,
                )
            )
        self.final_norm = self._own("model.norm.weight", hidden)
        head = self.embedding_VE if config.tie_word_embeddings else self._take(HEAD, config.vocab_size, hidden)
        self.head = ops.linear(head)
        weights.finish()

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self._weights.take(name, shape, self._dtype).to(self._device)

    def _own(self, name: str, *shape: int) -> torch.Tensor:
        """A copy in memory of its own: what `_take` gives may lie in the mapped file."""
        return self._weights.take(name, shape, self._dtype).to(self._device, copy=True)

    def _linear(self, in_features: int, parts: dict[str, int], has_bias: bool) -> LinearLayer:
        """One layer for all ``parts`` (name -> output features), stacked in order."""
        weight = torch.cat([self._take(name + ".weight", out, in_features) for name, out in parts.items()])
        bias = torch.cat([self._take(name + ".bias", out) for name, out in parts.items()]) if has_bias else None
        return self.ops.linear(weight, bias)

    @property
    def linears(self) -> list[Any]:
        """Every product of the model, the head last: layers of the ops' own kind, for whoever sets how they run."""
        return [linear for layer in self.layers for linear in layer.linears] + [self.head]

    @property
    def row_linears(self) -> Sequence[Any]:
        """See `model.Model.row_linears`."""
        return self.layers[0].linears

    def forward(
        self,
        input_ids: torch.Tensor,
        metadata: AttentionMetadata,
        logits_indices: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """input_ids integer [N] -> logits [S, V] of the rows ``logits_indices``, in the model's dtype. Fills the caches."""
        hidden_SE = self.hidden_states(input_ids, metadata, logits_indices, k_caches, v_caches)
        if not hidden_SE.shape[0]:
            return hidden_SE.new_empty(0, self.config.vocab_size)
        return self.head(hidden_SE)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        metadata: AttentionMetadata,
        logits_indices: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """All of `forward` but the head: [S, E], for a caller that takes the logits of many rows in parts.

        After the last layer's attention only the S rows are of use, and only they go on.
        """
        config, ops = self.config, self.ops
        eps, scale = config.rms_norm_eps, config.head_dim**-0.5
        residual = functional.embedding(input_ids, self.embedding_VE)
        x = ops.rms_norm(residual, self.layers[0].attention_norm, eps)
        norms = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for i, (layer, next_norm) in enumerate(zip(self.layers, norms, strict=True)):
            k_cache, v_cache = k_caches[i], v_caches[i]
            q_NHD = ops.qk_norm_rope_write(
                layer.qkv(x),
                self.rope,
                metadata.positions,
                k_cache,
                v_cache,
                metadata.slot_mapping,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=eps,
            )
            if i == config.num_layers - 1 and not logits_indices.numel():
                return x.new_empty(0, config.hidden_size)  # a chunk in the middle of a prompt: its K and V are all
            attended = ops.ragged_attention(
                q_NHD, k_cache, v_cache, metadata, scale=scale, sliding_window=layer.sliding_window
            ).flatten(1)
            if i == config.num_layers - 1:
                attended, residual = attended[logits_indices], residual[logits_indices]
            x = ops.add_rms_norm(layer.o(attended), residual, layer.mlp_norm, eps)
            x = ops.add_rms_norm(layer.down(ops.silu_mul(layer.gate_up(x))), residual, next_norm, eps)
        return x
