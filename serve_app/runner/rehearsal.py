"""Pretend steps for start-up: whatever shapes and parameters requests may bring, before there are any. Knows plans only.

A pretend sequence has all its tokens in blocks "shared with others", so its step writes no K and V, and every page of it
is block 0, so that a cache of one block is enough.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from serve_app.engine.request import GenerateRequest, SamplingParams
from serve_app.engine.scheduler import ScheduledSequence, SchedulerOutput
from serve_app.engine.sequence import Sequence

GREEDY = SamplingParams(seed=0, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(seed=0, temperature=0.7, top_k=5, top_p=0.9, ignore_eos=True)


def pretend(
    spans: SequenceOf[tuple[int, int]], block_size: int, *, sampling: SamplingParams = GREEDY, samples: bool = True
) -> SchedulerOutput:
    """One sequence for each (start, number of tokens), in slots 0, 1, ...; a span of one token is a decode."""
    scheduled = []
    for slot, (start, num_tokens) in enumerate(spans):
        end = start + num_tokens
        num_prompt = end if num_tokens > 1 else max(1, start)
        tokens = [0] * end
        request = GenerateRequest(
            f"start-up {slot}", tuple(tokens[:num_prompt]), sampling.resolved(), tuple(tokens[num_prompt:])
        )
        sequence = Sequence(request, arrival=slot, max_output_tokens=end + 1, stop_ids=frozenset(), deadline=None)
        sequence.slot = slot
        sequence.block_ids = [0] * -(-end // block_size)
        sequence.num_shared_tokens = end
        scheduled.append(ScheduledSequence(sequence, start, num_tokens, samples))
    return SchedulerOutput(scheduled, sum(num_tokens for _, num_tokens in spans))


def largest_spans(max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int) -> list[tuple[int, int]]:
    """As many tokens, and as many sequences that sample, as one step can have.

    >>> largest_spans(100, 3, 60)
    [(0, 59), (0, 40), (0, 1)]
    """
    longest = max_model_len - 1  # a prompt leaves room for one token
    spans: list[tuple[int, int]] = []
    left = max_num_batched_tokens
    for behind in reversed(range(max_num_seqs)):
        num_tokens = max(1, min(longest, left - behind))
        spans.append((0, num_tokens))
        left -= num_tokens
        if left == 0:
            break
    return spans


def variants(max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int) -> list[list[tuple[int, int]]]:
    """Shapes that make Triton compile what it has not yet: a number of 1, a multiple of 16, neither; each class of rows.

    (Arguments that change from step to step are either not specialised or take these kinds of values only.)
    """
    last = max_model_len - 2
    chunks = [1, 2, 16, 17, 32]
    shapes = [[(0, num)] for num in chunks]
    shapes += [[(min(300, last), 1)] * num for num in (1, 3, 16, 17)]
    shapes += [[(min(5, last), 1), (0, num)] for num in (15, 16)]
    longest = max_model_len - 1
    return [
        spans
        for spans in shapes
        if sum(num for _, num in spans) <= max_num_batched_tokens
        and len(spans) <= max_num_seqs
        and all(start >= 0 and start + num <= longest for start, num in spans)
    ]
