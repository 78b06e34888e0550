"""The oracle: what every kernel must compute, in plain loops, written to be read. Knows no device and no speed.

Shape suffixes: N tokens in the step, B sequences, H query heads, K kv heads, D head dim, F width of the MLP.

Everything is computed in float32 and rounded once, at the end, to the type of the input; a float64 input is computed in
float64 throughout. The examples in the docstrings are tests (tests/kernels/test_reference.py runs them).
"""

from __future__ import annotations

import torch
from torch.nn import functional

from serve_app.kernels.metadata import AttentionMetadata


def ragged_attention(
    q_NHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of each row to the cached keys of its own sequence. Returns out_NHD, in q's type.

    ``k_cache``, ``v_cache``: [num_blocks, block_size, K, D] as seen by index, whatever their strides; this step's rows
    are already written. Query head h reads kv head h // (H / K). ``sliding_window``: position i sees i - window < j <= i;
    0 sees all j <= i. ``soft_cap``: scaled scores s become cap * tanh(s / cap); 0 leaves them.

    Sequence 0 has 3 tokens in blocks 2 and 0 and two rows, sequence 1 has one token, in block 1. Keys of sequence 0 are
    0, ln 2, 0, so with q = 1 they weigh 1 : 2 : 1, and its values are 3, 6, 9:

    >>> nan, ln2 = float("nan"), 0.6931472
    >>> k_cache = torch.tensor([[0, nan], [7, nan], [0, ln2]]).view(3, 2, 1, 1)
    >>> v_cache = torch.tensor([[9, nan], [5, nan], [3, 6]]).view(3, 2, 1, 1)
    >>> metadata = AttentionMetadata(
    ...     cu_seqlens_q=torch.tensor([0, 2, 3]), seq_lens=torch.tensor([3, 1]),
    ...     block_tables=torch.tensor([[2, 0], [1, 0]]), slot_mapping=torch.tensor([5, 0, 2]),
    ...     positions=torch.tensor([1, 2, 0]), max_query_len=2, max_seq_len=3)
    >>> q_NHD = torch.ones(3, 1, 1)
    >>> ragged_attention(q_NHD, k_cache, v_cache, metadata, scale=1.0).flatten()  # (3+12)/3, (3+12+9)/4, 5
    tensor([5., 6., 5.])
    >>> ragged_attention(q_NHD, k_cache, v_cache, metadata, scale=1.0, sliding_window=2).flatten()  # row 1: (12+9)/3
    tensor([5., 7., 5.])
    """
    out_NHD = torch.empty_like(q_NHD)
    block_size = k_cache.shape[1]
    num_queries_per_kv = q_NHD.shape[1] // k_cache.shape[2]
    starts = metadata.cu_seqlens_q.tolist()
    for b, seq_len in enumerate(metadata.seq_lens.tolist()):
        blocks = metadata.block_tables[b].tolist()
        slots = [(blocks[j // block_size], j % block_size) for j in range(seq_len)]
        for row in range(starts[b], starts[b + 1]):
            position = seq_len - (starts[b + 1] - row)
            first = max(0, position - sliding_window + 1) if sliding_window else 0
            visible = slots[first : position + 1]
            for h in range(q_NHD.shape[1]):
                q_D = _wide(q_NHD[row, h])
                k_LD = torch.stack([k_cache[block, offset, h // num_queries_per_kv] for block, offset in visible])
                v_LD = torch.stack([v_cache[block, offset, h // num_queries_per_kv] for block, offset in visible])
                scores_L = (k_LD.to(q_D.dtype) @ q_D) * scale
                if soft_cap:
                    scores_L = soft_cap * torch.tanh(scores_L / soft_cap)
                out_NHD[row, h] = torch.softmax(scores_L, dim=0) @ v_LD.to(q_D.dtype)
    return out_NHD


def write_kv(
    k_NKD: torch.Tensor,
    v_NKD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Put row i into slot slot_mapping[i] = block * block_size + offset of the caches; -1: skip the row.

    >>> k_cache, v_cache = torch.zeros(2, 2, 1, 1), torch.zeros(2, 2, 1, 1)
    >>> k_NKD = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    >>> write_kv(k_NKD, 10 * k_NKD, k_cache, v_cache, torch.tensor([3, -1, 0]))
    >>> k_cache.flatten(), v_cache.flatten()
    (tensor([3., 0., 0., 1.]), tensor([30.,  0.,  0., 10.]))
    """
    block_size = k_cache.shape[1]
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot != -1:
            k_cache[slot // block_size, slot % block_size] = k_NKD[row].to(k_cache.dtype)
            v_cache[slot // block_size, slot % block_size] = v_NKD[row].to(v_cache.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, arXiv 1910.07467.

    >>> rms_norm(torch.tensor([[1.0, 7.0]]), torch.tensor([1.0, 10.0]), eps=0.0)  # mean(1, 49) = 25
    tensor([[ 0.2000, 14.0000]])
    """
    wide = _wide(x)
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps) * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``residual += x`` in place, rounded to its type; returns the norm of the rounded sum, in x's type.

    >>> residual = torch.tensor([[0.0, 4.0]])
    >>> add_rms_norm(torch.tensor([[1.0, 3.0]]), residual, torch.tensor([1.0, 10.0]), eps=0.0)
    tensor([[ 0.2000, 14.0000]])
    >>> residual
    tensor([[1., 7.]])
    """
    residual.copy_(_wide(residual) + _wide(x))
    return rms_norm(residual, weight, eps).to(x.dtype)


def rope(x_NHD: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of every head by the angles of its row's position, arXiv 2104.09864.

    ``table``: float32 [max_len, D], cos in the first half, sin in the second (serve_app.models.rope).

    >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # position 1 turns by a right angle
    >>> rope(torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]]]), table, torch.tensor([1, 0])).flatten(1)
    tensor([[-4.,  3.],
            [ 3.,  4.]])
    """
    wide = _wide(x_NHD)
    cos_N1d, sin_N1d = table[positions.long(), None].to(wide.dtype).chunk(2, dim=-1)
    first_NHd, second_NHd = wide.chunk(2, dim=-1)
    turned = (first_NHd * cos_N1d - second_NHd * sin_N1d, second_NHd * cos_N1d + first_NHd * sin_N1d)
    return torch.cat(turned, dim=-1).to(x_NHD.dtype)


def qk_norm_rope_write(
    qkv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """From the fused projection to attention's input: norm q and k, rope them, write k and v. Returns q_NHD.

    ``qkv``: [N, (H + 2 K) D], the q heads, then the k heads, then the v heads; K and D are the cache's. ``q_norm``,
    ``k_norm``: [D] or None for none. One rounding, at the end: the normed heads are roped before they are rounded.

    >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> k_cache, v_cache = torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2)
    >>> qkv = torch.tensor([[3.0, 4.0, 1.0, 0.0, 7.0, 8.0]])
    >>> qk_norm_rope_write(qkv, table, torch.tensor([1]), k_cache, v_cache, torch.tensor([3]))
    tensor([[[-4.,  3.]]])
    >>> k_cache[1, 1], v_cache[1, 1]
    (tensor([[0., 1.]]), tensor([[7., 8.]]))
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.unflatten(-1, (-1, head_dim))
    q_NHD, k_NKD, v_NKD = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    q_NHD, k_NKD = _wide(q_NHD), _wide(k_NKD)
    if q_norm is not None:
        q_NHD = rms_norm(q_NHD, q_norm, eps)
    if k_norm is not None:
        k_NKD = rms_norm(k_NKD, k_norm, eps)
    write_kv(rope(k_NKD, table, positions), v_NKD, k_cache, v_cache, slot_mapping)
    return rope(q_NHD, table, positions).to(qkv.dtype)


def silu_mul(gate_up_N2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the gate in the first half of the row, arXiv 2002.05202. Returns [N, F].

    >>> silu_mul(torch.tensor([[0.0, 2.0, 5.0, 1.0]]))  # 2 / (1 + exp(-2)) = 1.7616
    tensor([[0.0000, 1.7616]])
    """
    gate_NF, up_NF = _wide(gate_up_N2F).chunk(2, dim=-1)
    return (gate_NF * torch.sigmoid(gate_NF) * up_NF).to(gate_up_N2F.dtype)


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """A layer that gives y = x W^T + b, in x's type. ``weight``: [out, in]; ``bias``: [out] or None.

    >>> layer = linear(torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.0, 0.0, 5.0]))
    >>> layer(torch.tensor([[3.0, 4.0]]))
    tensor([[11.,  4.,  8.]])
    """
    return Linear(weight, bias)


class Linear:
    """See `linear`."""

    num_padded_rows = 0

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = _wide(x)
        bias = None if self._bias is None else self._bias.to(wide.dtype)
        return functional.linear(wide, self._weight.to(wide.dtype), bias).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """float64 as it is, everything else in float32."""
    return x if x.dtype == torch.float64 else x.float()
