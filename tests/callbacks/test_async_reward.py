"""Rewards that wait: many at a time but not more, tried again, bounded in time, and never a silent 0."""

import asyncio
import random
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from drpo_lightning.callbacks import AsyncReward, async_reward
from drpo_lightning.rewards import RewardBatch, RewardError, RewardFailure, score_rewards


class Judge(AsyncReward):
    """Scores by a function of the sample and the number of the try, from 1."""

    def __init__(self, function, **settings):
        super().__init__(**({"backoff_seconds": 0.0, "timeout_seconds": 5.0} | settings))
        self.function = function
        self.tries = {}
        self.active = self.most_active = 0

    async def score_one(self, sample):
        self.tries[sample.completion] = self.tries.get(sample.completion, 0) + 1
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        try:
            return await self.function(sample, self.tries[sample.completion])
        finally:
            self.active -= 1


def batch(*completions):
    size = len(completions)
    return RewardBatch(
        [f"prompt {i}" for i in range(size)], completions, [[1]] * size, ["stop"] * size, {"answer": list(range(size))}
    )


def test_scores_come_in_the_order_of_the_completions():
    async def score(sample, _):
        await asyncio.sleep(0.01 * (3 - sample.columns["answer"]))
        assert sample.prompt == f"prompt {sample.columns['answer']}"
        return None if sample.completion == "b" else float(sample.columns["answer"])

    assert Judge(score).score(batch("a", "b", "c", "d")) == [0.0, None, 2.0, 3.0]
    assert Judge(score).score(batch()) == []


@pytest.mark.parametrize("limit", [1, 3, 50])
def test_no_more_are_scored_at_a_time_than_allowed(limit):
    async def score(sample, _):
        await asyncio.sleep(0.002)
        return 1.0

    judge = Judge(score, max_concurrency=limit)
    assert judge.score(batch(*map(str, range(20)))) == [1.0] * 20
    assert judge.most_active == min(limit, 20)


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_a_failing_try_is_repeated_as_often_as_allowed(retries):
    async def score(sample, attempt):
        if attempt <= int(sample.completion):
            raise ConnectionError("busy")
        return 1.0

    judge = Judge(score, max_retries=retries)
    outcomes = judge.score(batch(*"012345"))
    for fails, outcome in enumerate(outcomes):
        assert judge.tries[str(fails)] == min(fails, retries) + 1
        expected = 1.0 if fails <= retries else RewardFailure("error", "raised ConnectionError: busy")
        assert outcome == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1.0", [1.0], 1e300])
def test_what_is_no_score_is_asked_for_again_and_then_a_failure(bad):
    async def score(sample, _):
        return bad

    judge = Judge(score, max_retries=2)
    (failure,) = judge.score(batch("a"))
    assert failure == RewardFailure("error", f"returned {bad!r}, which is neither a finite float nor None")
    assert judge.tries == {"a": 3}


def test_a_reward_error_is_not_tried_again():
    async def score(sample, _):
        raise RewardError("refused the completion")

    judge = Judge(score)
    assert judge.score(batch("a")) == [RewardFailure("error", "refused the completion")]
    assert judge.tries == {"a": 1}


def test_sys_exit_is_a_failure():
    async def score(sample, _):
        raise SystemExit(0)

    with pytest.raises(RewardError, match="reward 'judge' raised SystemExit: 0, for prompt 'prompt 0'"):
        score_rewards([Judge(score)], batch("a"))


def test_every_try_has_the_whole_time():
    async def score(sample, attempt):
        await asyncio.sleep(0.2 if sample.completion == "slow" or attempt == 1 else 0.0)
        return float(attempt)

    outcomes = Judge(score, timeout_seconds=0.1, max_retries=1).score(batch("slow", "late"))
    assert outcomes == [RewardFailure("timeout", "took longer than 0.1 s"), 2.0]


def test_a_timeout_of_its_own_is_a_timeout():
    async def score(sample, _):
        raise TimeoutError("no answer")

    (failure,) = Judge(score).score(batch("a"))
    assert failure == RewardFailure("timeout", "raised TimeoutError: no answer")


def test_code_that_cannot_be_cancelled_holds_nobody_up():
    async def score(sample, _):
        if sample.completion != "stubborn":
            return 1.0
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.1)
        return 0.0

    started = time.monotonic()
    judge = Judge(score, timeout_seconds=0.1, max_retries=0, max_concurrency=1)
    assert judge.score(batch("stubborn", "b"))[1] == 1.0
    assert time.monotonic() - started < 2


def test_code_that_blocks_the_loop_ends_the_run(monkeypatch):
    monkeypatch.setattr(async_reward, "MAX_SILENCE_SECONDS", 0.3)

    async def score(sample, _):
        time.sleep(2)

    started = time.monotonic()
    with pytest.raises(RewardError, match=r"has not given the event loop back for 0.3 s: .*asyncio.to_thread"):
        Judge(score).score(batch("a"))
    assert time.monotonic() - started < 1.5


def test_pauses_double_up_to_a_bound_and_depend_on_the_seed_alone(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    async def score(sample, _):
        raise ConnectionError

    def pauses_of(seed):
        pauses.clear()
        settings = {"backoff_seconds": 1.0, "max_backoff_seconds": 5.0, "max_retries": 5, "seed": seed}
        with monkeypatch.context() as patch:
            # Only the reward's own: a thread that an earlier test has given up may sleep still.
            patch.setattr(async_reward, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
            Judge(score, **settings).score(batch("a"))
        return list(pauses)

    draw = random.Random(7)
    assert pauses_of(7) == [longest * draw.uniform(0.5, 1) for longest in (1, 2, 4, 5, 5)]
    assert pauses_of(7) != pauses_of(8)


def test_it_runs_where_an_event_loop_runs_already():
    async def score(sample, _):
        return 1.0

    async def notebook():
        return Judge(score).score(batch("a"))

    assert asyncio.run(notebook()) == [1.0]


def test_an_interrupt_cancels_what_is_under_way(monkeypatch):
    cancelled = threading.Event()

    async def score(sample, _):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupted(self):
        time.sleep(0.2)
        raise KeyboardInterrupt

    monkeypatch.setattr(async_reward._EventLoopThread, "_check_pulse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Judge(score, timeout_seconds=60).score(batch("a"))
    assert cancelled.wait(5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_concurrency": 0}, "`max_concurrency` must be positive and finite, got 0"),
        ({"timeout_seconds": float("nan")}, "`timeout_seconds` must be positive and finite, got nan"),
        ({"max_retries": -1}, "`max_retries` must be 0 or positive, and finite, got -1"),
        ({"backoff_seconds": float("inf")}, "`backoff_seconds` must be 0 or positive, and finite, got inf"),
        ({"max_stored_failures": -1}, "`max_stored_failures` must be 0 or positive, got -1"),
        ({"on_failure": "ignore"}, r"`on_failure` must be one of \['raise', 'drop_sample', 'score'\], got 'ignore'"),
        ({"on_failure": "score"}, "`failure_score` must be set with `on_failure: score`, and only then, got None"),
        ({"failure_score": 0.0}, "`failure_score` must be set with `on_failure: score`, and only then, got 0.0"),
        ({"on_failure": "score", "failure_score": float("nan")}, "`failure_score` must be a finite float, got nan"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        Judge(None, **settings)
