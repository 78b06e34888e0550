"""The fused small ops as an 8B model launches them (hidden 4096, MLP 14336, 32 + 8 heads of 128, bfloat16), and others."""

from __future__ import annotations

from loadtests.machine_code.kernel import Kernel
from serve_app.kernels import norms, qk_norm_rope_write, silu_mul

BLOCK_SIZE = 64


def kernels(capability: int) -> list[Kernel]:
    return [
        norm_kernel(4096, adds=False),
        norm_kernel(4096, adds=True),
        norm_kernel(5120, adds=True),
        silu_kernel(14336),
        qk_kernel(32, 8, 128, normed=True),
        qk_kernel(14, 2, 64, normed=False),
        qk_kernel(32, 32, 96, normed=False),
    ]


def norm_kernel(hidden_size: int, *, adds: bool) -> Kernel:
    rows, block, num_warps = norms.tile_of(hidden_size)
    return Kernel(
        name=f"{'residual + ' if adds else ''}norm {hidden_size}",
        function="serve_app.kernels.norms:rms_norm_kernel",
        arguments=dict.fromkeys(("x", "residual", "weight", "out"), "*bf16") | {"eps": "fp32", "num_rows": "i32"},
        constants={"E": hidden_size, "ROWS": rows, "BLOCK": block, "ADDS": adds},
        num_warps=num_warps,
        min_blocks=4 if num_warps <= 8 else 2,
        must_have=("wide_loads",),
    )


def silu_kernel(intermediate_size: int) -> Kernel:
    rows, block = silu_mul.tile_of(intermediate_size)
    return Kernel(
        name=f"silu x up {intermediate_size}",
        function="serve_app.kernels.silu_mul:silu_mul_kernel",
        arguments=dict.fromkeys(("gate_up", "out"), "*bf16") | {"num_rows": "i32"},
        constants={"F": intermediate_size, "ROWS": rows, "BLOCK": block},
        num_warps=silu_mul.NUM_WARPS,
        min_blocks=8,
        must_have=("wide_loads",),
    )


def qk_kernel(num_heads: int, num_kv_heads: int, head_dim: int, *, normed: bool) -> Kernel:
    half, heads, kv_heads, num_warps = qk_norm_rope_write.tile_of(num_heads, num_kv_heads, head_dim)
    pointers = ("qkv", "k_cache", "v_cache", "q_norm", "k_norm", "q_out")
    strides = tuple(f"{cache}_stride_{of}" for cache in "kv" for of in ("block", "slot", "head"))
    return Kernel(
        name=f"{'qk norm + ' if normed else ''}rope + write {num_heads}/{num_kv_heads} D{head_dim}",
        function="serve_app.kernels.qk_norm_rope_write:qk_norm_rope_write_kernel",
        arguments=dict.fromkeys(pointers, "*bf16")
        | {"table": "*fp32", "positions": "*i32", "slot_mapping": "*i32", "eps": "fp32"}
        | dict.fromkeys(strides, "i32"),
        constants={
            "H": num_heads,
            "K": num_kv_heads,
            "D": head_dim,
            "HALF": half,
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "BLOCK_SIZE": BLOCK_SIZE,
            "HAS_Q_NORM": normed,
            "HAS_K_NORM": normed,
        },
        num_warps=num_warps,
        unaligned=("positions", "slot_mapping"),
        min_blocks=16,
        must_have=("wide_loads",),
    )
