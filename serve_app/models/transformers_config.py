"""TransformersConfig: what a model of transformers is, found by a dry run. Knows no weights, no kernel.

The model is built on torch's meta device, which has shapes and no data, and run on a few tokens with an attention
function and a mask function of ours. So it is seen, not guessed, which layers attend through transformers' interface,
with what heads, scale and soft-cap, and what every layer's mask is. Whatever our cache and kernels cannot do is refused
by name here, before a byte of weights is read.

Follows transformers 5.17 to 5.23 (masking_utils.py, modeling_utils.py's AttentionInterface). transformers is imported
where it is used: who serves another model never loads it.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from serve_app.errors import UnsupportedModelError
from serve_app.models.transformers_parts import EXPERTS, fill_buffers, is_rotary, register_experts

SURVEY = "ragged_serve_survey"
"""Our attention and mask functions of the dry run, in transformers' tables."""
SERVED = "ragged_serve"
"""Our attention function in a model that serves. It has no mask function: then transformers makes no masks."""

RUNS = (
    "decoder-only models of transformers with causal attention in every layer, full or in a sliding window, that goes"
    " through its AttentionInterface"
)
_NUM_TOKENS = 4
_REFUSED_KEYS = {
    "kv_lora_rank": "latent attention (MLA), whose cache has another shape",
    "num_kv_shared_layers": "layers that share their keys and values",
    "alibi": "ALiBi, a bias on the scores",
    "quantization_config": "quantised weights",
    "compression_config": "quantised weights",
    "vision_config": "a vision tower",
    "audio_config": "an audio tower",
}
"""Keys of a config.json that, if set, mean something else than `RUNS`. (Most would be found by the dry run, too, but in
words that help less.)"""
_REFUSED_NAMES = {
    "BloomForCausalLM": "ALiBi, a bias on the scores",
    "MptForCausalLM": "ALiBi, a bias on the scores",
    "GptOssForCausalLM": "attention sinks",
}
"""The same for architectures whose configs have no such key."""
_READ_ARGUMENTS = ("scaling", "softcap", "sliding_window", "dropout", "is_causal", "position_ids")
"""What attention functions are given beside q, k, v and the mask, and what we do with it. The window follows from the
mask; another argument that is set is one we would ignore, so it is refused."""


class AttentionLayer(NamedTuple):
    """How one layer attends."""

    path: str
    """The attention module in the model."""
    scale: float
    sliding_window: int
    """Position i sees i - window < j <= i; 0: all j <= i."""
    soft_cap: float
    """0: none."""


@dataclass(frozen=True)
class TransformersConfig:
    """See `model.ModelConfig`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    dtype: str
    eos_token_ids: tuple[int, ...]

    layers: tuple[AttentionLayer, ...]
    """In the order in which they run."""

    body: str
    """The submodule that holds everything but the head."""

    version: str
    """Of transformers: its code decides the numbers."""

    def bytes_per_token_and_layer(self, dtype_size: int) -> int:
        return 2 * self.num_kv_heads * self.head_dim * dtype_size

    @classmethod
    def from_directory(
        cls, directory: Path, config: Mapping[str, Any], *, dtype: str, eos_token_ids: tuple[int, ...]
    ) -> TransformersConfig:
        """``config``: the parsed config.json of ``directory``. Raises UnsupportedModelError that says why."""
        name = architecture_name(config)
        transformers = import_transformers(name)
        hf_config = read_config(directory, name)
        _refuse_by_key(name, hf_config)
        survey = take_survey(name, hf_config)
        text_config = hf_config.get_text_config()
        max_len = getattr(text_config, "max_position_embeddings", None)
        if not isinstance(max_len, int) or max_len < 1:
            raise UnsupportedModelError(
                f"{name}: max_position_embeddings is {max_len!r}; it must be an integer above 0"
            )
        return cls(
            architecture=name,
            vocab_size=survey.vocab_size,
            hidden_size=survey.hidden_size,
            num_layers=len(survey.layers),
            num_heads=survey.num_heads,
            num_kv_heads=survey.num_kv_heads,
            head_dim=survey.head_dim,
            max_model_len=max_len,
            dtype=dtype,
            eos_token_ids=eos_token_ids,
            layers=survey.layers,
            body=survey.body,
            version=transformers.__version__,
        )


def architecture_name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise UnsupportedModelError(f"architectures is {names!r}; it must name exactly one")
    return names[0]


def import_transformers(architecture: str) -> Any:
    """The package. Raises UnsupportedModelError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedModelError(
            f"architecture {architecture!r} runs through the package transformers, which cannot be imported ({error});"
            " `pip install 'ragged-serve[transformers]'` brings it"
        ) from error
    return transformers


