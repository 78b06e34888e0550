"""The deterministic product with the tile of each class of weights, named by the weight's rows."""

from __future__ import annotations

import torch

from loadtests.machine_code.kernel import Kernel
from serve_app.kernels.matmul import GROUP_M, matmul_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def kernels(capability: int) -> list[Kernel]:
    return [
        matmul_kernel(28672, capability),
        matmul_kernel(6144, capability),
        matmul_kernel(6144, capability, has_bias=True, even_k=False),
        matmul_kernel(1024, capability),
        matmul_kernel(4096, capability, dtype="fp32"),
    ]


def matmul_kernel(
    out_features: int, capability: int, *, dtype: str = "bf16", has_bias: bool = False, even_k: bool = True
) -> Kernel:
    config = matmul_config(out_features, DTYPES[dtype], (capability // 10, capability % 10))
    options = " bias" * has_bias + " odd K" * (not even_k)
    matrix = {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
    return Kernel(
        name=f"product {out_features}{options}" + ("" if dtype == "bf16" else f" {dtype}"),
        function="serve_app.kernels.matmul:matmul_kernel",
        arguments=dict.fromkeys(("x", "weight", "bias", "y"), f"*{dtype}")
        | dict.fromkeys(("num_rows", "N", "K"), "i32"),
        constants={
            "HAS_BIAS": has_bias,
            "EVEN_K": even_k,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP_M": GROUP_M,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        must_have=("async_copies",) if dtype == "fp32" else (matrix, "async_copies"),
    )
