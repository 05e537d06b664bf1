"""Isolated rewards in real runs: failures by policy, counted, stored, and not trained on where they are dropped."""

import json
import logging
import multiprocessing

import pytest
import torch

from drpo_lightning.batch import Rollout
from drpo_lightning.callbacks import FallibleReward, FunctionReward, IsolatedReward, RolloutStatistics
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch, RewardError, RewardFailure
from tests.conftest import scattered_reward
from tests.rewards.hostile import EXITS, LOOPS, Fragile, Hostile
from tests.rewards.stateful import Answering


@pytest.fixture
def workers_end_with_the_run():
    """Fails the test if a process of its own is left."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


def expected_scores(rollout):
    """Of each sample: a score, `error` or `timeout`."""
    totals = [sum(completion.token_ids) for completion in rollout.completions]
    return ["error" if t % EXITS == 0 else "timeout" if t % LOOPS == 0 else t % 7 / 7 for t in totals]


class Scripted(FallibleReward):
    """Fails where a function says so: for what needs no process."""

    def __init__(self, fails, **settings):
        super().__init__(name="scripted", **settings)
        self.fails = fails

    def outcomes(self, batch):
        scores = scattered_reward(batch.completion_ids)
        return [
            RewardFailure("error", "failed") if self.fails(i, ids) else score
            for i, (ids, score) in enumerate(zip(batch.completion_ids, scores, strict=True))
        ]


@pytest.mark.usefixtures("workers_end_with_the_run")
def test_a_run_drops_what_fails_counts_it_stores_it_and_ends_the_workers(
    make_run, make_memory, make_recorder, tmp_path, caplog
):
    logger, recorder = make_memory(), make_recorder()
    reward = IsolatedReward(Fragile(), timeout_seconds=0.2, on_failure="drop_sample", max_stored_failures=3)
    assert (reward.name, reward.weight, reward.required_columns) == ("fragile", 2.0, ("answer",))
    run = make_run(RolloutStatistics(), recorder, rewards=[reward], trainer={"logger": logger, "max_epochs": 2})
    with caplog.at_level(logging.WARNING):
        run.fit()
    stored = [json.loads(line) for line in (tmp_path / "reward_failures.jsonl").read_text().splitlines()]
    for epoch, rollout in enumerate(recorder.rollouts):
        expected = expected_scores(rollout)
        scores = [2 * score for score in expected if not isinstance(score, str)]
        kept = [not isinstance(score, str) for score in expected]
        assert 0 < len(scores) < 16
        assert rollout.is_kept.tolist() == kept
        assert rollout.rewards[rollout.is_kept].tolist() == pytest.approx(scores)
        assert logger.values("reward/fragile/error_fraction")[epoch] == expected.count("error") / 16
        assert logger.values("reward/fragile/timeout_fraction")[epoch] == expected.count("timeout") / 16
        assert logger.values("reward/dropped_fraction")[epoch] == pytest.approx(1 - len(scores) / 16)
        assert logger.values("reward/mean")[epoch] == pytest.approx(sum(scores) / len(scores))
        assert logger.values("reward/fragile/mean")[epoch] == pytest.approx(sum(scores) / len(scores) / 2)
        assert logger.values("reward/fragile/applies_fraction")[epoch] == 1.0
        rows = [row for row in stored if row["step"] == 2 * epoch]
        failed = [i for i in range(16) if not kept[i]][:3]
        assert [row["completion_ids"] for row in rows] == [rollout.completions[i].token_ids for i in failed]
        assert [row["kind"] for row in rows] == [expected[i] for i in failed]
        for row, i in zip(rows, failed, strict=True):
            assert (row["prompt"], row["completion"]) == (rollout.prompts[i], rollout.texts[i])
            assert row["columns"]["answer"] == rollout.columns["answer"][i]
            assert (row["reward"], row["stage"], row["rank"]) == ("fragile", "training", 0)
            assert "SystemExit" in row["output"] or "Timeout" in row["output"]
    assert "reward 'fragile' failed on" in caplog.text
    assert all(torch.isfinite(parameter).all() for parameter in run.module.parameters())


@pytest.mark.usefixtures("workers_end_with_the_run")
def test_raise_is_the_default_and_stores_the_samples_before_it_ends_the_run(make_run, tmp_path):
    run = make_run(rewards=[IsolatedReward(Fragile(), num_workers=1, timeout_seconds=0.2)])
    with pytest.raises(
        RewardError,
        match=r"reward 'fragile' (raised SystemExit: \d+|took longer than 0.2 s), for prompt .*it failed on",
    ):
        run.fit()
    assert (tmp_path / "reward_failures.jsonl").read_text().count("\n") > 1


def test_a_score_for_failures_counts_like_any_other(make_run, make_memory, make_recorder):
    logger, recorder = make_memory(), make_recorder()
    reward = Scripted(lambda i, _: i % 4 == 1, weight=0.5, on_failure="score", failure_score=-3.0)
    make_run(RolloutStatistics(), recorder, rewards=[reward], trainer={"logger": logger}).fit()
    (rollout,) = recorder.rollouts
    scores = scattered_reward([completion.token_ids for completion in rollout.completions])
    expected = [-3.0 if i % 4 == 1 else score for i, score in enumerate(scores)]
    assert rollout.reward_parts["scripted"].tolist() == expected
    assert rollout.rewards.tolist() == [score / 2 for score in expected]
    assert logger.values("reward/scripted/error_fraction") == [0.25]
    assert logger.values("reward/dropped_fraction") == [0.0]


def test_dropped_samples_are_not_trained_on(make_run, make_recorder):
    recorder = make_recorder()
    reward = Scripted(lambda i, _: i % 3 == 0, on_failure="drop_sample")
    run = make_run(recorder, rewards=[reward], trainer={"accumulate_grad_batches": 2})
    run.fit()
    (rollout,) = recorder.rollouts
    kept = [i % 3 != 0 for i in range(16)]
    rewards = rollout.rewards.tolist()
    (batches,) = recorder.batches
    assert sorted(int(i) for batch in batches for i in batch.sample_ids) == list(range(16))
    for update in (batches[:2], batches[2:]):
        rows = [int(i) for batch in update for i in batch.sample_ids if kept[int(i)]]
        tokens = sum(len(rollout.completions[i].token_ids) for i in rows)
        for batch in update:
            assert (batch.num_update_tokens, batch.num_update_sequences) == (tokens, len(rows))
            for row, i in enumerate(batch.sample_ids.tolist()):
                length = len(rollout.completions[i].token_ids) if kept[i] else 0
                assert int(batch.completion_mask[row].sum()) == length
                others = [rewards[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if kept[j]]
                advantage = rewards[i] - sum(others) / len(others) if kept[i] else 0.0
                expected = [advantage] * length
                assert batch.advantages[row][batch.completion_mask[row]].tolist() == pytest.approx(expected, abs=1e-6)
                assert batch.advantages[row][~batch.completion_mask[row]].eq(0).all()


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_an_update_without_any_sample_has_no_gradient(make_run, make_memory, aggregation):
    logger = make_memory()
    reward = Scripted(lambda *_: True, on_failure="drop_sample")
    module = {"aggregation": aggregation, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0)}
    run = make_run(RolloutStatistics(), rewards=[reward], trainer={"logger": logger}, module=module)
    run.fit()
    assert logger.values("optim/grad_norm") == [0.0, 0.0]
    assert logger.values("reward/dropped_fraction") == [1.0]
    assert "reward/mean" not in logger.scalars


def test_rewards_with_a_reference_in_the_reward_may_drop_samples(make_run, make_memory):
    from drpo_lightning.modules.reference import ReferencePenalty

    logger = make_memory()
    reward = Scripted(lambda i, _: i % 3 == 0, on_failure="drop_sample")
    module = {"reference": ReferencePenalty(0.1, placement="reward")}
    run = make_run(RolloutStatistics(), rewards=[reward], trainer={"logger": logger}, module=module)
    run.fit()
    assert all(torch.isfinite(torch.tensor(logger.values("optim/loss"))))
    assert logger.values("reward/reference_kl/mean") == pytest.approx([0.0], abs=1e-4)


def test_a_validation_counts_its_failures_too(make_run, make_memory, tmp_path):
    logger = make_memory()
    reward = Scripted(lambda i, _: i % 5 == 0, on_failure="drop_sample")
    prompts = ArithmeticPrompts("validation", max_operand=9, num_validation=20)
    run = make_run(
        rewards=[reward],
        trainer={"logger": logger, "num_sanity_val_steps": -1},
        data={"val_prompts": prompts, "val_num_samples": 2},
    )
    run.fit()
    assert logger.values("val/reward/scripted/error_fraction") == [0.2, 0.2]
    assert logger.values("val/reward/scripted/timeout_fraction") == [0.0, 0.0]
    assert logger.values("val/reward/dropped_fraction") == pytest.approx([0.2, 0.2])
    assert logger.steps("val/reward/scripted/error_fraction") == [0, 2]
    rows = [json.loads(line) for line in (tmp_path / "reward_failures.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["validation"] * 8 + ["training"] * 4 + ["validation"] * 8


def test_a_resumed_run_knows_what_was_dropped(make_run, make_recorder, tmp_path):
    from drpo_lightning.datamodules.rollout_state import rollout_from_state, rollout_to_state

    recorder = make_recorder()
    make_run(recorder, rewards=[Scripted(lambda i, _: i % 3 == 0, on_failure="drop_sample")]).fit()
    (rollout,) = recorder.rollouts
    again = rollout_from_state(rollout_to_state(rollout))
    assert isinstance(again, Rollout)
    assert torch.equal(again.is_kept, rollout.is_kept)
    assert torch.equal(again.reward_errors["scripted"], rollout.reward_errors["scripted"])


def test_majority_votes_are_over_the_answers_of_the_reward(make_run, make_recorder):
    recorder = make_recorder()
    make_run(recorder, rewards=[IsolatedReward(Answering(), num_workers=1)]).fit()
    (rollout,) = recorder.rollouts
    assert rollout.answers == [text.upper() or None for text in rollout.texts]


def test_an_exception_in_the_answers_names_the_reward():
    batch = RewardBatch(["p"], ["!"], [[1]], ["stop"])
    with pytest.raises(RewardError, match=r"reward 'mine' raised KeyError\('no answer'\) in `answers`"):
        IsolatedReward(Answering(name="mine"), num_workers=1).answers(batch)
    assert IsolatedReward(Hostile()).answers(batch) is None


def test_a_reward_that_cannot_be_pickled_or_treats_failures_itself_is_refused():
    with pytest.raises(SettingError, match="'<lambda>' cannot be pickled"):
        IsolatedReward(FunctionReward(lambda **_: [0.0]))
    with pytest.raises(ValueError, match="`reward` IsolatedReward treats failures itself"):
        IsolatedReward(IsolatedReward(Hostile()))


@pytest.mark.parametrize("name", ["num_workers", "timeout_seconds", "memory_limit_gib", "max_processes"])
def test_bad_settings_raise(name):
    with pytest.raises(ValueError, match=f"`{name}` must be positive and finite, got 0"):
        IsolatedReward(Hostile(), **{name: 0})


def test_it_is_listed_in_a_configuration():
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback

    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    isolated = {
        "class_path": "drpo_lightning.callbacks.IsolatedReward",
        "init_args": {
            "reward": {"class_path": "tests.rewards.hostile.Hostile"},
            "num_workers": 3,
            "on_failure": "score",
            "failure_score": -1,
        },
    }
    config = parser.parse_object({"callback": isolated})
    callback = parser.instantiate_classes(config).callback
    assert isinstance(callback, IsolatedReward)
    assert callback.failure_policy.failure_score == -1.0
