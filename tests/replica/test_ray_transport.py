"""RayTransport and TargetedRouter on a live cluster: two replicas of a small deployment, one of them killed last.

The deployment holds a real hub over an engine on its own thread, so that this is the channel as it is in service.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import warnings
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import grpc
import pytest

# Read when ray.serve is first imported, here and in every process of the cluster.
os.environ.update(
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S="0.02",
    RAY_SERVE_LOG_TO_STDERR="0",
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP="1",
)

with warnings.catch_warnings():
    # Ray 2.60 gives pydantic's Field extra keyword arguments, which pydantic 2 deprecates: its affair, once per process.
    warnings.filterwarnings("ignore", message="Using extra keyword arguments on `Field`")
    import ray.serve

from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, WorkerCrashedError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError, RequestCancelledError

from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.simulated_runner import SimulatedRunner
from serve_app.errors import (
    ChannelLostError,
    InvalidParameterError,
    InvalidPromptError,
    LeaseRefusedError,
    ReplicaLostError,
    ReplicaUnreachableError,
)
from serve_app.replica.channel import Channels
from serve_app.replica.lease_table import LeaseTable
from serve_app.replica.messages import ChannelOptions
from serve_app.replica.output_hub import ChannelHub
from serve_app.replica.ray_transport import RayTransport, _translated
from serve_app.routing.targeted_router import TargetedRouter
from tests.engine.harness import EOS, VOCAB_SIZE
from tests.replica.channel_harness import MAX_MODEL_LEN, check_tokens, collect, leased, read_on, simple_request

OPTIONS = ChannelOptions(stream_messages=7, ack_messages=5, heartbeat_seconds=0.1)


class HubReplica:
    """A replica of the service, but for the model."""

    async def __init__(self) -> None:
        runner = SimulatedRunner(
            num_kv_blocks=500,
            block_size=4,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset({EOS}),
            seconds_per_step=0.005,
        )
        engine = AsyncEngine(Engine(EngineConfig(block_size=4, max_num_seqs=16, max_num_batched_tokens=64), runner))
        engine.start()
        self.hub = ChannelHub(engine, LeaseTable(500), asyncio.get_running_loop(), OPTIONS)

    async def who(self) -> tuple[str, int]:
        return serve.get_replica_context().replica_tag, os.getpid()

    async def open_channel(self, ingress_id: str) -> int:
        return self.hub.open_channel(ingress_id)

    async def close_channel(self, channel_id: int) -> None:
        self.hub.close_channel(channel_id)

    async def submit_all(self, channel_id: int, submits: list[Any]) -> list[Any]:
        return await self.hub.submit_all(channel_id, submits)

    async def ack(self, channel_id: int, number: int, aborts: tuple[int, ...]) -> None:
        self.hub.ack(channel_id, number, aborts)

    async def outputs(self, channel_id: int, after: int) -> AsyncGenerator[Any, None]:
        async for message in self.hub.outputs(channel_id, after):
            yield message

    async def ping(self) -> None:
        self.num_pings = getattr(self, "num_pings", 0) + 1

    async def pings(self) -> int:
        return getattr(self, "num_pings", 0)

    async def length(self, data: bytes) -> int:
        return len(data)

    async def zeros(self, sizes: list[int]) -> AsyncGenerator[bytes, None]:
        for size in sizes:
            yield bytes(size)

    async def fail(self, how: str) -> None:
        if how == "cancelled":
            raise asyncio.CancelledError
        if how == "ours":
            raise InvalidParameterError("field", 7, "something else")
        raise ValueError("not ours")


@pytest.fixture(scope="module")
def handle() -> Iterator[Any]:
    """The handle of two replicas."""
    ray.init(num_cpus=2, include_dashboard=False, namespace="serve", log_to_driver=False)
    try:
        deployment = serve.deployment(
            HubReplica,
            num_replicas=2,
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=100,
            health_check_period_s=0.5,
            graceful_shutdown_wait_loop_s=0.05,
            graceful_shutdown_timeout_s=2,
            request_router_config=RequestRouterConfig(
                request_router_class=TargetedRouter, request_router_kwargs={"seconds_for_unknown": 0.2}
            ),
        )
        serve.start(proxy_location="Disabled")
        yield serve.run(deployment.bind(), name="transport", route_prefix=None)
    finally:
        serve.shutdown()
        ray.shutdown()


def replica_ids() -> list[str]:
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    found = details["applications"]["transport"]["deployments"]["HubReplica"]["replicas"]
    return [replica["replica_id"] for replica in found if replica["state"] == "RUNNING"]


def test_calls_reach_the_replica_they_name(handle: Any) -> None:
    async def test() -> None:
        transport = RayTransport(handle)
        ids = replica_ids()
        assert len(ids) == 2
        wanted = ids * 10
        found = await asyncio.gather(*(transport.call(replica_id, "who") for replica_id in wanted))
        assert [replica_id for replica_id, _ in found] == wanted
        assert len({pid for _, pid in found}) == 2
        with pytest.raises(ReplicaLostError, match="nobody"):
            await transport.call("nobody", "who")
        with pytest.raises(ReplicaLostError, match="nobody"):
            await anext(transport.stream("nobody", "outputs", 0, 0))

    asyncio.run(test())


def test_what_is_too_large_for_grpc_goes_over_ray(handle: Any) -> None:
    """4 MiB is its default. A stream breaks there, and is opened again by the channel from the last message it has."""
    large = 5 << 20

    async def test() -> None:
        transport = RayTransport(handle)
        replica_id = replica_ids()[0]
        assert await transport.call(replica_id, "length", bytes(large)) == large
        sizes = [len(item) async for item in transport.stream(replica_id, "zeros", [3, 1 << 20])]
        assert sizes == [3, 1 << 20]
        stream = transport.stream(replica_id, "zeros", [3, large, 4])
        assert len(await anext(stream)) == 3
        with pytest.raises(ReplicaUnreachableError, match="larger than max"):
            await anext(stream)
        assert [len(item) async for item in transport.stream(replica_id, "zeros", [large, 4])] == [large, 4]
        # Once: the next stream tries gRPC again.
        with pytest.raises(ReplicaUnreachableError):
            await anext(transport.stream(replica_id, "zeros", [large]))

    asyncio.run(test())


def test_a_broken_connection_is_judged_by_asking_the_actor(handle: Any) -> None:
    """gRPC says the same of a dead replica and of a lost connection; the kill is the last test's."""

    async def test() -> None:
        transport = RayTransport(handle)
        first = replica_ids()[0]
        unreachable = ReplicaUnreachableError("planted")
        before = await transport.call(first, "pings")
        assert await transport._judged(unreachable, first) is unreachable
        assert await transport.call(first, "pings") == before + 1
        assert isinstance(await transport._judged(unreachable, "nobody"), ReplicaLostError)
        other = KeyError("not asked about")
        assert await transport._judged(other, first) is other
        assert await transport.call(first, "pings") == before + 1

    asyncio.run(test())


