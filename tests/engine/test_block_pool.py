"""BlockPool: reference counts, content hashes, and in which order free blocks are handed out."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest

from serve_app.engine.block_pool import BlockPool, hash_block, root_hash


def test_allocate_and_free_are_mirrors() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(3)
    assert blocks == [0, 1, 2]
    assert (pool.num_free_blocks, pool.num_used_blocks) == (2, 3)
    pool.check_invariants([blocks])
    pool.free(blocks)
    assert (pool.num_free_blocks, pool.num_used_blocks) == (5, 0)
    pool.check_invariants([])


def test_a_pool_gives_no_more_than_it_has() -> None:
    pool = BlockPool(2)
    assert pool.allocate(0) == []
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.allocate(2)


def test_a_block_is_not_freed_twice() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="block 0 freed twice"):
        pool.free(blocks)


def test_a_shared_block_is_free_when_its_last_owner_lets_go() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.share(blocks[:1])
    assert pool.num_freed_by(blocks) == 1
    pool.check_invariants([blocks, blocks[:1]])
    pool.free(blocks)
    assert pool.num_free_blocks == 2
    pool.check_invariants([blocks[:1]])
    pool.free(blocks[:1])
    assert pool.num_free_blocks == 3


def test_a_hash_names_the_whole_prefix_and_the_tenant() -> None:
    """SHA-256 over (hash of the block before, token ids as int64), the first block's parent being the salt's hash."""
    root = hashlib.sha256(b"ragged-serve kv block\x00tenant").digest()
    assert root_hash("tenant") == root
    first = hashlib.sha256(root + struct.pack("=3q", 7, 8, 9)).digest()
    assert hash_block(root, [7, 8, 9]) == first
    assert hash_block(first, [7, 8, 9]) != first
    assert hash_block(root, [7, 8]) != hash_block(root, [7, 8, 0])
    tagged = [hash_block(root, [7, 8, 9], num_prompt) for num_prompt in (None, 0, 1, 2)]
    assert len({*tagged}) == 4
    assert tagged[0] == first
    assert len({root_hash(""), root_hash("a"), root_hash("b"), root_hash("\udc80")}) == 4


def registered(pool: BlockPool, tokens: list[int], salt: str = "") -> tuple[list[int], list[bytes]]:
    """One block for each token, all known by hash; the caller owns them."""
    parent, hashes, blocks = root_hash(salt), [], pool.allocate(len(tokens))
    for block_id, token in zip(blocks, tokens, strict=True):
        parent = hash_block(parent, [token])
        pool.register(block_id, parent)
        hashes.append(parent)
    return blocks, hashes


def test_the_longest_cached_prefix_is_found_in_use_and_free() -> None:
    pool = BlockPool(8)
    blocks, hashes = registered(pool, [1, 2, 3])
    assert pool.find(hashes) == blocks
    pool.free(blocks)
    assert pool.find(hashes) == blocks
    assert pool.find([*hashes[:2], b"other", hashes[2]]) == blocks[:2]
    assert pool.find([b"other", *hashes]) == []
    assert pool.num_free_among(blocks) == 3
    pool.share(blocks[:2])
    assert pool.num_free_among(blocks) == 1
    assert pool.num_free_blocks == 6
    pool.check_invariants([blocks[:2]])


def test_unknown_blocks_are_handed_out_first_then_the_least_recently_used_tail_first() -> None:
    pool = BlockPool(6)
    old, old_hashes = registered(pool, [1, 2])
    new, new_hashes = registered(pool, [3, 4])
    unknown = pool.allocate(2)
    pool.free(old)
    pool.free(unknown)
    pool.free(new)
    assert sorted(pool.allocate(2)) == sorted(unknown)
    assert pool.allocate(1) == [old[1]]
    assert pool.find(old_hashes) == old[:1]
    pool.share(old[:1])  # used again: now younger than the others
    pool.free(old[:1])
    assert pool.allocate(3) == [new[1], new[0], old[0]]
    assert pool.find(old_hashes) == pool.find(new_hashes) == []
    assert pool.num_cached_blocks == 0


def test_a_second_block_of_equal_content_stays_unknown() -> None:
    pool = BlockPool(4)
    first, hashes = registered(pool, [1])
    second, _ = registered(pool, [1])
    assert pool.find(hashes) == first
    assert pool.num_cached_blocks == 1
    pool.free(second)
    pool.free(first)
    pool.check_invariants([])
    assert pool.find(hashes) == first


def test_without_prefix_caching_nothing_is_known() -> None:
    pool = BlockPool(2, enable_prefix_caching=False)
    _, hashes = registered(pool, [1, 2])
    assert pool.find(hashes) == []
    assert pool.num_cached_blocks == 0


def test_forget_all_empties_the_index_and_takes_nothing_from_its_owners() -> None:
    pool = BlockPool(5)
    kept, hashes = registered(pool, [1, 2])
    freed, _ = registered(pool, [3])
    pool.free(freed)
    pool.forget_all()
    assert pool.find(hashes) == []
    pool.check_invariants([kept])
    assert pool.num_free_blocks == 3
    pool.free(kept)
    pool.check_invariants([])


@pytest.mark.parametrize("damage", ["count", "free", "hash", "owner"])
def test_the_invariants_see_damage(damage: str) -> None:
    pool = BlockPool(4)
    blocks, hashes = registered(pool, [1, 2])
    owners = [blocks]
    pool.check_invariants(owners)
    if damage == "count":
        pool._ref_counts[blocks[0]] += 1
    elif damage == "free":
        pool._free_unknown.pop()
    elif damage == "hash":
        del pool._by_hash[hashes[1]]
    else:
        owners = [blocks, blocks[:1]]
    with pytest.raises(AssertionError):
        pool.check_invariants(owners)


def test_random_owners_keep_the_books() -> None:
    rng = random.Random(5)
    pool = BlockPool(17)
    owners: list[tuple[list[int], list[bytes]]] = []
    num_shared = num_evicted = 0
    for _ in range(3000):
        if owners and (rng.random() < 0.45 or pool.num_free_blocks < 3):
            blocks, _ = owners.pop(rng.randrange(len(owners)))
            pool.free(blocks)
        else:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 5))]
            hashes = []
            for token in tokens:
                hashes.append(hash_block(hashes[-1] if hashes else root_hash(""), [token]))
            found = pool.find(hashes)
            fresh = len(tokens) - len(found)
            if fresh + pool.num_free_among(found) > pool.num_free_blocks:
                continue
            num_shared += len(found)
            num_cached = pool.num_cached_blocks
            pool.share(found)
            blocks = found + pool.allocate(fresh)
            num_evicted += max(0, num_cached - pool.num_cached_blocks)
            for block_id, block_hash in list(zip(blocks, hashes, strict=True))[len(found) :]:
                pool.register(block_id, block_hash)
            owners.append((blocks, hashes))
        pool.check_invariants([blocks for blocks, _ in owners])
    assert num_shared > 500
    assert num_evicted > 100
