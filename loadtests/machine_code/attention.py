"""The attention kernels as an 8B model launches them: 32 query heads, 8 kv heads, bfloat16 and float32, pages of 64."""

from __future__ import annotations

import torch

from loadtests.machine_code.kernel import Kernel
from serve_app.kernels.ragged_attention import attention_config

MODULE = "serve_app.kernels.ragged_attention"
NUM_HEADS, GROUP = 32, 4
MIN_BLOCKS = {
    ("prompt", 64): {80: 1, 90: 2, 100: 1},
    ("prompt", 128): {80: 1, 90: 1, 100: 1},
    ("prompt", 256): {80: 1, 90: 1, 100: 1},
    ("decode", 64): {80: 4, 90: 4, 100: 4},
    ("decode", 128): {80: 2, 90: 3, 100: 3},
}
"""Blocks on a multiprocessor, by class and head dim, for each capability."""


def kernels(capability: int) -> list[Kernel]:
    found: list[Kernel] = []
    for head_dim in (64, 128):
        for dtype in ("bf16", "fp32"):
            found += [
                attention_kernel(row_class, head_dim, capability, dtype=dtype) for row_class in ("prompt", "decode")
            ]
    if capability == 90:  # once, what else a configuration may ask for
        found.append(attention_kernel("prompt", 256, capability))
        found.append(attention_kernel("decode", 128, capability, page=16))
        found.append(attention_kernel("prompt", 128, capability, window=True, soft_cap=True))
        found.append(merge_kernel(128))
    return found


def attention_kernel(
    row_class: str,
    head_dim: int,
    capability: int,
    *,
    page: int = 64,
    window: bool = False,
    soft_cap: bool = False,
    dtype: str = "bf16",
) -> Kernel:
    torch_type = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    config = attention_config(head_dim, GROUP, torch_type, row_class, (capability // 10, capability % 10))
    arguments = dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), f"*{dtype}") | {"p_tables": "*i32"}
    if row_class == "prompt":
        arguments |= {"p_tiles": "*i32"}
    else:
        arguments |= {"p_splits": "*i32", "p_counts": "*i32", "p_partial": "*fp32", "p_partial_sums": "*fp32"}
    arguments |= {"score_factor": "fp32", "cap_factor": "fp32"}
    arguments |= dict.fromkeys(("window", "stride_table", "stride_page", "stride_slot", "stride_head"), "i32")
    options = ("" if page == 64 else f" page {page}") + " window" * window + " cap" * soft_cap
    has_large_tiles = row_class == "prompt" and dtype != "fp32"
    matrix = {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability] if has_large_tiles else "mma"
    ahead = {"AHEAD": config.ahead} if row_class == "prompt" else {}
    return Kernel(
        name=f"attention {row_class} D{head_dim}{options}" + ("" if dtype == "bf16" else f" {dtype}"),
        function=f"{MODULE}:_{row_class}_kernel",
        arguments=arguments,
        constants={
            "HAS_WINDOW": window,
            "HAS_CAP": soft_cap,
            "HEAD_DIM": head_dim,
            "NUM_HEADS": NUM_HEADS,
            "GROUP": GROUP,
            "PAGE": page,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": head_dim,
        }
        | ahead,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        min_blocks=MIN_BLOCKS[row_class, head_dim][capability] if dtype == "bf16" else 1,
        must_have=(matrix, "async_copies", "wide_loads") if row_class == "prompt" else (matrix, "async_copies"),
    )


def merge_kernel(head_dim: int) -> Kernel:
    return Kernel(
        name=f"attention merge D{head_dim}",
        function=f"{MODULE}:_merge_kernel",
        arguments={"p_out": "*bf16", "p_decodes": "*i32", "p_counts": "*i32"}
        | dict.fromkeys(("p_partial", "p_partial_sums"), "*fp32"),
        constants={"NUM_HEADS": NUM_HEADS, "HEAD_DIM": head_dim, "BLOCK_D": head_dim},
        num_warps=2,
        min_blocks=16,
        must_have=("wide_loads",),
    )