def test_exceptions_of_the_replica_arrive_as_they_are(handle: Any) -> None:
    async def test() -> None:
        transport = RayTransport(handle)
        replica_id = replica_ids()[0]
        with pytest.raises(InvalidParameterError, match="field is 7") as caught:
            await transport.call(replica_id, "fail", "ours")
        assert type(caught.value) is InvalidParameterError
        assert caught.value.param == "field"
        with pytest.raises(ValueError, match="not ours"):
            await transport.call(replica_id, "fail", "other")
        with pytest.raises(ReplicaUnreachableError):
            await transport.call(replica_id, "fail", "cancelled")
        with pytest.raises(ChannelLostError, match="channel 12345 is not known"):
            await anext(transport.stream(replica_id, "outputs", 12345, 0))
        channels = Channels(transport, "ingress", OPTIONS)
        with pytest.raises(LeaseRefusedError, match="501"):
            await channels.submit(replica_id, simple_request("a"), 501)
        with pytest.raises(InvalidPromptError):
            await channels.submit(replica_id, [dataclasses.replace(simple_request("b")[0], prompt_token_ids=())], 5)
        await channels.close()

    asyncio.run(test())


def test_tokens_arrive_exactly_over_reopened_streams(handle: Any) -> None:
    async def test() -> None:
        ids = replica_ids()
        channels = Channels(transport := RayTransport(handle), "ingress", OPTIONS)
        opened = 0
        stream = transport.stream

        def counted(replica_id: str, method: str, *args: Any) -> AsyncGenerator[Any, None]:
            nonlocal opened
            opened += 1
            return stream(replica_id, method, *args)

        transport.stream = counted  # type: ignore[method-assign]
        requests = [simple_request(f"r{i}", n=1 + i % 3, max_tokens=40) for i in range(12)]
        outputs = await asyncio.gather(*(channels.submit(ids[i % 2], r, 30) for i, r in enumerate(requests)))
        for request, some in zip(requests, await asyncio.gather(*map(collect, outputs)), strict=True):
            check_tokens(request, some)
        assert opened >= 4  # both were opened again; how often depends on how many steps shared a message
        aborted = await channels.submit(ids[0], simple_request("long", max_tokens=190), 60)
        aborted.abort()
        await aborted.ended()
        assert aborted.error is None
        await channels.close()

    asyncio.run(test())


def test_a_killed_replica_is_lost_and_its_request_goes_on_elsewhere(handle: Any) -> None:
    """The last test: one of the two is gone after it."""

    async def test() -> None:
        transport = RayTransport(handle)
        first, second = replica_ids()
        channels = Channels(transport, "ingress", OPTIONS)
        request = simple_request("a", max_tokens=150)
        outputs = await channels.submit(first, request, 60)
        some = await outputs.next()
        _, pid = await transport.call(first, "who")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ReplicaLostError):
            await read_on(outputs, some)
        tokens = tuple(token for output in some for token in output.token_ids)
        assert 0 < len(tokens) < 150
        with pytest.raises(ReplicaLostError):
            await channels.submit(first, simple_request("b"), 5)
        rest = leased([dataclasses.replace(request[0], output_token_ids=tokens)], attempt=1)
        check_tokens(request, some + await collect(await channels.submit(second, rest, 60)))
        await channels.close()

    asyncio.run(test())


def test_what_each_exception_becomes() -> None:
    def becomes(error: Exception) -> type[Exception]:
        return type(_translated(error, "replica0", "submit"))

    assert becomes(ActorDiedError()) is ReplicaLostError
    assert becomes(ReplicaUnavailableError("replica0")) is ReplicaLostError
    assert becomes(ActorUnavailableError("planted", b"\0" * 16)) is ReplicaUnreachableError
    assert becomes(WorkerCrashedError()) is ReplicaUnreachableError
    assert becomes(BackPressureError(1, 1)) is ReplicaUnreachableError
    assert becomes(RequestCancelledError("x")) is ReplicaUnreachableError
    assert becomes(grpc.RpcError()) is ReplicaUnreachableError
    assert becomes(InvalidPromptError("0 tokens")) is InvalidPromptError
    assert becomes(KeyError("x")) is KeyError
    wrapped = RayTaskError("f", "traceback", InvalidParameterError("n", 1, "2")).as_instanceof_cause()
    assert isinstance(wrapped, InvalidParameterError)
    assert becomes(wrapped) is InvalidParameterError
    assert issubclass(becomes(RayTaskError("f", "t", KeyError("x")).as_instanceof_cause()), RayTaskError)
