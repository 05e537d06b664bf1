"""What an engine must not return is stopped at the door: before it is scored, and before any weight moves."""

import math
import time
from dataclasses import replace

import pytest
import torch

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.callbacks import FunctionReward
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.objectives import TopKDPPO
from drpo_lightning.rollout import EngineError, TransformersEngine
from drpo_lightning.rollout.checks import MAX_LOGPROB, check_completions
from tests.conftest import scattered_reward

STOP = 1
VALIDATION = {"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20)}


class LyingEngine(TransformersEngine):
    """Changes what it has sampled, from one rollout on: the first two samples of the second prompt."""

    def __init__(self, lie, first_rollout=0):
        super().__init__()
        self.lie = lie
        self.first_rollout = first_rollout
        self.num_rollouts = 0

    def generate(self, *arguments, **settings):
        groups = super().generate(*arguments, **settings)
        self.num_rollouts += 1
        return self.lie(groups) if self.num_rollouts > self.first_rollout else groups


def in_sample(change):
    """A lie about sample 5, which is (of 4 a prompt) the second of the second prompt."""

    def lie(groups):
        first, second, *rest = groups
        return [first, [second[0], change(second[1]), *second[2:]], *rest]

    return lie


def with_token(token_id):
    return in_sample(lambda sample: replace(sample, token_ids=[token_id, *sample.token_ids[1:]]))


def with_logprob(logprob):
    return in_sample(lambda sample: replace(sample, logprobs=[*sample.logprobs[:-1], logprob]))


def of_tokens(token_ids, finish_reason):
    return in_sample(lambda _: Completion(token_ids, [-1.0] * len(token_ids), finish_reason))


# The model's vocabulary has 98 tokens, its stop token is 1, and `max_tokens` is 4.
LIES = {
    "a prompt too few": (lambda groups: groups[:-1], "returned completions of 3 prompts for 4"),
    "a prompt too many": (lambda groups: [*groups, groups[0]], "returned completions of 5 prompts for 4"),
    "a sample too few": (lambda groups: [*groups[:2], groups[2][1:], groups[3]], "3 completions of prompt 2 for 4"),
    "a token too large": (
        with_token(98),
        r"sample 5 \(of prompt 1\) has token id 98, outside .* 98 tokens, at place 0",
    ),
    "a negative token": (with_token(-1), r"sample 5 \(of prompt 1\) has token id -1, outside the vocabulary"),
    "a positive logprob": (
        with_logprob(0.7),
        r"sample 5 \(of prompt 1\) has logprob 0.7, which a sampled token cannot",
    ),
    "a logprob of NaN": (with_logprob(math.nan), "sample 5 .* has logprob nan"),
    "an impossible token": (with_logprob(-math.inf), "sample 5 .* has logprob -inf"),
    "an infinite logprob": (with_logprob(math.inf), "sample 5 .* has logprob inf"),
    "nothing": (of_tokens([], "length"), "sample 5 .* has 0 tokens, not between 1 and `sampling.max_tokens` 4"),
    "too much": (of_tokens([20] * 5, "length"), "sample 5 .* has 5 tokens, not between 1 and"),
    "a stop without its token": (
        of_tokens([20, 21], "stop"),
        "sample 5 .* has finish_reason 'stop' after 2 of 4 tokens",
    ),
    "cut off too early": (of_tokens([20, 21], "length"), "sample 5 .* has finish_reason 'length' after 2 of 4 tokens"),
    "cut off at a stop": (of_tokens([20, 21, 20, STOP], "length"), "sample 5 .* 'length' after 4 of 4 .* is 1;"),
    "talks on": (of_tokens([20, STOP, 20, STOP], "stop"), "sample 5 .* goes on after stop token 1, at place 1"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_ends_the_run_before_it_is_scored(make_run, name):
    lie, message = LIES[name]
    scored = []

    def reward(completion_ids, **columns):
        scored.append(len(completion_ids))
        return scattered_reward(completion_ids, **columns)

    engine = LyingEngine(lie, first_rollout=1)
    rewards = [FunctionReward(reward, name="scattered")]
    run = make_run(rewards=rewards, data={"engine": engine}, trainer={"max_epochs": 3})
    with pytest.raises(EngineError, match=message):
        run.fit()
    assert scored == [16]
    assert run.trainer.global_step == 2
    assert not engine.is_started


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_lie_in_a_validation_ends_the_run_too(make_run):
    engine = LyingEngine(lambda groups: [[*groups[0], *groups[1]], *groups[1:]])
    run = make_run(data={"engine": engine, **VALIDATION})
    with pytest.raises(EngineError, match="returned 2 completions of prompt 0 for 1"):
        run.trainer.validate(run.module, run.data)


def without_topk(sample):
    return replace(sample, topk_ids=None, topk_logprobs=None)


def with_wide_topk(sample):
    return replace(sample, topk_ids=sample.topk_ids.repeat(1, 2), topk_logprobs=sample.topk_logprobs.repeat(1, 2))


def with_topk(name, value):
    def change(sample):
        likely = getattr(sample, name).clone()
        likely[-1, 1] = value
        return replace(sample, **{name: likely})

    return in_sample(change)


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        (in_sample(without_topk), "sample 5 .* has no most likely tokens; 3 at each place were asked for"),
        (in_sample(with_wide_topk), r"logprobs of shapes \[\d, 6\] and \[\d, 6\] instead of \[\d, 3\]"),
        (with_topk("topk_logprobs", 0.3), "sample 5 .* has logprob 0.3 among the most likely tokens"),
        (with_topk("topk_logprobs", math.nan), "sample 5 .* has logprob nan among the most likely tokens"),
        (
            with_topk("topk_ids", 98),
            "sample 5 .* has token id 98, outside the vocabulary of 98 tokens, among the most likely",
        ),
        (with_topk("topk_ids", -3), "sample 5 .* has token id -3, outside the vocabulary"),
    ],
)
def test_a_lie_about_the_most_likely_tokens_ends_the_run(make_run, lie, message):
    run = make_run(module={"objective": TopKDPPO(k=3)}, data={"engine": LyingEngine(lie)})
    with pytest.raises(EngineError, match=message):
        run.fit()


# ---------------------------------------------------------------- what is allowed


def check(completions, **changes):
    settings = {"num_prompts": 1, "num_samples": len(completions), "stop_token_ids": [STOP, 3], "num_topk": 0}
    check_completions([completions], Sampling(max_tokens=3), vocabulary_size=10, **(settings | changes))


def test_what_is_possible_is_let_through():
    check(
        [
            Completion([STOP], [0.0], "stop"),
            Completion([9, 9, 3], [-300.0, MAX_LOGPROB, -1e-12], "stop"),
            Completion([0, 9, 0], [-1.0] * 3, "length"),
        ]
    )
    check_completions(
        [], Sampling(), num_prompts=0, num_samples=2, stop_token_ids=[STOP], num_topk=0, vocabulary_size=10
    )


def test_a_likely_token_may_be_cut_off_by_top_p():
    likely = {"topk_ids": torch.tensor([[4, 5]]), "topk_logprobs": torch.tensor([[0.0, -math.inf]])}
    check([Completion([STOP], [-1.0], "stop", **likely)], num_topk=2)
    whole = {"topk_ids": torch.arange(10)[None], "topk_logprobs": torch.full((1, 10), -2.3)}
    check([Completion([STOP], [-1.0], "stop", **whole)], num_topk=-1)


def test_rounding_is_no_lie_but_a_little_more_is():
    check([Completion([STOP], [MAX_LOGPROB], "stop")])
    with pytest.raises(EngineError, match=r"has logprob 0.00011,"):
        check([Completion([STOP], [1.1e-4], "stop")])


def test_the_first_broken_token_is_named_whatever_the_lengths():
    sound = Completion([9, STOP], [-1.0, -1.0], "stop")
    broken = Completion([9, 9, 9], [-1.0, -1.0, 2.0], "length")
    with pytest.raises(EngineError, match=r"sample 2 \(of prompt 0\) has logprob 2, .* at place 2"):
        check([sound, Completion([STOP], [-1.0], "stop"), broken, broken])


def test_a_large_rollout_is_checked_in_the_blink_of_an_eye():
    completion = Completion(list(range(10, 266)), [-0.5] * 256, "length")
    started = time.process_time()
    check_completions(
        [[completion] * 8] * 64,
        Sampling(max_tokens=256),
        num_prompts=64,
        num_samples=8,
        stop_token_ids=[STOP],
        num_topk=0,
        vocabulary_size=300,
    )
    assert time.process_time() - started < 0.3
