"""The replica's table: what fits is opened, what does not is refused with the numbers, what is left behind expires."""

from __future__ import annotations

import random

import pytest

from serve_app.errors import LeaseRefusedError
from serve_app.replica.lease_table import LeaseTable
from serve_app.routing.leases import BookedLease


def test_a_lease_opens_grows_and_ends() -> None:
    table = LeaseTable(10)
    table.open("x", "h", 4, 0.0)
    table.open("y", "h", 6, 0.0)
    assert (table.num_free_blocks, len(table), "x" in table, "z" in table) == (0, 2, True, False)
    assert table.grow("x", 7)
    assert table.num_free_blocks == -3
    assert table.num_grown_past_pool == 1
    assert table.grow("x", 5), "what shrinks stays as it is"
    assert table.rows() == (BookedLease("x", "h", 7), BookedLease("y", "h", 6))
    table.check_invariants()
    assert table.end("x")
    assert not table.end("x")
    assert not table.grow("x", 9)
    assert (table.num_free_blocks, table.num_ended) == (4, 1)
    table.check_invariants()


@pytest.mark.parametrize("num_blocks", [4, 11, 0, -1])
def test_what_does_not_fit_is_refused_by_numbers(num_blocks: int) -> None:
    table = LeaseTable(10)
    table.open("x", "h", 7, 0.0)
    with pytest.raises(LeaseRefusedError, match=f"lease y asks for {num_blocks} blocks; 3 of 10 are free"):
        table.open("y", "h", num_blocks, 0.0)
    assert (table.num_refused, table.rows()) == (1, (BookedLease("x", "h", 7),))
    table.open("y", "h", 3, 0.0)
    table.check_invariants()


def test_nothing_opens_past_the_pool_and_nothing_twice() -> None:
    table = LeaseTable(5)
    table.open("x", "h", 2, 0.0)
    with pytest.raises(LeaseRefusedError, match="open already"):
        table.open("x", "h", 2, 0.0)
    table.grow("x", 8)
    with pytest.raises(LeaseRefusedError, match="asks for 1 blocks; -3 of 5 are free"):
        table.open("y", "h", 1, 0.0)
    table.check_invariants()


def test_the_leases_of_a_silent_holder_expire_and_a_late_renewal_moves_nothing_back() -> None:
    table = LeaseTable(100)
    for i, holder_id in enumerate(["a", "b", "a", "b"]):
        table.open(f"x{i}", holder_id, 1, 0.0)
    table.renew("a", 6.0)
    table.renew("a", 2.0)
    table.renew("nobody", 6.0)
    assert table.expired(9.9, 10.0) == []
    assert table.expired(10.0, 10.0) == ["x1", "x3"]
    assert table.expired(16.0, 10.0) == ["x0", "x1", "x2", "x3"]
    table.open("x4", "b", 1, 11.0)  # to open is to live
    assert table.expired(12.0, 10.0) == []
    table.check_invariants()


def test_random_runs_against_a_dictionary() -> None:
    rng = random.Random(3)
    refused = past = expired = 0
    for _ in range(20):
        table, model = LeaseTable(17), dict[str, BookedLease]()
        renewed: dict[str, float] = {}
        for now in range(400):
            lease_id, holder_id, num_blocks = f"x{rng.randrange(12)}", rng.choice("abc"), rng.randint(1, 6)
            match rng.randrange(5):
                case 0:
                    fits = lease_id not in model and num_blocks <= 17 - sum(r.num_blocks for r in model.values())
                    if fits:
                        table.open(lease_id, holder_id, num_blocks, now)
                        model[lease_id] = BookedLease(lease_id, holder_id, num_blocks)
                        renewed[holder_id] = now
                    else:
                        refused += 1
                        with pytest.raises(LeaseRefusedError):
                            table.open(lease_id, holder_id, num_blocks, now)
                case 1:
                    assert table.grow(lease_id, num_blocks) == (lease_id in model)
                    if lease_id in model:
                        row = model[lease_id]
                        model[lease_id] = row._replace(num_blocks=max(row.num_blocks, num_blocks))
                case 2:
                    assert table.end(lease_id) == (model.pop(lease_id, None) is not None)
                case 3:
                    table.renew(holder_id, now)
                    renewed[holder_id] = now
                case 4:
                    gone = table.expired(now, 20.0)
                    assert gone == [i for i, row in model.items() if renewed[row.holder_id] + 20 <= now]
                    expired += len(gone)
                    for lease_id in gone:
                        assert table.end(lease_id)
                        del model[lease_id]
            assert table.rows() == tuple(model.values())
            table.check_invariants()
            past += table.num_free_blocks < 0
    assert refused > 100
    assert past > 20
    assert expired > 5
