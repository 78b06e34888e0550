"""Engine: schedule, run, update, with steps that fail, end early, or run ahead."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import ClassVar

import pytest

from serve_app.engine.request import FinishReason, GenerateRequest, TokenOutput
from serve_app.engine.scheduler import Key, SchedulerOutput
from serve_app.engine.simulated_runner import SimulatedRunner, SimulatedStep
from serve_app.errors import DeviceLostError, InvalidPromptError, StepFailedError
from tests.engine.harness import FaultyRunner, Watched, expected_tokens, make_request

both_ways = pytest.mark.parametrize("steps_in_flight", [1, 2], ids=["one step in flight", "two steps in flight"])


def ends(watched: Watched) -> dict[str, str]:
    """Request id -> finish reason, or error code; the choices of one agree."""
    found: dict[str, str] = {}
    for (request_id, _), end in watched.ends.items():
        word = end.error_code or str(end.finish_reason)
        assert found.setdefault(request_id, word) == word
    return found


@both_ways
def test_requests_run_together_yield_what_each_yields_alone(steps_in_flight: int) -> None:
    watched = Watched(steps_in_flight=steps_in_flight, max_num_batched_tokens=9)
    for i, num_prompt in enumerate((3, 17, 1, 8, 30)):
        watched.add(make_request(f"r{i}", num_prompt, max_tokens=5 + i, ignore_eos=False))
    watched.run().check_tokens()
    assert watched.num_steps > 10


@both_ways
def test_a_refused_request_leaves_no_trace(steps_in_flight: int) -> None:
    watched = Watched(steps_in_flight=steps_in_flight)
    with pytest.raises(InvalidPromptError):
        watched.add(make_request("a", (500,)))
    assert not watched.engine.has_work
    assert watched.step() == []


def test_the_next_step_is_launched_before_the_last_is_read() -> None:
    events: list[str] = []

    class Runner(SimulatedRunner):
        def launch(self, plan: SchedulerOutput) -> SimulatedStep:
            index = self.num_steps
            events.append(f"launch {index}")
            step = super().launch(plan)
            token_ids = step.token_ids

            def read() -> list[int]:
                events.append(f"read {index}")
                return token_ids()

            step.token_ids = read  # type: ignore[method-assign]
            return step

    for steps_in_flight in (1, 2):
        events.append("|")
        watched = Watched(steps_in_flight=steps_in_flight, runner_class=Runner)
        watched.add(make_request("a", 3, max_tokens=3))
        watched.run().check_tokens()
    assert " ".join(events) == (
        "| launch 0 read 0 launch 1 read 1 launch 2 read 2 | launch 0 launch 1 read 0 launch 2 read 1 read 2"
    )


# ---- steps that fail ---------------------------------------------------------------------------------------------


def faulty(at_launch: str, at_read: str, steps_in_flight: int, **options: int) -> Watched:
    watched = Watched(runner_class=FaultyRunner, steps_in_flight=steps_in_flight, **options)  # type: ignore[arg-type]
    assert isinstance(watched.runner, FaultyRunner)
    watched.runner.at_launch = frozenset(at_launch.split())
    watched.runner.at_read = frozenset(at_read.split())
    return watched


@both_ways
@pytest.mark.parametrize(
    ("at_launch", "at_read"), [("b", ""), ("", "b"), ("a", "c"), ("a b", "c")], ids=lambda names: names or "none"
)
def test_who_makes_a_step_fail_is_refused_and_the_others_notice_nothing(
    at_launch: str, at_read: str, steps_in_flight: int
) -> None:
    watched = faulty(at_launch, at_read, steps_in_flight, max_num_batched_tokens=6)
    for name in "abcd":
        watched.add(make_request(name, 5, max_tokens=4))
    watched.run().check_tokens(frozenset({"step_failed"}))
    culprits = set(f"{at_launch} {at_read}".split())
    assert ends(watched) == {name: "step_failed" if name in culprits else "length" for name in "abcd"}
    for name in culprits:
        kind = "launch" if name in at_launch else "read"
        error = watched.ends[name, 0].error
        assert error == f"request '{name}': the step failed with RuntimeError: planted at {kind}: ['{name}']"
        assert watched.tokens[name, 0] == []


@both_ways
@pytest.mark.parametrize("where", ["at_launch", "at_read"])
def test_a_fault_that_comes_late_ends_a_request_that_already_yielded(where: str, steps_in_flight: int) -> None:
    watched = faulty("", "", steps_in_flight)
    for name in "abc":
        watched.add(make_request(name, 5, n=2 if name == "a" else 1, max_tokens=9))
    while len(watched.tokens["b", 0]) < 3:
        watched.step()
    setattr(watched.runner, where, frozenset("b"))
    watched.run().check_tokens(frozenset({"step_failed"}))
    assert ends(watched) == {"a": "length", "b": "step_failed", "c": "length"}
    assert 3 <= len(watched.tokens["b", 0]) <= 4


@both_ways
def test_a_passing_fault_harms_nobody(steps_in_flight: int) -> None:
    """The step fails once, and each of its sequences alone does not."""

    class Hiccup(SimulatedRunner):
        num_hiccups = 0

        def launch(self, plan: SchedulerOutput) -> SimulatedStep:
            if len(plan.scheduled) > 1 and self.num_steps % 3 == 0:
                self.num_steps += 1
                self.num_hiccups += 1
                raise MemoryError("out of memory")
            return super().launch(plan)

    watched = Watched(runner_class=Hiccup, steps_in_flight=steps_in_flight)
    for name in "abc":
        watched.add(make_request(name, 7, n=2 if name == "a" else 1, max_tokens=6))
    watched.run().check_tokens()
    assert watched.runner.num_hiccups >= 2  # type: ignore[attr-defined]


def test_an_error_of_the_family_reaches_the_client_as_it_is() -> None:
    class Refusing(SimulatedRunner):
        def launch(self, plan: SchedulerOutput) -> SimulatedStep:
            raise StepFailedError("logits are not finite")

    watched = Watched(runner_class=Refusing)
    watched.add(make_request("a", 3))
    watched.run()
    assert (watched.ends["a", 0].error, watched.ends["a", 0].error_code) == ("logits are not finite", "step_failed")


@both_ways
@pytest.mark.parametrize("where", ["launch", "read", "read again"])
def test_a_lost_device_ends_the_engine_and_refuses_nobody(where: str, steps_in_flight: int) -> None:
    """Each request would be refused one by one, and so would all that come: better that the replica dies.

    "read again": a step fails, and the device is found to be lost when the later step, or its sequences, are read.
    """

    class Lost(SimulatedRunner):
        def launch(self, plan: SchedulerOutput) -> SimulatedStep:
            if where == "launch" and self.num_steps == 2:
                raise DeviceLostError("gone")
            step = super().launch(plan)
            reading = self.num_steps

            def token_ids() -> list[int]:
                if reading == 2 and where == "read again":
                    raise RuntimeError("a kernel failed")
                if reading > 2 or (reading == 2 and where == "read"):
                    raise DeviceLostError("gone")
                return SimulatedStep.token_ids(step)

            step.token_ids = token_ids  # type: ignore[method-assign]
            return step

    watched = Watched(steps_in_flight=steps_in_flight, runner_class=Lost)
    watched.add(make_request("a", 5))
    watched.add(make_request("b", 6))
    with pytest.raises(DeviceLostError, match="gone"):
        watched.run()
    assert watched.ends == {}


def test_one_that_was_preempted_while_its_step_failed_is_not_refused() -> None:
    """Regression: launched ahead, its blocks were gone when the failed step was repeated, and it was refused."""
    watched = faulty("", "b", 2, num_blocks=4, max_num_batched_tokens=20)
    watched.runner.at_read = frozenset()  # type: ignore[attr-defined]
    watched.add(make_request("a", 6, max_tokens=6))
    watched.add(make_request("b", 7, max_tokens=6))
    watched.step()
    while not watched.scheduler.num_preemptions:
        # Every step is made to fail when it is read, but only while both are in it.
        plan_both = "a[" in watched.plans[-1] and "b[" in watched.plans[-1]
        if plan_both and watched.engine._in_flight:
            _, step, _ = watched.engine._in_flight[-1]
            step.token_ids = _raise_once  # type: ignore[method-assign]
        watched.step()
    assert [s.key for s in watched.scheduler.waiting] == [("a", 0)]
    watched.run().check_tokens()
    assert ends(watched) == {"a": "length", "b": "length"}


def _raise_once() -> list[int]:
    raise RuntimeError("planted")


def test_a_copied_block_is_still_there_when_the_step_that_copied_it_fails() -> None:
    """Its owner ended, and another request took what was free, before the failed step was repeated."""
    watched = Watched(num_blocks=8, max_num_batched_tokens=20, steps_in_flight=2)
    watched.add(make_request("a", 6, n=2, max_tokens=8))
    watched.step()  # prefill launched
    watched.step()  # a's decode launched, prefill read: forked
    watched.abort("a", 0)
    watched.step()  # the copy is launched
    plan, step, _ = watched.engine._in_flight[-1]
    assert len(plan.block_copies) == 1
    step.token_ids = _raise_once  # type: ignore[method-assign]
    watched.add(make_request("b", 10, max_tokens=2))
    while watched.engine.has_work:
        watched.step()
    watched.check_end()
    watched.check_tokens()
    assert watched.ends["a", 1].finish_reason is FinishReason.LENGTH


@both_ways
def test_if_the_leader_fails_its_choices_fail_or_go_on_by_themselves(steps_in_flight: int) -> None:
    """Only choice 0 fails here, so the prompt is computed by choice 1, and choice 2 follows that."""

    class Picky(SimulatedRunner):
        def launch(self, plan: SchedulerOutput) -> SimulatedStep:
            if any(item.sequence.key == ("a", 0) and item.start >= 8 for item in plan.scheduled):
                raise ValueError("planted")
            return super().launch(plan)

    watched = Watched(runner_class=Picky, steps_in_flight=steps_in_flight)
    watched.add(make_request("a", 14, n=3, max_tokens=4))
    watched.add(make_request("b", 5, max_tokens=4))
    watched.run().check_tokens(frozenset({"step_failed"}))
    assert {key: end.error_code for key, end in watched.ends.items()} == {
        ("a", 0): "step_failed",
        ("a", 1): None,
        ("a", 2): None,
        ("b", 0): None,
    }


@both_ways
@pytest.mark.parametrize("most", [1, 3])
def test_a_step_that_does_not_fit_into_memory_is_retried_in_smaller_parts(most: int, steps_in_flight: int) -> None:
    sizes: list[tuple[int, bool]] = []

    class Small(SimulatedRunner):
        def launch(self, plan: SchedulerOutput) -> SimulatedStep:
            fits = plan.num_tokens <= most
            sizes.append((plan.num_tokens, fits))
            if not fits:
                raise MemoryError(f"no room for {plan.num_tokens} tokens")
            return super().launch(plan)

    watched = Watched(runner_class=Small, steps_in_flight=steps_in_flight, max_num_batched_tokens=20)
    watched.add(make_request("a", 14, n=2, max_tokens=6))
    watched.add(make_request("b", 9, max_tokens=6))
    watched.run().check_tokens()
    assert ends(watched) == {"a": "length", "b": "length"}
    assert (20, False) in sizes
    assert (most, True) in sizes
    refused = [size for size, fits in sizes if not fits]
    assert len(refused) < 60, "halved, not one token after the other from the start"


def test_halving_ends_with_one_token() -> None:
    class Full(SimulatedRunner):
        sizes: ClassVar[list[int]] = []

        def launch(self, plan: SchedulerOutput) -> SimulatedStep:
            self.sizes.append(plan.num_tokens)
            raise MemoryError("no room at all")

    watched = Watched(runner_class=Full, max_num_batched_tokens=20)
    watched.add(make_request("a", 14, max_tokens=6))
    watched.run().check_tokens(frozenset({"step_failed"}))
    assert ends(watched) == {"a": "step_failed"}
    assert Full.sizes == [14, 14, 7, 3, 1]
    error = watched.ends["a", 0].error
    assert error == "request 'a': the step failed with MemoryError: no room at all"


def test_a_request_at_fault_is_refused_without_trying_smaller_parts() -> None:
    class Strict(SimulatedRunner):
        num_launches = 0

        def launch(self, plan: SchedulerOutput) -> SimulatedStep:
            type(self).num_launches += 1
            raise StepFailedError("the logits of request 'a' are NaN")

    watched = Watched(runner_class=Strict, max_num_batched_tokens=20)
    watched.add(make_request("a", 14, max_tokens=6))
    watched.run().check_tokens(frozenset({"step_failed"}))
    assert Strict.num_launches == 2
    assert watched.ends["a", 0].error == "the logits of request 'a' are NaN"


# ---- deadlines and aborts ----------------------------------------------------------------------------------------


@both_ways
def test_a_deadline_ends_what_runs_and_what_waits(steps_in_flight: int) -> None:
    watched = Watched(steps_in_flight=steps_in_flight, max_num_seqs=2, seconds_per_step=0.125)
    watched.add(make_request("runs", 5, max_tokens=50, remaining_ms=1000))
    watched.add(make_request("free", 5, max_tokens=12))
    watched.add(make_request("waits", 5, max_tokens=2, remaining_ms=500))
    watched.add(make_request("after", 5, max_tokens=2))
    watched.run().check_tokens(frozenset({"deadline_exceeded"}))
    assert ends(watched) == {
        "runs": "deadline_exceeded",
        "free": "length",
        "waits": "deadline_exceeded",
        "after": "length",
    }
    assert len(watched.tokens["runs", 0]) == 8
    assert watched.tokens["waits", 0] == []


def in_prefill(watched: Watched) -> bool:
    return re.search(r"\ba\[0:\d+\](?!\*)", watched.plans[-1]) is not None


PHASES: dict[str, Callable[[Watched], bool]] = {
    "just added": lambda watched: True,
    "waiting": lambda watched: watched.num_steps == 2 and ("a", 0) in {s.key for s in watched.scheduler.waiting},
    "prefill": lambda watched: bool(watched.plans) and in_prefill(watched),
    "decode": lambda watched: len(watched.tokens["a", 0]) == 2,
    "preempted": lambda watched: watched.scheduler.num_preemptions > 0,
}


@both_ways
@pytest.mark.parametrize("phase", PHASES)
def test_an_abort_in_any_phase_frees_everything_and_disturbs_nobody(phase: str, steps_in_flight: int) -> None:
    watched = Watched(
        steps_in_flight=steps_in_flight,
        num_blocks=11 if phase == "preempted" else 40,
        max_num_seqs=2 if phase == "waiting" else 4,
    )
    watched.add(make_request("b", 6, max_tokens=20))
    watched.add(make_request("c", 7, max_tokens=20))
    watched.add(make_request("a", 9, max_tokens=20))
    for _ in range(200):
        if PHASES[phase](watched):
            break
        watched.step()
    assert PHASES[phase](watched)
    watched.abort("a")
    outputs = [output for output in watched.step() if output.request_id == "a"]
    assert [output.finish_reason for output in outputs] == [FinishReason.ABORT]
    watched.run().check_tokens()
    assert ends(watched) == {"a": "abort", "b": "length", "c": "length"}
    assert watched.engine.abort("a") == 0


# ---- n choices ---------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("caching", [False, True], ids=["caching off", "caching on"])
@pytest.mark.parametrize("num_prompt", [1, 4, 10, 21])
def test_the_prompt_of_n_choices_is_computed_once(num_prompt: int, caching: bool, steps_in_flight: int) -> None:
    """What the runner saw: the prompt, its last token once more for each further choice, and each choice's outputs."""
    watched = Watched(steps_in_flight=steps_in_flight, enable_prefix_caching=caching)
    watched.add(make_request("a", num_prompt, n=4, max_tokens=6))
    watched.run().check_tokens()
    assert watched.num_run["a"] == num_prompt + 3 * 1 + 4 * (6 - 1)
    assert len({tuple(watched.tokens["a", i]) for i in range(4)}) == 4
    assert (watched.scheduler.num_preemptions, watched.scheduler.num_recomputed_tokens) == (0, 0)


