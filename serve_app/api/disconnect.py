"""Work that ends when the client goes away. Knows ASGI's receive, and no route."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from starlette.types import Receive


async def until_disconnect(receive: Receive, work: Any) -> Any:
    """Runs the coroutine ``work``; cancels it when the client goes away, and then returns None."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        return None
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
