"""The channel's Transport over a Ray Serve handle. Knows handles and Ray's exceptions; knows nothing of what is called.

The handle's deployment must be routed by TargetedRouter: its session id is the replica's id. What each exception means
was read and measured in Ray 2.60.
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


class RayTransport:
    """Calls the replicas of ``handle``'s deployment. All its handles share one router."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._handles: dict[tuple[str, str, bool], DeploymentHandle] = {}

    async def call(self, replica_id: str, method: str, *args: Any) -> Any:
        """Raises the method's exception if it is ours, ReplicaLostError, ReplicaUnreachableError."""
        try:
            return await self._options(replica_id, method, False).remote(*args)
        except asyncio.CancelledError:
            raise _unless_ours(replica_id, method) from None
        except Exception as error:
            raise _translated(error, replica_id, method) from error

    async def stream(self, replica_id: str, method: str, *args: Any) -> AsyncGenerator[Any, None]:
        """The items of an async generator method. Closed early, it cancels the call. Raises as `call` does."""
        response = self._options(replica_id, method, True).remote(*args)
        has_ended = False
        try:
            async for item in response:
                yield item
            has_ended = True
        except asyncio.CancelledError:
            raise _unless_ours(replica_id, method) from None
        except Exception as error:
            has_ended = True
            raise _translated(error, replica_id, method) from error
        finally:
            if not has_ended:
                response.cancel()

    def _options(self, replica_id: str, method: str, stream: bool) -> Any:
        """The handle with its options set: making it costs more than the call of it."""
        key = (replica_id, method, stream)
        handle = self._handles.get(key)
        if handle is None:
            handle = self._handle.options(method_name=method, session_id=replica_id, stream=stream)
            self._handles[key] = handle
            if len(self._handles) > MAX_HANDLES:
                del self._handles[next(iter(self._handles))]
        return handle


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
    what = f"replica {replica_id}: {method}: {type(error).__name__}: {str(error).strip().splitlines()[0:1]}"
    if isinstance(error, ActorDiedError | ReplicaUnavailableError | DeploymentUnavailableError):
        return ReplicaLostError(what)
    if isinstance(error, RayTaskError):
        return error
    if isinstance(error, RayError | BackPressureError | RequestCancelledError | grpc.RpcError):
        # ActorUnavailableError and the like: it may be gone, or only the way to it.
        return ReplicaUnreachableError(what)
    return error
