"""Questions of one ingress to all: answered by those that listen, without waiting for those that have gone."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.routing import inquiries as module
from serve_app.routing.inquiries import Answers, Inquiries


def test_all_that_listen_answer_and_the_silent_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.05)

    async def test() -> None:
        now = 0.0
        inquiries = Inquiries(lambda: now, lambda: 60.0)

        async def listen(holder_id: str) -> None:
            for number, question in await inquiries.listen(holder_id):
                inquiries.answer(number, holder_id, f"{holder_id} {question}")
                inquiries.answer(number, holder_id, "twice")
                inquiries.answer(number + 1, holder_id, "of nobody")

        assert not inquiries.has_listeners()
        assert await inquiries.inquire("nobody") == Answers([], 0)
        tasks = [asyncio.create_task(listen(i)) for i in "ab"]
        await asyncio.sleep(0)
        assert inquiries.has_listeners()
        answers, num_silent = await inquiries.inquire("first")
        assert (sorted(answers), num_silent) == (["a first", "b first"], 0)
        await asyncio.gather(*tasks)
        again = asyncio.create_task(listen("a"))
        await asyncio.sleep(0)
        # b is between two calls: it may answer yet, and does not.
        assert await inquiries.inquire("second") == Answers(["a second"], 1)
        await again
        now = 2 * module.BETWEEN_SECONDS
        assert not inquiries.has_listeners()
        assert await inquiries.inquire("third") == Answers([], 0)

    asyncio.run(test())


def test_one_that_has_died_is_not_awaited() -> None:
    """Its poll stays in flight, since nobody says that the caller has died: for 25 seconds every question that nobody could
    answer had "perhaps one that is silent knows" for its answer, also where an ingress had ended in good order."""

    async def test() -> None:
        now = 0.0
        inquiries = Inquiries(lambda: now, lambda: 10.0)
        polls = [asyncio.create_task(inquiries.listen(holder_id)) for holder_id in ("dead", "ended", "idle")]
        await asyncio.sleep(0)
        inquiries.stop_listening("ended")
        now = 9.0
        inquiries.is_alive("idle")
        assert inquiries.has_listeners()
        now = 10.0
        asked = asyncio.create_task(inquiries.inquire("who?"))
        ((number, question),) = await polls[2]
        inquiries.answer(number, "idle", question)
        assert await asked == Answers(["who?"], 0)
        now = 19.0
        assert not inquiries.has_listeners()
        for poll in polls[:2]:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)

    asyncio.run(test())


def test_a_poll_ends_without_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)

    async def test() -> None:
        assert await Inquiries(lambda: 0.0, lambda: 60.0).listen("a") == []

    asyncio.run(test())
