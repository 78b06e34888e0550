"""BlockPool: who owns which KV block. Knows ids, reference counts and content hashes; knows no tensors, no sequences.

    a block is   in use   ref_count > 0
                 free     ref_count = 0, in the free list; if its content is still known by hash it can be found again

Blocks whose content nobody can find again are handed out first, the others in least-recently-used order.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_hash(cache_salt: str) -> bytes:
    """The parent of a sequence's first block: tenants with different salts never share a block."""
    return hashlib.sha256(b"ragged-serve kv block\x00" + cache_salt.encode("utf-8", "surrogatepass")).digest()


def hash_block(parent: bytes, token_ids: Sequence[int], num_prompt: int | None = None) -> bytes:
    """SHA-256 over the parent block's hash and this block's token ids (as int64): names the whole prefix.

    ``num_prompt``: where prompt and output positions are computed by different kernels and bits are promised, how many
    of a block's positions belong to the prompt, if not all. So a block of outputs is found again by the request that
    recomputes them, and not by one whose prompt repeats them. None: all of them, or nobody asks.
    """
    tag = b"" if num_prompt is None else b"output" + num_prompt.to_bytes(4, "little")
    return hashlib.sha256(parent + array("q", token_ids).tobytes() + tag).digest()


class BlockPool:
    """``num_blocks`` blocks with reference counts and a prefix index."""

    def __init__(self, num_blocks: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free_unknown: list[int] = list(range(num_blocks - 1, -1, -1))
        self._free_cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_unknown) + len(self._free_cached)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks, used or free, that a prefix lookup can find."""
        return len(self._by_hash)

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes ``num_blocks`` free blocks, each with one reference. The caller checks num_free_blocks first."""
        assert 0 <= num_blocks <= self.num_free_blocks, (num_blocks, self.num_free_blocks)
        return [self._allocate_one() for _ in range(num_blocks)]

    def _allocate_one(self) -> int:
        if self._free_unknown:
            block_id = self._free_unknown.pop()
        else:
            block_id, _ = self._free_cached.popitem(last=False)
            self._forget(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Ids of the longest leading run of ``hashes`` that is cached. Takes no reference."""
        found = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these would leave the free list if they were shared."""
        return sum(1 for block_id in block_ids if self._ref_counts[block_id] == 0)

    def num_freed_by(self, block_ids: Iterable[int]) -> int:
        """How many of these would become free if their owner let go of them."""
        return sum(1 for block_id in block_ids if self._ref_counts[block_id] == 1)

    def share(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each block: one in use gains an owner, a cached free one leaves the free list."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free_cached[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Drops a reference from each block. Tails go first, so that a shared prefix is the last to be evicted."""
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id] - 1
            assert count >= 0, f"block {block_id} freed twice"
            self._ref_counts[block_id] = count
            if count == 0:
                if self._hashes[block_id] is None:
                    self._free_unknown.append(block_id)
                else:
                    self._free_cached[block_id] = None

    def register(self, block_id: int, block_hash: bytes) -> None:
        """The block is full and computed: it can be found by this hash. A second one of equal content stays unknown."""
        if not self.enable_prefix_caching or block_hash in self._by_hash:
            return
        assert self._ref_counts[block_id] > 0, f"block {block_id} is free, so its content is nobody's"
        assert self._hashes[block_id] is None, f"block {block_id} has a hash already"
        self._by_hash[block_hash] = block_id
        self._hashes[block_id] = block_hash

    def forget_all(self) -> None:
        """Empties the prefix index (weights changed, or a step left blocks in doubt). Owners keep their blocks."""
        self._by_hash.clear()
        self._hashes = [None] * self.num_blocks
        self._free_unknown.extend(self._free_cached)
        self._free_cached.clear()

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hashes[block_id] = None

    def check_invariants(self, owners: Iterable[Sequence[int]]) -> None:
        """``owners``: the block lists of all sequences. free + used = total, counts equal owners, hashes point back."""
        counts = [0] * self.num_blocks
        for block_ids in owners:
            assert len(set(block_ids)) == len(block_ids), f"a sequence holds a block twice: {block_ids}"
            for block_id in block_ids:
                counts[block_id] += 1
        assert counts == self._ref_counts, "reference counts differ from the owners' block lists"
        free = [*self._free_unknown, *self._free_cached]
        assert len(free) == len(set(free)), "a block is free twice"
        assert sorted(free) == [i for i, count in enumerate(counts) if count == 0], "free list differs from the counts"
        known = {i for i, block_hash in enumerate(self._hashes) if block_hash is not None}
        assert known.isdisjoint(self._free_unknown), "a block that can be found is free as one that cannot"
        assert known.issuperset(self._free_cached), "a block that cannot be found is free as one that can"
        assert {self._hashes[i]: i for i in known} == self._by_hash, "hashes do not point back to their blocks"
