"""The engine's part in a training, and in a validation."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import FunctionReward
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.rewards.base import RewardError
from drpo_lightning.rollout import RolloutHooks
from tests.datamodules.rollout_runs import (
    Listed,
    WatchedEngine,
    trained_sequences,
    weights_of,
)

# ---------------------------------------------------------------- engine


def test_weights_are_loaded_before_every_rollout_and_the_engine_sleeps_after_it(make_run):
    engine = WatchedEngine()
    make_run(trainer={"max_epochs": 2}, data={"engine": engine}).fit()
    assert engine.calls == ["start", "load", "generate", "sleep", "wake", "load", "generate", "sleep"]


def test_hooks_run_in_order(make_run, make_recorder):
    recorder = make_recorder()
    make_run(recorder, trainer={"max_epochs": 2}).fit()
    assert recorder.events == ["start", "refresh", "end"] * 2


def test_after_a_refresh_the_engine_has_the_weights_of_the_trainer(make_run):
    class Compare(Callback, RolloutHooks):
        def __init__(self):
            self.heads = []

        def on_engine_refresh(self, trainer, pl_module, engine):
            own = engine._model.state_dict()
            named = dict(pl_module.named_weights())
            assert own.keys() == named.keys()
            assert all(torch.equal(own[name], tensor) for name, tensor in named.items())
            self.heads.append(own["lm_head.weight"].clone())

    compare = Compare()
    make_run(compare, trainer={"max_epochs": 3}).fit()
    assert len(compare.heads) == 3
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(compare.heads, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_the_run_before_anything_is_sent(make_run, make_recorder, value):
    def break_one_weight(trainer, pl_module, batch_idx):
        if batch_idx == 1:
            with torch.no_grad():
                next(iter(pl_module.parameters()))[5, 7] = value

    engine = WatchedEngine()
    run = make_run(make_recorder(break_one_weight), trainer={"max_epochs": 2}, data={"engine": engine})
    with pytest.raises(
        ValueError, match=r"a weight of the policy is NaN or infinite: it is not sent.*gradient_clip_val"
    ):
        run.fit()
    assert engine.calls.count("load") == engine.calls.count("generate") == 1
    assert not engine.is_started


def test_weights_of_another_model_are_refused_before_anything_is_sent(make_run, copied_model):
    from transformers import AutoConfig, AutoModelForCausalLM

    other = copied_model()
    config = AutoConfig.from_pretrained(other)
    config.intermediate_size = 8
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    engine = WatchedEngine()
    run = make_run(data={"engine": engine, "model": other})
    with pytest.raises(ValueError, match=r"do not fit the engine's model \(6 problems\).*Do trainer and engine load"):
        run.fit()
    assert "load" not in engine.calls
    assert not engine.is_started


def test_the_engine_is_closed_after_training(make_run):
    run = make_run()
    run.fit()
    assert not run.data.engine.is_started


def test_the_engine_is_closed_after_an_exception(make_run, make_recorder):
    seen = []

    def fail(trainer, pl_module, batch_idx):
        seen.append(run.data.engine.is_started)
        raise OSError("disk full")

    run = make_run(make_recorder(fail))
    with pytest.raises(OSError, match="disk full"):
        run.fit()
    assert seen == [True]
    assert not run.data.engine.is_started


def test_the_engine_is_closed_after_an_interrupt(make_run, make_recorder):
    def interrupt(trainer, pl_module, batch_idx):
        raise KeyboardInterrupt

    run = make_run(make_recorder(interrupt))
    with pytest.raises(SystemExit):
        run.fit()
    assert not run.data.engine.is_started


def test_the_engine_is_closed_after_a_reward_fails(make_run):
    run = make_run(rewards=[FunctionReward(lambda **_: [1.0], name="short")])
    with pytest.raises(RewardError, match="'short' returned 1 scores for 16"):
        run.fit()
    assert not run.data.engine.is_started


def test_a_closed_run_can_be_continued(make_run):
    run = make_run()
    run.fit()
    run.trainer.fit_loop.max_epochs = 2
    run.fit()
    assert run.data.iteration == 2


# ---------------------------------------------------------------- validation


def test_validation_scores_every_prompt_by_its_own_sampling(make_run):
    engine = WatchedEngine()
    greedy = Sampling(max_tokens=3, temperature=0.0)
    run = make_run(
        trainer={"max_epochs": 2, "num_sanity_val_steps": -1},
        data={
            "engine": engine,
            "val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20),
            "val_sampling": greedy,
            "val_num_samples": 2,
        },
    )
    run.fit()
    validations = [request for request in engine.requests if request["sampling"] == greedy]
    assert [(v["num_prompts"], v["num_samples"]) for v in validations] == [(20, 2)] * 3
    assert validations[0]["seeds"] == validations[1]["seeds"]
    assert run.data.iteration == 2
    assert 0 <= run.trainer.callback_metrics["val/pass@1"] <= run.trainer.callback_metrics["val/pass@2"] <= 1
    assert run.trainer.callback_metrics["val/completions/mean_length"] <= 3


def test_validation_does_not_disturb_the_training(make_run, make_recorder):
    batches, weights = [], []
    for val_prompts in (None, ArithmeticPrompts("validation", max_operand=9, num_validation=20)):
        recorder = make_recorder()
        run = make_run(recorder, trainer={"max_epochs": 2}, data={"val_prompts": val_prompts})
        run.fit()
        batches.append([trained_sequences(b) for b in recorder.batches])
        weights.append(weights_of(run))
    assert batches[0] == batches[1]
    assert torch.equal(*weights)


def test_validation_alone_needs_no_training_prompts(make_run):
    run = make_run(data={"val_prompts": Listed("1+1=", "2+2="), "prompts": Listed("x" * 600)})
    run.trainer.validate(run.module, run.data)
    assert run.trainer.callback_metrics["val/reward/mean"] <= 1
    assert not run.data.engine.is_started


def test_a_run_without_validation_prompts_needs_no_other_setting(make_run):
    make_run(trainer={"limit_val_batches": 1.0}).fit()


def test_the_trainer_validates_again_after_a_run_without_validation_prompts(make_run, make_recorder):
    def fail(trainer, pl_module, batch_idx):
        raise OSError("disk full")

    trainer = {"limit_val_batches": 0.5}
    run, broken = make_run(trainer=trainer), make_run(make_recorder(fail), trainer=trainer)
    run.fit()
    with pytest.raises(OSError, match="disk full"):
        broken.fit()
    assert run.trainer.limit_val_batches == broken.trainer.limit_val_batches == 0.5
    run.trainer.limit_val_batches = 1.0
    other = make_run(data={"val_prompts": Listed("1+1=")})
    run.trainer.validate(run.module, other.data)
    assert "val/reward/mean" in run.trainer.callback_metrics


def test_validation_needs_validation_prompts(make_run):
    run = make_run()
    with pytest.raises(ValueError, match=r"`data\.val_prompts` must be set to validate"):
        run.trainer.validate(run.module, run.data)
