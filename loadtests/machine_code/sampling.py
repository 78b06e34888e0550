"""The sampler's kernels for a vocabulary of 128,256 tokens (Llama 3), bfloat16 logits."""

from __future__ import annotations

from loadtests.machine_code.kernel import Kernel
from serve_app.kernels.sampling_rows import BLOCK, CAPACITY, CHUNK

VOCAB_SIZE = 128_256
CHUNKS = 32
"""VOCAB_SIZE / CHUNK, up to a power of two."""

FILES = {"cut": "sampling_cut"} | dict.fromkeys(("open", "edit", "count"), "sampling_edits")
"""Where a kernel is that is not in sampling.py."""

INTEGERS = ("p_params", "p_best_ids", "p_flags", "p_raw_flags", "p_ids", "p_cuts", "p_out", "p_state", "p_open")
FLOATS = ("p_edited", "p_maxima", "p_scores", "p_values", "p_bias")
POINTERS = (
    dict.fromkeys(INTEGERS, "*i32")
    | dict.fromkeys(FLOATS, "*fp32")
    | {"p_logits": "*bf16", "p_masks": "*i32", "p_targets": "*i32", "p_chosen": "*i32"}
)


def kernels(capability: int) -> list[Kernel]:
    wide = {"CHUNK": CHUNK}
    found = [
        sampling_kernel("choose", {"CHUNKS": CHUNKS, "HAS_EDITS": True, "DRAWS": True}, num_warps=1),
        sampling_kernel("open", wide),
        sampling_kernel("edit", wide | {"CHUNKS": CHUNKS}),
        sampling_kernel("count", {}, num_warps=1),
        sampling_kernel("logprob", {"BLOCK": 2 * BLOCK, "CHUNKS": CHUNKS, "TOP": 64}),
    ]
    for has_edits in (False, True):
        edits = {"HAS_EDITS": has_edits}
        tall = {"BLOCK": BLOCK, "CHUNKS": CHUNKS, "CAPACITY": CAPACITY}
        found += [
            sampling_kernel("scan", wide | edits),
            sampling_kernel("cut", tall | edits, num_warps=4),
            sampling_kernel("draw", wide | {"CHUNKS": CHUNKS, "HAS_CUTS": True} | edits),
        ]
    found.append(sampling_kernel("draw", wide | {"CHUNKS": CHUNKS, "HAS_CUTS": False, "HAS_EDITS": False}))
    return found


def sampling_kernel(name: str, constants: dict[str, object], *, num_warps: int = 8) -> Kernel:
    import importlib

    module = f"serve_app.kernels.{FILES.get(name, 'sampling')}"
    function = getattr(importlib.import_module(module), f"{name}_kernel")
    names = [parameter for parameter in function.arg_names if parameter not in constants]
    options = [key.lower().removeprefix("has_") for key, value in constants.items() if value is True]
    return Kernel(
        name=" ".join([f"sampling {name}", *options]),
        function=f"{module}:{name}_kernel",
        arguments={parameter: POINTERS.get(parameter, "i32") for parameter in names},
        constants=constants,
        num_warps=num_warps,
        enable_fp_fusion=name != "edit",
        min_blocks=2,
    )
