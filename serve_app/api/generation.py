"""Generation: the outputs of streams become the bytes of one answer, while it is made. Knows streams, texts and answers;
knows no route, no model, no router.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from serve_app.api.answers import Answer
from serve_app.api.ingress_counts import RequestTimes
from serve_app.api.stream import GenerationStream
from serve_app.engine.request import FinishReason, TokenOutput
from serve_app.errors import RaggedServeError
from serve_app.text.parsed_stream import ParsedStream
from serve_app.text.text_stream import TextStream

Texts = dict[tuple[int, int], TextStream | ParsedStream]
"""By prompt and choice."""


class Generation:
    """The answer to one request while it is made. ``count_running``: takes 1 when it begins, -1 when it is over."""

    def __init__(
        self,
        answer: Answer,
        streams: Sequence[GenerationStream],
        texts: Texts,
        times: RequestTimes,
        count_running: Callable[[int], None],
    ) -> None:
        self.answer = answer
        self.streams = streams
        self.has_ended = False
        """The chunk that has come, or comes next, is the last one."""
        self.error: Exception | None = None
        """What ended it, if it did not end by itself."""
        self._count_running = count_running
        self._texts = texts
        self._times = times

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """What to send, as it comes; the last chunk is the answer's end. Close it (``aclose``) to give up.

        Raises what a stream raises, and the error that ended a choice.
        """
        # Asked of the answer, never of the streams: `_merge` reads them in tasks, ahead of what is in the answer.
        answer = self.answer
        self._count_running(1)
        last = b""
        try:
            # Leaving a block closes its streams, which settles their leases: before the reader sees the end.
            if len(self.streams) == 1:
                async with contextlib.aclosing(self.streams[0].batches()) as batches:  # type: ignore[type-var]
                    async for batch in batches:
                        last = self._take(0, batch)
                        if answer.has_ended:
                            break
                        if last:
                            yield last
            else:
                async with contextlib.aclosing(_merge([s.batches() for s in self.streams])) as merged:
                    async for prompt_index, batch in merged:
                        last = self._take(prompt_index, batch)
                        if answer.has_ended:
                            break
                        if last:
                            yield last
            if not answer.has_ended:
                raise RuntimeError("the streams are over, and a choice has no end")  # an error, and never a silent cut
            self.has_ended = True
            leased = [s.leased_at for s in self.streams if s.leased_at is not None]
            self._times.answered(min(leased, default=None), asyncio.get_running_loop().time())
            yield last + answer.end()
        except (asyncio.CancelledError, GeneratorExit):
            self._broken(FinishReason.ABORT)
            raise
        except Exception as error:
            self.error = error
            self._broken(FinishReason.ERROR)
            raise
        finally:
            self._count_running(-1)

    def _broken(self, reason: FinishReason) -> None:
        """Not of a request that was refused, or went while it waited: that is in the HTTP answers."""
        if any(stream.leased_at is not None for stream in self.streams):
            self._times.broken(reason)

    def _take(self, prompt_index: int, batch: list[TokenOutput]) -> bytes:
        """Tokens to text to bytes."""
        now = asyncio.get_running_loop().time()
        parts = []
        for output in batch:
            if output.finish_reason is FinishReason.ERROR:
                raise error_of(output)
            text = self._texts[prompt_index, output.choice_index]
            delta = text.push(output.token_ids, output.finish_reason, output.stop_token_id)
            if data := self.answer.push(prompt_index, delta, output):
                parts.append(data)
            if output.token_ids:
                self._times.output((prompt_index, output.choice_index), delta.num_tokens, now)
            if delta.finish_reason is not None:
                self._times.ended((prompt_index, output.choice_index), delta.finish_reason)
            if delta.finish_reason is not None and output.finish_reason is None:
                self.streams[prompt_index].end_choice(output.choice_index)  # a stop string
        return parts[0] if len(parts) == 1 else b"".join(parts)


async def _merge(
    sources: Sequence[Any],
) -> AsyncGenerator[tuple[int, list[TokenOutput]], None]:
    """(index, batch) of all sources as they come; the first error ends it. Sources are closed, whatever happens.

    Holds two batches of each source: what a slow reader leaves waits in the channel, which counts it.
    """
    arrived: asyncio.Queue[tuple[int, list[TokenOutput] | Exception | None]] = asyncio.Queue(2 * len(sources))

    async def read(index: int, source: Any) -> None:
        end = None
        try:
            async with contextlib.aclosing(source):
                async for batch in source:
                    await arrived.put((index, batch))
        except Exception as error:
            end = error
        await arrived.put((index, end))

    tasks = [asyncio.create_task(read(i, source)) for i, source in enumerate(sources)]
    try:
        num_left = len(tasks)
        while num_left:
            index, batch = await arrived.get()
            if isinstance(batch, Exception):
                raise batch
            if batch is None:
                num_left -= 1
            else:
                yield index, batch
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _families(root: type[RaggedServeError]) -> dict[str, type[RaggedServeError]]:
    """Code -> the class nearest to the root that has it."""
    found = {root.code: root}
    for child in root.__subclasses__():
        found = {**_families(child), **found}
    return found


_FAMILIES = _families(RaggedServeError)


def error_of(output: TokenOutput) -> RaggedServeError:
    """The error that ended a choice, of the class it had in the engine."""
    kind = _FAMILIES.get(output.error_code or "", RaggedServeError)
    error = kind.__new__(kind)
    error.args = (output.error or "the engine ended this request",)
    return error
