"""Figures of the prompts against those computed from the rollouts themselves."""

import pytest

from drpo_lightning.callbacks import PromptStatistics
from drpo_lightning.callbacks.prompt_statistics import data_set_metrics
from drpo_lightning.datamodules import ArithmeticPrompts, MixedPrompts, PassRateCurriculum


def test_a_mixture_is_logged_by_data_set(make_run, make_recorder, make_memory):
    recorder, memory = make_recorder(), make_memory()
    data_sets = {f"seed {seed}": ArithmeticPrompts(max_operand=3, num_validation=6, seed=seed) for seed in (1, 2)}
    run = make_run(
        PromptStatistics(),
        recorder,
        trainer={"max_epochs": 3, "logger": memory},
        data={"prompts": MixedPrompts(data_sets, {"seed 1": 3, "seed 2": 1})},
    )
    run.fit()
    assert memory.scalars["data/passes"] == [(0, 4 / 20), (2, 8 / 20), (4, 12 / 20)]
    for name in data_sets:
        is_of_set = [[of_sample == name for of_sample in r.columns["data_set"]] for r in recorder.rollouts]
        assert memory.values(f"data/{name}/fraction") == [sum(of_rollout) / 16 for of_rollout in is_of_set]
        means = [
            sum(r for r, is_one in zip(rollout.rewards.tolist(), chosen, strict=True) if is_one) / sum(chosen)
            for rollout, chosen in zip(recorder.rollouts, is_of_set, strict=True)
            if any(chosen)
        ]
        assert memory.values(f"data/{name}/reward_mean") == pytest.approx(means)
    assert "data/skipped_fraction" not in memory.scalars


def test_a_curriculum_and_prompts_left_out_are_logged(make_run, make_memory):
    memory = make_memory()
    run = make_run(
        PromptStatistics(),
        trainer={"max_epochs": 4, "logger": memory},
        data={
            "prompts": ArithmeticPrompts(max_operand=10, num_validation=100),
            "max_prompt_tokens": 4,
            "overlong_prompts": "drop",
            "curriculum": PassRateCurriculum(max_rate=0.25, num_samples=4, pass_threshold=0.5),
        },
    )
    run.fit()
    dropped = run.data.num_overlong_prompts
    assert memory.values("data/overlong_prompts") == [dropped] * 4
    assert dropped == 21 - len(run.data.schedule.rows) > 0
    for name in ("data/skipped_fraction", "data/too_easy_fraction", "data/too_hard_fraction", "data/unjudged_fraction"):
        assert memory.steps(name) == [0, 2, 4, 6]
    assert memory.values("data/unjudged_fraction")[0] == 1 - 4 / len(run.data.schedule.rows)


def test_dropped_samples_have_a_share_but_no_reward(make_run, make_rollout):
    import torch

    run = make_run()
    rollout = make_rollout(
        columns={"data_set": ["a", "a", "b", "b"]},
        rewards=torch.tensor([1.0, float("nan"), float("nan"), float("nan")]),
    )
    assert data_set_metrics(run.trainer, run.module, rollout, ["a", "b", "c"]) == {
        "data/a/fraction": 0.5,
        "data/a/reward_mean": 1.0,
        "data/b/fraction": 0.5,
        "data/c/fraction": 0.0,
    }
