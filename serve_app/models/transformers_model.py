"""TransformersModel: a decoder of transformers on our cache and kernels. Knows how it is driven; knows no architecture.

    input_ids, positions [1, N], the rows of all sequences one after the other
        -> transformers' own layers, with the parts of transformers_parts.py in them
        -> their attention calls `_attend`: K and V into the cache's slots, then ops.ragged_attention
        -> hidden states [1, N, E] -> the rows that are wanted -> the model's own end: head, soft-cap, scale

transformers keeps no cache and makes no masks here: what each layer sees is in `TransformersConfig`, found by a dry run.

Shape suffixes: N tokens of the step, S rows whose logits are wanted, E hidden, V vocabulary, H query heads, K kv heads,
D head dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from serve_app.errors import UnsupportedModelError, WeightsError
from serve_app.kernels.metadata import AttentionMetadata
from serve_app.kernels.ops import LinearLayer, Ops
from serve_app.models import transformers_parts as parts
from serve_app.models.transformers_config import (
    SERVED,
    AttentionLayer,
    TransformersConfig,
    build_on_meta,
    quiet,
    read_config,
)
from serve_app.models.weights import DummyWeights, WeightLoader


class _Step(NamedTuple):
    """What attention needs of the step that runs."""

    metadata: AttentionMetadata
    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]
    zeros: torch.Tensor
    """int32 [N]."""


class _Place:
    """What an attention module of transformers knows of us."""

    def __init__(self, model: TransformersModel, index: int, layer: AttentionLayer) -> None:
        self.model, self.index, self.layer = model, index, layer


class _Given(nn.Module):
    """Stands where the model's body stood: gives the hidden states it was told, so that the model's end can run."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_1SE: torch.Tensor | None = None
        self.output_type: Any = None
        """The class of what the body returns."""

    def forward(self, *_args: Any, **_named: Any) -> Any:
        return self.output_type(last_hidden_state=self.hidden_1SE)


