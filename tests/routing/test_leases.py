"""The blocks of a request."""

from __future__ import annotations

import pytest

from serve_app.routing.leases import num_blocks_for


@pytest.mark.parametrize(
    ("prompt", "output", "choices", "block_size", "blocks"),
    [
        (70, 30, 2, 32, 6),
        (1, 1, 1, 32, 1),
        (32, 1, 3, 32, 4),
        (31, 1, 3, 32, 3),
        (33, 31, 1, 32, 2),
        (33, 32, 1, 32, 3),
    ],
)
def test_full_prompt_blocks_are_shared_and_the_rest_is_not(
    prompt: int, output: int, choices: int, block_size: int, blocks: int
) -> None:
    assert num_blocks_for(prompt, output, choices, block_size) == blocks
