"""The channel's Transport over a Ray Serve handle. Knows handles and Ray's exceptions; knows nothing of what is called.

The handle's deployment must be routed by TargetedRouter: its session id is the replica's id. What each exception means
was read and measured in Ray 2.60.

Calls and streams go over Serve's gRPC between replicas (``_by_reference=False``): an item of a stream is a message on an
open HTTP/2 connection there, where an actor's generator makes an object, its owner's bookkeeping and a call for each. But
gRPC cannot tell a dead replica from a broken connection. So when a connection breaks, the actor itself is asked, over
Ray, which knows within milliseconds. And a message has a largest size there (RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH,
4 MiB; log-probabilities of a long prompt are more): what does not fit goes over Ray too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle

from serve_app.errors import RaggedServeError, ReplicaLostError, ReplicaUnreachableError

MAX_HANDLES = 1024
"""Handles kept: one for each replica and method. Oldest are forgotten first."""
PROBE = "ping"
"""The method that a replica must have for the question whether it lives."""
PROBE_SECONDS = 1.0
"""A replica that has not answered it by then may be alive or not."""


class RayTransport:
    """Calls the replicas of ``handle``'s deployment. All its handles share one router."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._handles: dict[tuple[str, str, bool, bool], DeploymentHandle] = {}
        self._too_large: set[str] = set()
        """Replicas whose last stream broke at a message too large for gRPC: the next one goes over Ray."""

    async def call(self, replica_id: str, method: str, *args: Any) -> Any:
        """Raises the method's exception if it is ours, ReplicaLostError, ReplicaUnreachableError."""
        try:
            try:
                return await self._options(replica_id, method, False).remote(*args)
            except grpc.RpcError as error:
                if not _is_too_large(error):
                    raise
                return await self._options(replica_id, method, False, over_grpc=False).remote(*args)
        except asyncio.CancelledError:
            raise _unless_ours(replica_id, method) from None
        except Exception as error:
            raise await self._judged(_translated(error, replica_id, method), replica_id) from error

    async def stream(self, replica_id: str, method: str, *args: Any) -> AsyncGenerator[Any, None]:
        """The items of an async generator method. Closed early, it cancels the call. Raises as `call` does."""
        over_grpc = replica_id not in self._too_large
        self._too_large.discard(replica_id)
        response = self._options(replica_id, method, True, over_grpc=over_grpc).remote(*args)
        has_ended = False
        try:
            async for item in response:
                yield item
            has_ended = True
        except asyncio.CancelledError:
            raise _unless_ours(replica_id, method) from None
        except Exception as error:
            has_ended = True
            if _is_too_large(error):
                self._too_large.add(replica_id)
            raise await self._judged(_translated(error, replica_id, method), replica_id) from error
        finally:
            if not has_ended:
                response.cancel()

    async def _judged(self, error: Exception, replica_id: str) -> Exception:
        """``error``; but ReplicaLostError where it left open whether the replica lives, and the actor is dead."""
        if not isinstance(error, ReplicaUnreachableError):
            return error
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._options(replica_id, PROBE, False, over_grpc=False).remote()
        except Exception as found:
            if isinstance(found := _translated(found, replica_id, PROBE), ReplicaLostError):
                return found
        return error

    def _options(self, replica_id: str, method: str, stream: bool, *, over_grpc: bool = True) -> Any:
        """The handle with its options set: making it costs more than the call of it."""
        key = (replica_id, method, stream, over_grpc)
        handle = self._handles.get(key)
        if handle is None:
            handle = self._handle.options(
                method_name=method, session_id=replica_id, stream=stream, _by_reference=not over_grpc
            )
            self._handles[key] = handle
            if len(self._handles) > MAX_HANDLES:
                del self._handles[next(iter(self._handles))]
        return handle


def _is_too_large(error: Exception) -> bool:
    """gRPC refused a message for its size: the arguments, or a result. The method may have run, as in every broken call."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def _unless_ours(replica_id: str, method: str) -> BaseException:
    """For a CancelledError: itself if this task is being cancelled. If not, somebody cancelled the call at its far end."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        return asyncio.CancelledError()
    return ReplicaUnreachableError(f"replica {replica_id}: {method} was cancelled by somebody else")


def _translated(error: Exception, replica_id: str, method: str) -> Exception:
    """What the channel understands. An exception of the called method that is not ours stays what it is."""
    if isinstance(error, RaggedServeError) and not isinstance(error, RayTaskError):
        return error
    if isinstance(error, RayTaskError) and isinstance(error.cause, RaggedServeError):
        return error.cause
    text = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    what = f"replica {replica_id}: {method}: {type(error).__name__}: {(text or '').strip().splitlines()[0:1]}"
    if isinstance(error, ActorDiedError | ReplicaUnavailableError | DeploymentUnavailableError):
        return ReplicaLostError(what)
    if isinstance(error, RayTaskError):
        return error
    if isinstance(error, RayError | BackPressureError | RequestCancelledError | grpc.RpcError):
        # ActorUnavailableError and the like: it may be gone, or only the way to it.
        return ReplicaUnreachableError(what)
    return error