@both_ways
@pytest.mark.parametrize("after", ["before the fork", "after the fork"])
def test_the_other_choices_go_on_without_their_leader(after: str, steps_in_flight: int) -> None:
    watched = Watched(steps_in_flight=steps_in_flight, max_num_batched_tokens=8)
    watched.add(make_request("a", 14, n=3, max_tokens=6))
    while True:
        watched.step()
        has_forked = watched.scheduler.sequences["a", 2].leader is None
        if has_forked or after == "before the fork":
            break
    assert has_forked == (after == "after the fork")
    watched.abort("a", 0)
    watched.run().check_tokens()
    reasons = [watched.ends["a", i].finish_reason for i in range(3)]
    assert reasons == [FinishReason.ABORT, FinishReason.LENGTH, FinishReason.LENGTH]
    assert (watched.scheduler.num_recomputed_tokens > 0) == (after == "before the fork")


@both_ways
def test_choices_survive_preemption_by_recomputation(steps_in_flight: int) -> None:
    watched = Watched(steps_in_flight=steps_in_flight, num_blocks=13, max_num_seqs=8, max_num_batched_tokens=16)
    for name in "abc":
        watched.add(make_request(name, 6, n=3, max_tokens=10))
    watched.run().check_tokens()
    assert watched.scheduler.num_preemptions > 0
    assert watched.scheduler.num_recomputed_tokens > 0
    assert sum(record.num_preempted for record in watched.engine.recorder.records) == watched.scheduler.num_preemptions


