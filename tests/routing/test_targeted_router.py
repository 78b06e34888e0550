"""TargetedRouter on replicas that are none: an id finds its replica, at once or not at all. No cluster."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

with warnings.catch_warnings():
    # Ray 2.60 gives pydantic's Field extra keyword arguments, which pydantic 2 deprecates: its affair, once per process.
    warnings.filterwarnings("ignore", message="Using extra keyword arguments on `Field`")
    import ray.serve  # noqa: F401

from ray.serve._private.common import DeploymentHandleSource, RequestMetadata
from ray.serve._private.test_utils import FAKE_REPLICA_DEPLOYMENT_ID, FakeRunningReplica
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.request_router import PendingRequest

from serve_app.errors import ReplicaUnreachableError
from serve_app.routing.targeted_router import TargetedRouter


def make_router(**options: Any) -> TargetedRouter:
    router = TargetedRouter(
        deployment_id=FAKE_REPLICA_DEPLOYMENT_ID, handle_source=DeploymentHandleSource.REPLICA, self_actor_id="test"
    )
    router.initialize_state(**options)
    return router


def replicas(*names: str) -> list[Any]:
    fakes = [FakeRunningReplica(name) for name in names]
    for fake in fakes:
        fake.set_queue_len_response(0)  # the base class asks new ones
    return fakes


async def choose(router: TargetedRouter, replica_id: str, *, is_retry: bool = False) -> Any:
    metadata = RequestMetadata(request_id="one", internal_request_id="same for all", session_id=replica_id)
    return await router._choose_replica_for_request(
        PendingRequest(args=[], kwargs={}, metadata=metadata), is_retry=is_retry
    )


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        await test()
        # The base class looks at new replicas in tasks of its own.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)

    asyncio.run(whole())


def test_an_id_finds_its_replica() -> None:
    async def test() -> None:
        router = make_router()
        some = replicas("a", "b", "c")
        router.update_replicas(some)
        # Many at once, all under one request id: they are not mixed up.
        wanted = ["c", "a", "b", "a"] * 5
        found = await asyncio.gather(*(choose(router, name) for name in wanted))
        assert [replica.replica_id.unique_id for replica in found] == wanted
        assert await choose(router, "a") is some[0]

    on_a_loop(test)


def test_an_id_that_never_comes_fails() -> None:
    async def test() -> None:
        router = make_router(seconds_for_unknown=0.01)
        for known in ((), ("a",)):
            router.update_replicas(replicas(*known))
            with pytest.raises(ReplicaUnavailableError) as caught:
                await choose(router, "nobody")
            assert "nobody" in caught.value.message
        router = make_router(seconds_for_unknown=10_000)
        with pytest.raises(ReplicaUnavailableError):
            await choose(router, "")  # no id is no replica, and none will come

    on_a_loop(test)


def test_an_id_that_comes_a_little_later_is_waited_for() -> None:
    async def test() -> None:
        router = make_router(seconds_for_unknown=10_000)
        router.update_replicas(replicas("a"))
        waiting = [asyncio.create_task(choose(router, name)) for name in ("b", "c", "b")]
        await asyncio.sleep(0)
        router.update_replicas(replicas("a", "b"))
        first = await waiting[0]
        assert first.replica_id.unique_id == "b"
        assert await waiting[2] is first
        assert not waiting[1].done()
        router.update_replicas(replicas("c"))
        assert (await waiting[1]).replica_id.unique_id == "c"

    on_a_loop(test)


def test_a_replica_that_left_the_set_is_still_reached() -> None:
    async def test() -> None:
        router = make_router(seconds_for_unknown=10_000)
        some = replicas("a", "b")
        router.update_replicas(some)
        router.update_replicas(some[1:])
        assert list(router.curr_replicas) == [some[1].replica_id]
        assert await choose(router, "a") is some[0]
        # It comes back under another wrapper, as after a restart of the controller.
        again = replicas("a", "b")
        router.update_replicas(again)
        assert await choose(router, "a") is again[0]
        assert not router._departed

    on_a_loop(test)


def test_a_dead_replica_fails_at_once() -> None:
    async def test() -> None:
        router = make_router(seconds_for_unknown=10_000)
        some = replicas("a", "b", "c")
        router.update_replicas(some)
        router.update_replicas(some[:2])
        for dead in (some[0], some[2]):  # one of the set, one that had left it
            router.on_replica_actor_died(dead.replica_id)
            for is_retry in (False, True):
                with pytest.raises(ReplicaUnavailableError):
                    await choose(router, dead.replica_id.unique_id, is_retry=is_retry)
        assert await choose(router, "b") is some[1]
        router.update_replicas(some[1:2])  # Serve hears of the death: nothing changes
        with pytest.raises(ReplicaUnavailableError):
            await choose(router, "a")

    on_a_loop(test)


def test_one_that_dies_while_a_call_waits_for_it() -> None:
    async def test() -> None:
        router = make_router(seconds_for_unknown=10_000)
        waiting = asyncio.create_task(choose(router, "a"))
        await asyncio.sleep(0)
        router.on_replica_actor_died(replicas("a")[0].replica_id)
        with pytest.raises(ReplicaUnavailableError):
            await waiting

    on_a_loop(test)


def test_a_call_that_was_not_taken_is_not_sent_again() -> None:
    async def test() -> None:
        router = make_router()
        router.update_replicas(replicas("a", "b"))
        with pytest.raises(ReplicaUnreachableError, match="a did not take"):
            await choose(router, "a", is_retry=True)
        with pytest.raises(ReplicaUnavailableError):
            await choose(router, "nobody", is_retry=True)

    on_a_loop(test)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    # Once a cluster ran in this process, Ray has put copies of the class's methods in place, with globals of their own.
    remember = TargetedRouter.update_replicas.__globals__["_remember"]
    monkeypatch.setitem(remember.__globals__, "MAX_DEPARTED", 3)

    async def test() -> None:
        router = make_router(seconds_for_unknown=0.01)
        for i in range(10):
            some = replicas(f"r{i}")
            router.update_replicas(some)
            if i % 2:
                router.on_replica_actor_died(some[0].replica_id)
        router.update_replicas([])
        assert list(router._departed) == ["r4", "r6", "r8"]
        assert list(router._dead) == ["r5", "r7", "r9"]

    on_a_loop(test)


def test_a_misspelt_option_is_named() -> None:
    async def test() -> None:
        with pytest.raises(TypeError, match="seconds_for_unknwon"):
            make_router(seconds_for_unknwon=1.0)
        router = make_router()
        some = replicas("a", "b")
        assert await router.choose_replicas(some) == [some]

    on_a_loop(test)
