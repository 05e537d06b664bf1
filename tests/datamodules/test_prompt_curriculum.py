"""The curriculum by pass rate: what it leaves out, on any number of ranks, and after any break."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.datamodules import ArithmeticPrompts, PassRateCurriculum
from drpo_lightning.datamodules.prompt_schedule import PromptSchedule
from drpo_lightning.datamodules.prompt_stream import PromptStream
from drpo_lightning.errors import SettingError

CURRICULA = st.builds(
    lambda rates, num_samples, max_skips: PassRateCurriculum(min(rates), max(rates), num_samples, 0.5, max_skips),
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])),
    st.integers(1, 6),
    st.integers(1, 3),
)
REWARDS = st.sampled_from([0.0, 0.4, 0.5, 1.0, math.nan])
ROLLOUTS = st.lists(st.lists(REWARDS, min_size=8, max_size=8), max_size=8)
"""Of each rollout, the rewards of 4 prompts x 2 samples."""


def make_schedule(curriculum, num_rows=6, weights=None, period=None, first="p"):
    rows = [{"prompt": f"{first}{i}", "data_set": "ab"[i % 2]} for i in range(num_rows)]
    stream = PromptStream(rows, seed=5, weights=weights, period=period)
    return PromptSchedule(stream, num_prompts=4, curriculum=curriculum)


def numbers_of(schedule, rollout):
    return schedule.row_numbers(rollout, range(4))


def add(schedule, rollout, rewards):
    """Adds a rollout with two samples of each prompt."""
    numbers = [number for number in numbers_of(schedule, rollout) for _ in range(2)]
    schedule.add(rollout, list(zip(numbers, rewards, strict=True)))


@given(CURRICULA, ROLLOUTS)
def test_the_prompts_of_a_rollout_are_those_that_the_description_says(curriculum, rollouts):
    schedule = make_schedule(curriculum)
    seen, skipped, position = defaultdict(list), defaultdict(int), 0
    for rollout, rewards in enumerate([*rollouts, None]):
        expected = []
        while len(expected) < 4:
            row = schedule.stream.row_number(position)
            last = seen[row][-curriculum.num_samples :]
            is_judged = len(last) == curriculum.num_samples
            is_within = not is_judged or curriculum.min_rate <= sum(last) / len(last) <= curriculum.max_rate
            if is_within or skipped[row] == curriculum.max_skips:
                expected.append(row)
                skipped[row] = 0
            else:
                skipped[row] += 1
            position += 1
        assert numbers_of(schedule, rollout) == expected
        if rewards is not None:
            add(schedule, rollout, rewards)
            for i, reward in enumerate(rewards):
                if not math.isnan(reward):
                    seen[expected[i // 2]].append(reward >= 0.5)


@given(CURRICULA, ROLLOUTS, st.sampled_from([1, 2, 4]))
def test_ranks_share_the_prompts_of_a_rollout(curriculum, rollouts, num_ranks):
    whole, ranks = make_schedule(curriculum), [make_schedule(curriculum) for _ in range(num_ranks)]
    for rollout, rewards in enumerate(rollouts):
        per_rank = 4 // num_ranks
        parts = [
            schedule.row_numbers(rollout, range(rank * per_rank, (rank + 1) * per_rank))
            for rank, schedule in enumerate(ranks)
        ]
        assert [number for part in parts for number in part] == numbers_of(whole, rollout)
        for schedule in [whole, *ranks]:
            add(schedule, rollout, rewards)


@given(CURRICULA, ROLLOUTS, st.booleans())
def test_a_schedule_goes_on_from_its_state(curriculum, rollouts, has_weights):
    weights = {"a": 1, "b": 2} if has_weights else None
    whole, broken = make_schedule(curriculum, weights=weights), make_schedule(curriculum, weights=weights)
    for rollout, rewards in enumerate(rollouts):
        add(whole, rollout, rewards)
        add(broken, rollout, rewards[::-1])  # a rollout that is broken off before it counts
        fresh = make_schedule(curriculum, weights=weights)
        fresh.load_state_dict(broken.state_dict(rollout), rollout)
        add(fresh, rollout, rewards)
        assert fresh.state_dict(rollout + 1) == whole.state_dict(rollout + 1)
        assert numbers_of(fresh, rollout + 1) == numbers_of(whole, rollout + 1)
        broken = fresh


def test_a_prompt_that_always_passes_is_left_out_and_tried_again():
    schedule = make_schedule(PassRateCurriculum(num_samples=2, max_skips=2), num_rows=8)
    solved = set(numbers_of(schedule, 0))
    add(schedule, 0, [1.0] * 8)
    taken = []
    for rollout in range(1, 5):
        taken.append(set(numbers_of(schedule, rollout)))
        add(schedule, rollout, [0.0, 1.0] * 4)
    assert taken[:3] == [set(range(8)) - solved] * 3  # the rest of the first pass, and two passes
    assert solved & taken[3]


def test_if_all_prompts_are_left_out_the_run_goes_on():
    schedule = make_schedule(PassRateCurriculum(num_samples=2, max_skips=3))
    for rollout in range(20):
        add(schedule, rollout, [1.0] * 8)
    assert len(numbers_of(schedule, 20)) == 4


def test_without_a_curriculum_the_prompts_are_those_of_the_stream():
    schedule = make_schedule(None)
    assert numbers_of(schedule, 3) == [schedule.stream.row_number(position) for position in range(12, 16)]
    assert schedule.state_dict(4) == {"position": 16}


def test_a_curriculum_takes_everything_at_first():
    assert numbers_of(make_schedule(PassRateCurriculum()), 0) == numbers_of(make_schedule(None), 0)


def test_a_curriculum_that_a_checkpoint_knows_nothing_of_begins_where_the_run_is():
    schedule = make_schedule(PassRateCurriculum())
    schedule.load_state_dict({}, 5)
    assert numbers_of(schedule, 5) == numbers_of(make_schedule(None), 5)


def test_pass_rates_of_other_prompts_are_refused():
    state = make_schedule(PassRateCurriculum()).state_dict(0)
    make_schedule(PassRateCurriculum()).load_state_dict(state, 0)
    for num_rows, first in ((7, "p"), (6, "q")):
        message = rf"`data\.prompts` has {num_rows} rows, and had 6 in the run of the checkpoint, with other prompts"
        with pytest.raises(SettingError, match=message):
            make_schedule(PassRateCurriculum(), num_rows=num_rows, first=first).load_state_dict(state, 0)


def test_the_figures_of_a_curriculum():
    schedule = make_schedule(PassRateCurriculum(min_rate=0.1, num_samples=2, max_skips=1), num_rows=8)
    add(schedule, 0, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, math.nan])  # too easy, taken, too hard, not judged
    assert schedule.metrics(1) == {
        "data/passes": 0.5,
        "data/skipped_fraction": 0.0,
        "data/too_easy_fraction": 1 / 8,
        "data/too_hard_fraction": 1 / 8,
        "data/unjudged_fraction": 5 / 8,
    }
    add(schedule, 1, [0.0, 1.0] * 4)
    add(schedule, 2, [0.0, 1.0] * 4)
    passed = schedule.state_dict(3)["position"] - 8
    assert passed > 4
    assert schedule.metrics(3)["data/skipped_fraction"] == 1 - 4 / passed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_rate": 0.6, "max_rate": 0.5}, "must be in order within"),
        ({"max_rate": 1.1}, "must be in order within"),
        ({"min_rate": float("nan")}, "must be in order within"),
        ({"num_samples": 0}, r"`curriculum\.num_samples` must be at least 1, got 0"),
        ({"max_skips": 0}, r"`curriculum\.max_skips` must be at least 1, got 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PassRateCurriculum(**settings)


# ---------------------------------------------------------------- in a run

RUN = {
    "prompts": ArithmeticPrompts(max_operand=2, num_validation=1),  # 8 prompts, 4 in a rollout
    "curriculum": PassRateCurriculum(max_rate=0.25, num_samples=4, pass_threshold=0.5, max_skips=2),
}


def weights_of(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.module.parameters()])


def test_a_run_leaves_out_what_passes_too_often(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"max_epochs": 6}, data=RUN)
    run.fit()
    samples = defaultdict(list)
    for rollout in recorder.rollouts:
        for number, reward in zip(rollout.prompt_numbers, rollout.rewards.tolist(), strict=True):
            samples[number].append(reward)
    known = run.data.state_dict()["schedule"]
    assert known["outcomes"] == {
        number: "".join("1" if reward >= 0.5 else "0" for reward in rewards[-4:]) for number, rewards in samples.items()
    }
    assert known["position"] > 24
    assert run.data.upcoming_prompt_ids(4) == [
        run.data.schedule.rows[number]["prompt_ids"] for number in run.data.schedule.row_numbers(6, range(4))
    ]


@pytest.mark.parametrize("at", [(1, 0), (2, 1)], ids=["inside", "between"])
def test_a_resumed_run_takes_the_same_prompts(make_run, make_recorder, tmp_path, at):
    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == at:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    recorder, second = make_recorder(save), make_recorder()
    whole, again = (make_run(watch, trainer={"max_epochs": 6}, data=RUN) for watch in (recorder, second))
    whole.fit()
    again.fit(ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    left = [rollout.prompt_numbers for rollout in second.rollouts]
    assert left == [rollout.prompt_numbers for rollout in recorder.rollouts][at[0] + 1 :]
    assert torch.equal(weights_of(whole), weights_of(again))
    assert whole.data.state_dict()["schedule"] == again.data.state_dict()["schedule"]


def test_a_second_fit_goes_on_with_the_pass_rates(make_run, make_recorder):
    recorder, whole = make_recorder(), make_recorder()
    run = make_run(recorder, trainer={"max_epochs": 3}, data=RUN)
    run.fit()
    run.trainer.fit_loop.max_epochs = 6
    run.fit()
    make_run(whole, trainer={"max_epochs": 6}, data=RUN).fit()
    assert [r.prompt_numbers for r in recorder.rollouts] == [r.prompt_numbers for r in whole.rollouts]


def test_overfitting_takes_its_prompts_all_the_same(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"max_epochs": 3, "overfit_batches": 2}, data=RUN)
    run.fit()
    assert len({tuple(rollout.prompt_numbers) for rollout in recorder.rollouts}) == 1