# ---- replay ------------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("caching", [False, True], ids=["caching off", "caching on"])
@pytest.mark.parametrize("emitted", [(1, 0), (5, 0), (0, 5), (3, 9), (11, 11), (None, 4)], ids=str)
def test_a_replay_goes_on_with_the_same_tokens(
    emitted: tuple[int | None, int], caching: bool, steps_in_flight: int
) -> None:
    """Two choices of which an earlier attempt emitted so many tokens; None: that choice had ended."""
    undisturbed = make_request("a", 9, n=2, max_tokens=12, min_tokens=12, ignore_eos=False)
    tokens = [expected_tokens(request, max_model_len=100)[0] for request in undisturbed]
    assert [len(ids) for ids in tokens] == [12, 12]
    watched = Watched(steps_in_flight=steps_in_flight, enable_prefix_caching=caching)
    watched.add(
        [
            dataclasses.replace(request, output_token_ids=tokens[i][:num], attempt=1)
            for i, (request, num) in enumerate(zip(undisturbed, emitted, strict=True))
            if num is not None
        ]
    )
    watched.run().check_tokens()
    for i, num in enumerate(emitted):
        if num is not None:
            assert tokens[i][:num] + tuple(watched.tokens["a", i]) == tokens[i]
            assert watched.ends["a", i].finish_reason is FinishReason.LENGTH
    assert watched.scheduler.num_recomputed_tokens == 0