class TransformersModel:
    """See `model.Model`. ``seed``: random weights from it and the config alone; None: the weights of ``directory``.

    ``max_model_len`` bounds the positions, and with longrope chooses the frequencies. Raises WeightsError where the
    checkpoint and the model do not fit each other, tensor by tensor.
    """

    can_be_captured = False
    """Their Python is run anew at each step; mixtures of experts ask the device how many rows each expert has."""

    def __init__(
        self,
        config: TransformersConfig,
        directory: Path,
        ops: Ops,
        dtype: torch.dtype,
        max_model_len: int,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(SERVED, _attend)
        parts.register_experts()
        self.config = config
        self.ops = ops
        device = torch.device(device)
        with torch.inference_mode():
            model = _load(config, directory, dtype) if seed is None else _dummy(config, directory, dtype, seed)
            head = model.get_output_embeddings()
            linears = parts.put_in(model, ops, device, max_model_len)
        if not isinstance(head, nn.Linear):
            raise UnsupportedModelError(
                f"{config.architecture}: its head is a {type(head).__name__}, not a linear layer"
            )
        self.embedding_VE: torch.Tensor = model.get_input_embeddings().weight
        self._linears = _head_last(linears, model.get_output_embeddings().linear)
        for index, layer in enumerate(config.layers):
            model.get_submodule(layer.path).ragged_place = _Place(self, index, layer)
        attention = model.get_submodule(config.layers[0].path)
        self.row_linears = [module.linear for module in attention.modules() if isinstance(module, parts.RowLinear)]
        self._body = model.get_submodule(config.body)
        self._given = _Given()
        model.set_submodule(config.body, self._given)
        self._model = model
        self._step: _Step | None = None
        half = config.head_dim // 2
        self._no_turn = torch.cat((torch.ones(1, half), torch.zeros(1, half)), dim=1).to(device)

    @property
    def linears(self) -> list[LinearLayer]:
        return self._linears

    def forward(
        self,
        input_ids: torch.Tensor,
        metadata: AttentionMetadata,
        logits_indices: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """See `model.Model.forward`."""
        return self.head(self.hidden_states(input_ids, metadata, logits_indices, k_caches, v_caches))

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        metadata: AttentionMetadata,
        logits_indices: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor:
        """See `model.Model.hidden_states`."""
        self._step = _Step(metadata, k_caches, v_caches, torch.zeros_like(metadata.positions))
        try:
            hidden_NE = self._run_body(input_ids[None], metadata.positions[None].long())
        finally:
            self._step = None
        return hidden_NE[logits_indices]

    def head(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """See `model.Model.head`: what the model's class does after its body, its scales and soft-caps included."""
        if not hidden_SE.shape[0]:
            return hidden_SE.new_empty(0, self.config.vocab_size)
        self._given.hidden_1SE = hidden_SE[None]
        try:
            logits: torch.Tensor = self._model(use_cache=False).logits[0]
        finally:
            self._given.hidden_1SE = None
        return logits

    def reference_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[N] ids of one sequence -> logits [N, V], with transformers' own attention and masks in place of ours."""
        config = self._model.config
        config._attn_implementation = "eager"
        try:
            positions = torch.arange(len(input_ids), device=input_ids.device)
            return self.head(self._run_body(input_ids[None], positions[None]))
        finally:
            config._attn_implementation = SERVED

    def _run_body(self, input_ids_1N: torch.Tensor, position_ids_1N: torch.Tensor) -> torch.Tensor:
        output = self._body(input_ids=input_ids_1N, position_ids=position_ids_1N, use_cache=False)
        self._given.output_type = type(output)
        hidden_NE: torch.Tensor = output.last_hidden_state[0]
        return hidden_NE

    def attend(self, place: _Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [1, H, N, D], k, v [1, K, N, D] -> [1, N, H, D]."""
        step = self._step
        assert step is not None, "attention outside of a step"
        k_cache, v_cache = step.k_caches[place.index], step.v_caches[place.index]
        dtype = v.dtype
        # The kernel that writes to the cache also turns q and k. They are turned already: by an angle of 0, then.
        qkv = torch.cat([x[0].to(dtype).transpose(0, 1) for x in (q, k, v)], dim=1).flatten(1)
        q_NHD = self.ops.qk_norm_rope_write(
            qkv, self._no_turn, step.zeros, k_cache, v_cache, step.metadata.slot_mapping
        )
        scale, window, soft_cap = place.layer.scale, place.layer.sliding_window, place.layer.soft_cap
        return self.ops.ragged_attention(
            q_NHD, k_cache, v_cache, step.metadata, scale=scale, sliding_window=window, soft_cap=soft_cap
        )[None]


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: None, **_named: Any
) -> tuple[torch.Tensor, None]:
    """Our attention function in transformers' table. Scale, window and soft-cap are those that the dry run saw."""
    place: _Place = module.ragged_place
    return place.model.attend(place, query, key, value), None


def _load(config: TransformersConfig, directory: Path, dtype: torch.dtype) -> Any:
    """The checkpoint through transformers' own loader, which knows every layout that it ever had. Strict, for once."""
    import transformers

    WeightLoader(directory, progress=False).close()  # files that are missing, truncated or at odds with the index
    hf_config = read_config(directory, config.architecture)
    hf_config._experts_implementation = parts.EXPERTS
    model_class = getattr(transformers, config.architecture)
    try:
        with quiet():
            model, found = model_class.from_pretrained(
                directory,
                config=hf_config,
                dtype=dtype,
                attn_implementation=SERVED,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are told, like the rest, and refused below
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise WeightsError(f"transformers cannot load {directory}: {error}") from error
    for what, keys in (
        ("lacks tensors that the model needs", found["missing_keys"]),
        ("has tensors that this architecture does not use", found["unexpected_keys"]),
        ("has tensors of other shapes than the config asks for", found["mismatched_keys"]),
        ("has tensors that cannot be loaded", found["error_msgs"]),
    ):
        if keys:
            names = sorted(map(str, keys))
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise WeightsError(f"{directory} {what}: {', '.join(names[:4])}{more}")
    return model.eval()


def _dummy(config: TransformersConfig, directory: Path, dtype: torch.dtype, seed: int) -> Any:
    hf_config = read_config(directory, config.architecture)
    hf_config._experts_implementation = parts.EXPERTS
    model = build_on_meta(config.architecture, hf_config, SERVED, dtype)
    source = DummyWeights(seed)
    for module in model.modules():
        parts.fill_buffers(model, module)
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        value = source.take(name, parameter.shape, parameter.dtype)
        setattr(model.get_submodule(module), own, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    source.finish()
    return model


def _head_last(linears: list[LinearLayer], head: LinearLayer) -> list[LinearLayer]:
    return [linear for linear in linears if linear is not head] + [head]
