"""Log-probabilities from logits on a GPU, with bits that do not depend on the batch. Knows rows; knows no sampling.

One program walks over a row in blocks of 4096, from the first to the last: the largest logit so far, and the sum of the
exponentials below it, rescaled when a larger one comes (the online softmax, arXiv 1805.02867). Nothing about the walk
depends on the other rows. In float32. A row of 128 k logits in 16 bits is read once for `log_sum_exp`, and a second time,
then from L2, for `log_softmax`.

-inf among the logits is a token that must not come: its log-probability is -inf. A row without anything finite, with
NaN or with +inf gives NaN, as torch does.
"""

# mypy: allow-incomplete-defs
# (Triton reads the annotations of a kernel: only constants have one.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def log_softmax_kernel(logits, log_sums, out, stride, V, WRITES: tl.constexpr, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK)
    p_logits = logits + i_row * stride
    largest = tl.full((), -float("inf"), dtype=tl.float32)
    total = tl.full((), 0.0, dtype=tl.float32)
    for start in range(0, V, BLOCK):
        # [BLOCK]
        b_logits = tl.load(p_logits + start + o_v, mask=start + o_v < V, other=-float("inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(b_logits, axis=0))
        # Where all so far is -inf, 0 stands for it: exp(-inf - 0) is 0 and not NaN.
        base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(b_logits - base), axis=0)
        largest = new_largest
    log_sum = largest + tl.log(total)
    tl.store(log_sums + i_row, log_sum)
    if WRITES:
        p_out = out + i_row * V
        for start in range(0, V, BLOCK):
            m_v = start + o_v < V
            b_logits = tl.load(p_logits + start + o_v, mask=m_v, other=0.0).to(tl.float32)
            tl.store(p_out + start + o_v, b_logits - log_sum, mask=m_v)


def log_sum_exp(logits_SV: torch.Tensor) -> torch.Tensor:
    """ln of the sum of exp over each row, float32 [S]. ``logits_SV``: any stride between rows, 1 within.

    For the logits ln 1, ln 3: ln 4 = 1.3863.
    """
    return _run(logits_SV, None)


def log_softmax(logits_SV: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all tokens, float32 [S, V], contiguous. For the logits ln 1, ln 3: -1.3863, -0.2877."""
    out = torch.empty(logits_SV.shape, dtype=torch.float32, device=logits_SV.device)
    _run(logits_SV, out)
    return out


def token_log_probs(logits_SV: torch.Tensor, token_ids_SR: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of R tokens of each row, float32 [S, R]. ``token_ids_SR``: int64. No [S, V] is made.

    For the logits ln 1, ln 3 and the token 1: -0.2877.
    """
    return logits_SV.gather(1, token_ids_SR).float() - log_sum_exp(logits_SV)[:, None]


def _run(logits_SV: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    num_rows, vocab_size = logits_SV.shape
    assert vocab_size >= 1 and logits_SV.stride(1) == 1
    log_sums = torch.empty(num_rows, dtype=torch.float32, device=logits_SV.device)
    if num_rows:
        log_softmax_kernel[(num_rows,)](
            logits_SV,
            log_sums,
            log_sums if out is None else out,
            logits_SV.stride(0),
            vocab_size,
            WRITES=out is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return log_sums