# ---- records -----------------------------------------------------------------------------------------------------


def run_with(requests: list[GenerateRequest], **options: int) -> Watched:
    watched = Watched(**options)  # type: ignore[arg-type]
    watched.add(requests)
    return watched.run()


@both_ways
def test_every_step_leaves_a_record(steps_in_flight: int) -> None:
    watched = run_with(make_request("a", 10, n=2, max_tokens=3), steps_in_flight=steps_in_flight, seconds_per_step=0.25)
    recorder = watched.engine.recorder
    records = list(recorder.records)
    assert [record.index for record in records] == list(range(recorder.num_steps)) == list(range(len(records)))
    assert recorder.num_tokens == sum(watched.num_run.values())
    first = records[0]
    assert [tuple(entry) for entry in first.sequences] == [("a", 0, 0, 8, 0, False)]
    assert (first.num_tokens, first.token_budget, first.num_running, first.num_waiting) == (8, 8, 2, 0)
    assert (first.num_blocks, first.num_used_blocks) == (100, 3)
    assert first.seconds["model"] == first.seconds["wait"] == 0.25
    assert {"schedule", "launch", "wait", "update", "model"} <= first.seconds.keys()


def test_outputs_carry_logprobs_where_asked() -> None:
    watched = run_with(make_request("a", 6, n=2, max_tokens=3, logprobs=2, prompt_logprobs=1))
    watched.check_tokens()
    found: dict[Key, list[TokenOutput]] = watched.outputs
    for choice in range(2):
        assert all(output.logprobs and len(output.logprobs[0].top) == 2 for output in found["a", choice])
        prompt = found["a", choice][0].prompt_logprobs
        assert prompt is not None
        assert prompt[0] is None
        assert len(prompt) == 6