def read_config(directory: Path, architecture: str) -> Any:
    """The config as transformers reads it, for its own code (never a repository's)."""
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UnsupportedModelError(f"{architecture}: transformers cannot read its config.json: {error}") from error


def build_on_meta(architecture: str, hf_config: Any, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model without data. Raises UnsupportedModelError if it is no causal language model of transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type) != architecture:
        raise refusal(architecture, "it is none of transformers' causal language models")
    try:
        with quiet(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention, dtype=dtype).eval()
    except KeyError as error:
        if error.args != (attention,):
            raise
        raise refusal(architecture, "its attention does not go through the interface") from error


def refusal(architecture: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"architecture {architecture!r} is not supported: {why}. What runs: {RUNS}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers says in bars and warnings what we check and say ourselves."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _refuse_by_key(name: str, hf_config: Any) -> None:
    if getattr(hf_config, "is_encoder_decoder", False):
        raise refusal(name, "it is an encoder-decoder")
    if name in _REFUSED_NAMES:
        raise refusal(name, f"it has {_REFUSED_NAMES[name]}")
    for key, what in _REFUSED_KEYS.items():
        if getattr(hf_config, key, None):
            raise refusal(name, f"it has {what} ({key} in its config)")
    layer_types = set(getattr(hf_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if layer_types:
        what = ", ".join(sorted(layer_types))
        raise refusal(name, f"it has layers of type {what}: no state-space, recurrent or chunked layers run here")
    for rope in _ropes(getattr(hf_config, "rope_parameters", None)):
        if rope.get("rope_type") == "dynamic":
            raise refusal(
                name, "its rope type 'dynamic' has frequencies that depend on the longest sequence of the batch"
            )


def _ropes(parameters: Any) -> list[Mapping[str, Any]]:
    """One set of rope parameters, or one for each type of layer."""
    if not isinstance(parameters, Mapping):
        return []
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


# ---- the dry run --------------------------------------------------------------------------------------------------------


class Survey(NamedTuple):
    """What the dry run saw."""

    layers: tuple[AttentionLayer, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    body: str


class _Call(NamedTuple):
    """One call of the attention function."""

    module: Any
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Any
    arguments: dict[str, Any]


class _Mask(NamedTuple):
    """What stands for a mask in the dry run: the function of (batch, head, query, key) that it would be made from."""

    sees: Callable[[int, int], bool]


_calls: list[_Call] = []
"""Of the dry run under way."""
_one_at_a_time = threading.Lock()


def take_survey(name: str, hf_config: Any) -> Survey:
    """Runs the model on the meta device. Raises UnsupportedModelError."""
    with _one_at_a_time:
        return _take_survey(name, hf_config)


def _take_survey(name: str, hf_config: Any) -> Survey:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(SURVEY, _record)
    AttentionMaskInterface.register(SURVEY, _mask)
    register_experts()
    hf_config._experts_implementation = EXPERTS
    model = build_on_meta(name, hf_config, SURVEY)
    if getattr(model, "_is_stateful", False):
        raise refusal(name, "it has state-space or recurrent layers")
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters:
        raise refusal(name, "its forward takes no position_ids")
    for module in list(model.modules()):
        if is_rotary(module):
            fill_buffers(model, module)
            module.forward = _without_meta(module.forward)
    entered: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, _args, path=path: entered.append(path))
        for path, module in model.named_modules()
        if path
    ]
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(_NUM_TOKENS, device="meta")[None]
    _calls.clear()
    try:
        with quiet(), torch.no_grad():
            # With a mask of ones (nothing is padded) transformers does not look for packed sequences.
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False)
    except UnsupportedModelError as error:
        raise refusal(name, str(error)) from error
    except Exception as error:
        raise refusal(name, f"a dry run on the meta device failed: {type(error).__name__}: {error}") from error
    finally:
        calls = list(_calls)
        _calls.clear()
        for hook in hooks:
            hook.remove()
    return _judge(name, model, calls, entered[0], logits.logits.shape[-1])


def _judge(name: str, model: Any, calls: list[_Call], body: str, vocab_size: int) -> Survey:
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    if not calls:
        raise refusal(name, "its attention does not go through the interface")
    if len(calls) != num_layers or len({id(call.module) for call in calls}) != num_layers:
        raise refusal(name, f"attention went through the interface {len(calls)} times in {num_layers} layers")
    paths = {id(module): path for path, module in model.named_modules()}
    shapes = []
    layers = []
    for i, call in enumerate(calls):
        where = f"layer {i}"
        try:
            layers.append(_layer_of(paths[id(call.module)], call))
        except UnsupportedModelError as error:
            raise refusal(name, f"{where} {error}") from error
        shapes.append((call.q.shape[1], call.k.shape[1], call.k.shape[3], call.v.shape[3]))
        if shapes[i] != shapes[0]:
            raise refusal(
                name,
                f"{where} has (heads, kv heads, head_dim of k, of v) = {shapes[i]} where layer 0 has {shapes[0]}; the"
                " cache holds layers of one shape",
            )
    num_heads, num_kv_heads, head_dim, v_dim = shapes[0]
    if head_dim != v_dim:
        raise refusal(name, f"its values have head_dim {v_dim}, its keys {head_dim}")
    if num_heads % num_kv_heads:
        raise refusal(name, f"{num_heads} heads are no multiple of {num_kv_heads} kv heads")
    hidden_size = model.get_input_embeddings().weight.shape[1]
    return Survey(tuple(layers), num_heads, num_kv_heads, head_dim, hidden_size, vocab_size, body)


def _layer_of(path: str, call: _Call) -> AttentionLayer:
    """Raises UnsupportedModelError, without the model's name."""
    arguments = call.arguments
    for key, value in arguments.items():
        is_set = value is not None and value is not False and not (isinstance(value, int | float) and value == 0)
        if key not in _READ_ARGUMENTS and is_set:
            what = "attention sinks" if key == "s_aux" else f"the argument {key!r}"
            raise UnsupportedModelError(f"gives its attention {what}, which our kernels do not have")
    if arguments.get("dropout"):
        raise UnsupportedModelError(f"has dropout {arguments['dropout']}")
    if arguments.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
        raise UnsupportedModelError("is not causal")
    if not isinstance(call.mask, _Mask):
        raise UnsupportedModelError("makes its mask itself" if call.mask is not None else "has no causal mask")
    scale = arguments.get("scaling")
    return AttentionLayer(
        path,
        float(call.q.shape[3] ** -0.5 if scale is None else scale),
        window_of(call.mask.sees),
        float(arguments.get("softcap") or 0.0),
    )


def window_of(sees: Callable[[int, int], bool]) -> int:
    """The sliding window of a mask, 0 for none. ``sees(i, j)``: position i attends to position j.

    Raises UnsupportedModelError if the mask is neither causal nor a causal window, by the look of some of its fields.

    >>> window_of(lambda i, j: j <= i), window_of(lambda i, j: i - 7 < j <= i)
    (0, 7)
    """
    far = 1 << 20
    low, high = 0, far  # the first position that `far` sees; chunks and other shapes are found below
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sees(far, middle) else (middle + 1, high)
    window = 0 if low == 0 else far - low + 1
    distances = {0, 1, 2, 5, 17, *((window - 1, window, window + 1, 2 * window) if window else (999, 65_536))}
    for i in {0, 1, 2, 3, 7, 64, 1000, 4095, 4096, 100_003, far, window, max(0, window - 1), 3 * window + 1}:
        for j in {0, i + 1, i + 2, *(i - distance for distance in distances if distance <= i)}:
            if sees(i, j) != (j <= i and (not window or j > i - window)):
                raise UnsupportedModelError(
                    f"has a mask that is no sliding window (whether position {i} sees {j} does not fit)"
                )
    return window


def _without_meta(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a rotary embedding, computed on the CPU: some look at their positions to choose frequencies."""

    def run(x: torch.Tensor, position_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        found = forward(x.new_empty(1, device="cpu"), torch.arange(position_ids.shape[-1])[None], *rest, **named)
        return tuple(part.to("meta") for part in found) if isinstance(found, tuple) else found.to("meta")

    return run


def _record(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **arguments: Any
) -> tuple[torch.Tensor, None]:
    """The attention function of the dry run."""
    _calls.append(_Call(module, query, key, value, attention_mask, arguments))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _mask(*, mask_function: Callable[..., Any], **_: Any) -> _Mask:
    """The mask function of the dry run."""
    zero = torch.tensor(0)

    def sees(i: int, j: int) -> bool:
        try:
            return bool(mask_function(zero, zero, torch.tensor(i), torch.tensor(j)))
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedModelError("has a mask that follows from more than positions") from error

    return _Mask(sees)
