"""Dynamic sampling: which prompts are replaced and by which, on any number of ranks, and after any break."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.batch import Completion, Rollout, Sampling
from drpo_lightning.callbacks import FunctionReward, RolloutStatistics
from drpo_lightning.datamodules import ArithmeticPrompts, PassRateCurriculum
from drpo_lightning.datamodules.dynamic_sampling import replace_groups
from tests.callbacks.conftest import MemoryLogger
from tests.datamodules.thread_ranks import Ranks

PLACES = st.lists(st.lists(st.sampled_from([0.0, 1.0, math.nan]), min_size=2, max_size=2), min_size=40, max_size=40)
"""Rewards of the two samples at each place of a rollout of 4 prompts and of what may replace them."""


def rollout_of(places, rewards):
    """Two samples of each of some prompts; the second has as many tokens as the place says."""
    samples = [place for place in places for _ in range(2)]
    lengths = [1 if i % 2 == 0 else place + 1 for i, place in enumerate(samples)]
    scores = torch.tensor([rewards[place][i % 2] for i, place in enumerate(samples)])
    return Rollout(
        prompts=[f"p{place}" for place in samples],
        prompt_ids=[[place] for place in samples],
        completions=[Completion([7] * length, [-1.0] * length, "stop") for length in lengths],
        texts=["" for _ in samples],
        columns={"place": list(samples)},
        group_size=2,
        rewards=scores,
        reward_parts={"one": scores.clone()},
        prompt_numbers=samples,
    )


@given(PLACES, st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_prompts_without_a_signal_are_replaced_in_their_order_on_any_number_of_ranks(rewards, max_rounds, num_ranks):
    ranks = Ranks(num_ranks)

    def of_rank(rank):
        per_rank = 4 // num_ranks
        return replace_groups(
            rollout_of(range(rank * per_rank, (rank + 1) * per_rank), rewards),
            lambda places: rollout_of(places, rewards),
            num_prompts=4,
            max_rounds=max_rounds,
            rank=rank,
            of_all_ranks=lambda value: ranks.gather(rank, value),
        )

    outcomes = ranks.run(of_rank)

    slots, taken, rounds, discarded = list(range(4)), 4, 0, []
    for _ in range(max_rounds):
        poor = [slot for slot, place in enumerate(slots) if set(rewards[place]) != {0.0, 1.0}]
        rounds += bool(poor)
        for slot in poor:
            discarded.append(slots[slot])
            slots[slot], taken = taken, taken + 1
    expected = rollout_of(slots, rewards)
    for name in ("prompts", "prompt_ids", "completions", "prompt_numbers"):
        assert [entry for outcome in outcomes for entry in getattr(outcome.rollout, name)] == getattr(expected, name)
    assert [place for outcome in outcomes for place in outcome.rollout.columns["place"]] == expected.columns["place"]
    for part in ("rewards", "reward_parts"):
        values = [getattr(outcome.rollout, part) for outcome in outcomes]
        joined = torch.cat([value if part == "rewards" else value["one"] for value in values])
        torch.testing.assert_close(joined, expected.rewards, equal_nan=True)
    everything = [(place, reward) for place in range(taken) for reward in rewards[place]]
    scores = [reward for _, reward in everything if not math.isnan(reward)]
    for outcome in outcomes:
        assert str(outcome.samples) == str(everything)  # as text, since NaN is not NaN
        assert outcome.num_taken == taken
        figures = dict(outcome.statistics)
        assert figures.pop("seconds") >= 0
        assert figures.pop("reward_mean", None) == (pytest.approx(sum(scores) / len(scores)) if scores else None)
        assert figures == {
            "rounds": rounds,
            "discarded_fraction": 1 - 4 / taken,
            "discarded_tokens": sum(place + 2 for place in discarded),
        }


# ---------------------------------------------------------------- in a run


def reward_of_odd_sums(prompts, completion_ids, **_):
    """0 for a prompt of which the first number is even; for others the samples differ."""
    of_tokens = [sum(i * token for i, token in enumerate(ids, start=1)) % 5 / 4 for ids in completion_ids]
    return [reward if int(prompt[0]) % 2 else 0.0 for prompt, reward in zip(prompts, of_tokens, strict=True)]


@pytest.fixture
def make_dynamic(make_run):
    """Makes a run of four rollouts in which about half of the prompts have no signal."""

    def make(*callbacks, trainer=None, **data):
        return make_run(
            *callbacks,
            trainer={"max_epochs": 4} | (trainer or {}),
            data={"dynamic_sampling_rounds": 2} | data,
            rewards=[FunctionReward(reward_of_odd_sums, name="odd")],
        )

    return make


def weights_of(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.module.parameters()])


def has_signal(rewards):
    return len(set(rewards)) > 1


def test_a_run_takes_the_next_prompts_of_the_stream_and_says_what_it_cost(make_dynamic, make_recorder):
    recorder, memory = make_recorder(), MemoryLogger()
    run = make_dynamic(recorder, RolloutStatistics(), trainer={"logger": memory})
    run.fit()
    stream, position, passes = run.data.schedule.stream, 0, []
    for i, rollout in enumerate(recorder.rollouts):
        groups = rollout.group_rewards.tolist()
        taken = round(4 / (1 - memory.values("dynamic_sampling/discarded_fraction")[i]))
        rows = [stream.row_number(position + place) for place in range(taken)]
        numbers = rollout.prompt_numbers[::4]
        assert set(numbers) <= set(rows)
        is_even = [int(stream.rows[row]["prompt"][0]) % 2 == 0 for row in rows]
        rounds = memory.values("dynamic_sampling/rounds")[i]
        if rounds < 2:
            assert all(map(has_signal, groups))
        assert taken > 4 or not any(is_even[:4])
        assert memory.values("dynamic_sampling/discarded_tokens")[i] >= taken - 4
        position += taken
        passes.append(position / len(stream.rows))
    assert run.data.state_dict()["schedule"] == {"position": position}
    assert position > 16
    assert run.data.schedule.metrics(4)["data/passes"] == passes[-1]
    left = [sum(not has_signal(group) for group in r.group_rewards.tolist()) / 4 for r in recorder.rollouts]
    assert memory.values("group/zero_std_fraction") == left
    assert memory.steps("dynamic_sampling/reward_mean") == [0, 2, 4, 6]


def test_without_it_the_prompts_stay(make_dynamic, make_recorder):
    recorder, memory = make_recorder(), MemoryLogger()
    run = make_dynamic(recorder, RolloutStatistics(), trainer={"logger": memory}, dynamic_sampling_rounds=0)
    run.fit()
    stream = run.data.schedule.stream
    assert [number for r in recorder.rollouts for number in r.prompt_numbers[::4]] == [
        stream.row_number(position) for position in range(16)
    ]
    assert sum(memory.values("group/zero_std_fraction")) > 0
    assert not [name for name in memory.scalars if name.startswith("dynamic_sampling/")]


@pytest.mark.parametrize("at", [(1, 0), (2, 1)], ids=["inside", "between"])
@pytest.mark.parametrize("curriculum", [None, PassRateCurriculum(max_rate=0.5, num_samples=4, pass_threshold=0.5)])
def test_a_resumed_run_is_the_same(make_dynamic, make_recorder, tmp_path, at, curriculum):
    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == at:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    recorder, second = make_recorder(save), make_recorder()
    prompts = {"prompts": ArithmeticPrompts(max_operand=3, num_validation=1), "curriculum": curriculum}
    whole, again = (make_dynamic(watch, **prompts) for watch in (recorder, second))
    whole.fit()
    again.fit(ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    left = [rollout.prompt_numbers for rollout in second.rollouts]
    assert left == [rollout.prompt_numbers for rollout in recorder.rollouts][at[0] + 1 :]
    assert torch.equal(weights_of(whole), weights_of(again))
    assert whole.data.state_dict()["schedule"] == again.data.state_dict()["schedule"]


def test_a_curriculum_learns_from_replaced_prompts_too(make_dynamic, make_recorder):
    recorder = make_recorder()
    run = make_dynamic(recorder, curriculum=PassRateCurriculum(num_samples=4, pass_threshold=0.5))
    run.fit()
    known = run.data.state_dict()["schedule"]
    trained = {number for rollout in recorder.rollouts for number in rollout.prompt_numbers}
    replaced = set(known["outcomes"]) - trained
    assert len(known["outcomes"]) == known["position"] > 16  # the stream has not come round
    assert replaced
    assert {known["outcomes"][number] for number in replaced} <= {"0000", "1111"}


def test_a_run_without_it_goes_on_after_the_prompts_that_were_taken(make_dynamic, make_recorder, tmp_path):
    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    first, second = make_recorder(save), make_recorder()
    make_dynamic(first).fit()
    again = make_dynamic(second, dynamic_sampling_rounds=0)
    again.fit(ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    position = again.data.state_dict()["schedule"]["position"]
    stream = again.data.schedule.stream
    assert position > 16
    expected = [stream.row_number(place) for place in range(position - 8, position)]
    assert [number for r in second.rollouts for number in r.prompt_numbers[::4]] == expected


def test_overfitting_takes_its_prompts_all_the_same(make_dynamic, make_recorder):
    recorder = make_recorder()
    make_dynamic(recorder, trainer={"overfit_batches": 2}).fit()
    assert len({tuple(rollout.prompt_numbers) for rollout in recorder.rollouts}) == 1


def test_a_second_prompt_of_a_row_gets_other_samples(make_dynamic, make_recorder):
    recorder = make_recorder()
    make_dynamic(recorder, prompts=ArithmeticPrompts(max_operand=1, num_validation=1), num_prompts=8).fit()
    samples = defaultdict(set)
    for rollout in recorder.rollouts:
        for group, number in enumerate(rollout.prompt_numbers[::4]):
            samples[number].add(str([c.token_ids for c in rollout.completions[group * 4 : group * 4 + 4]]))
    assert len(samples) <= 3
    assert sum(map(len, samples.values())) > 24  # of 32 groups: what the model is sure of comes twice by chance


# ---------------------------------------------------------------- truncated completions


def test_a_masked_completion_counts_in_its_group_alone(make_run, make_recorder):
    recorder, plain = make_recorder(), make_recorder()
    settings = {"sampling": Sampling(max_tokens=2, temperature=1.5)}
    make_run(recorder, data={**settings, "mask_truncated_completions": True}).fit()
    make_run(plain, data=settings).fit()
    (masked,), (whole,) = recorder.rollouts, plain.rollouts
    assert torch.equal(masked.rewards, whole.rewards)
    is_cut = [completion.is_truncated for completion in masked.completions]
    assert 0 < sum(is_cut) < 16
    for batch, other in zip(recorder.batches[0], plain.batches[0], strict=True):
        assert torch.equal(batch.sample_ids, other.sample_ids)
        cut = torch.tensor([is_cut[row] for row in batch.sample_ids.tolist()])
        assert not batch.completion_mask[cut].any()
        assert not batch.advantages[cut].any()
        assert torch.equal(batch.completion_mask[~cut], other.completion_mask[~cut])
        assert torch.equal(batch.advantages[~cut], other.advantages[~cut])
    sizes = [(batch.num_update_tokens, batch.num_update_sequences) for batch in recorder.batches[0]]
    assert sum(tokens for tokens, _ in sizes) == sum(
        len(c.token_ids) for c, cut in zip(masked.completions, is_cut, strict=True) if not cut
    )
    assert sum(sequences for _, sequences in sizes) == 16 - sum(is_cut)


def test_a_prompt_whose_samples_are_all_masked_has_no_signal():
    rollout = rollout_of([0, 1], [[0.0, 1.0], [0.0, 1.0]])
    cut = [Completion(c.token_ids, c.logprobs, "length") for c in rollout.completions[:2]]
    rollout.completions[:2] = cut
    assert rollout.has_signal.tolist() == [True, True]
    rollout.masks_truncated = True
    assert rollout.has_signal.tolist() == [False, True]
    assert rollout.has_equal_rewards.tolist() == [False, False]
