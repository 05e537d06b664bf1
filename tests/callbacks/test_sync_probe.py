"""The probe passes when the engine has the trainer's weights, and stops the run when it has others."""

import pytest
import torch
from lightning.pytorch import Callback

from drpo_lightning.callbacks import SyncProbe
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout import EngineError, RolloutHooks, TransformersEngine, VLLMEngine, VLLMServerEngine
from drpo_lightning.rollout.supervised import SupervisedEngine


class Tamper(Callback, RolloutHooks):
    """Changes the engine's weights after the trainer has given it its own; `rollout` counts from 0."""

    def __init__(self, change, rollout=0):
        self.change = change
        self.rollout = rollout

    def on_engine_refresh(self, trainer, pl_module, engine):
        if trainer.datamodule.iteration == self.rollout:
            with torch.no_grad():
                self.change(engine._model)


def reversed_layer(model):
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.copy_(weight.flip(0))


def untrained_head(model):
    model.lm_head.weight.zero_()


def test_the_probe_passes_and_its_difference_is_logged(make_run, make_memory):
    logger = make_memory()
    make_run(SyncProbe(), trainer={"logger": logger, "max_epochs": 3}).fit()
    assert logger.steps("sync/probe_logprob_diff") == [0, 2, 4]
    assert max(logger.values("sync/probe_logprob_diff")) < 1e-5


@pytest.mark.parametrize("change", [reversed_layer, untrained_head])
def test_other_weights_in_the_engine_stop_the_run(make_run, make_recorder, change):
    recorder = make_recorder()
    run = make_run(Tamper(change), SyncProbe(), recorder)
    with pytest.raises(EngineError, match=r"after a weight sync the engine and the trainer differ by .* nats"):
        run.fit()
    assert not recorder.rollouts
    assert not run.data.engine.is_started


def test_a_weight_that_stays_behind_later_is_noticed_then(make_run, make_recorder):
    class Stale(TransformersEngine):
        """Takes the first weights and no others, as an engine with a stale cache would."""

        loads = 0

        def load_weights(self, weights):
            self.loads += 1
            super().load_weights(weights if self.loads == 1 else [])

    recorder = make_recorder()
    run = make_run(
        SyncProbe(),
        recorder,
        trainer={"max_epochs": 3},
        data={"engine": Stale()},
        module={"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
    )
    with pytest.raises(EngineError, match="the engine does not generate with the trainer's weights"):
        run.fit()
    assert len(recorder.rollouts) == 1


def test_logprobs_that_are_nan_stop_the_run(make_run):
    class Broken(TransformersEngine):
        def generate(self, *arguments, **settings):
            groups = super().generate(*arguments, **settings)
            groups[0][0].logprobs[0] = float("nan")
            return groups

    with pytest.raises(EngineError, match="differ by nan nats"):
        make_run(SyncProbe(), data={"engine": Broken()}).fit()


def test_the_threshold_is_a_setting(make_run):
    make_run(Tamper(reversed_layer), SyncProbe(threshold=100.0)).fit()
    with pytest.raises(EngineError, match=r"threshold 1e-12 for an engine in float32"):
        make_run(SyncProbe(threshold=1e-12)).fit()


def test_an_engine_of_low_precision_has_a_wider_threshold(make_run, make_memory):
    logger = make_memory()
    make_run(SyncProbe(), trainer={"logger": logger}, data={"engine": TransformersEngine(dtype="bfloat16")}).fit()
    (difference,) = logger.values("sync/probe_logprob_diff")
    assert 1e-3 < difference < 0.25


def test_the_probe_knows_the_temperature_of_the_sampling(make_run, make_memory):
    """At another temperature than the trainer's, which `PolicyModule` refuses, the logprobs differ."""
    run = make_run(SyncProbe())

    def another_temperature(*_):
        run.module.network.temperature = 0.7

    run.trainer.callbacks.insert(0, Tamper(another_temperature))
    with pytest.raises(EngineError, match="differ by"):
        run.fit()


def test_the_probe_is_longer_than_a_block_of_the_prefix_cache(make_run):
    lengths = []

    class Blocks(TransformersEngine):
        cache_block_tokens = 48

        def generate(self, prompt_ids, *arguments, **settings):
            lengths.append({len(ids) for ids in prompt_ids})
            return super().generate(prompt_ids, *arguments, **settings)

    make_run(SyncProbe(num_sequences=3), data={"engine": Blocks()}).fit()
    assert lengths[0] == {96}


@pytest.mark.parametrize("block_tokens", [510, 512, 1024])
def test_a_context_shorter_than_a_block_is_an_error_with_a_way_out(make_run, block_tokens):
    engine = TransformersEngine()
    engine.cache_block_tokens = block_tokens
    engine.context_setting = "`--length`"
    message = (
        rf"longer than a block of the prefix cache \({block_tokens} tokens\).*context is 512 tokens: "
        f"raise `--length` to {block_tokens + 3} or more"
    )
    with pytest.raises(SettingError, match=message):
        make_run(SyncProbe(), data={"engine": engine}).fit()


def test_each_engine_says_how_its_own_context_is_raised():
    server = VLLMServerEngine(["http://127.0.0.1:8000"])
    assert server.context_setting == "`--max-model-len` of each `drpo serve`"
    assert SupervisedEngine(server).context_setting == server.context_setting
    assert "max_model_len" in VLLMEngine().context_setting
    assert "max_position_embeddings" in TransformersEngine().context_setting


def test_the_smallest_context_that_the_error_names_is_enough(make_run):
    class Short(TransformersEngine):
        """With a context of 512 and blocks that are just short enough."""

        cache_block_tokens = 509

    make_run(SyncProbe(num_sequences=1), data={"engine": Short()}).fit()


def test_the_probe_also_runs_before_a_validation(make_run):
    from drpo_lightning.datamodules import ArithmeticPrompts

    val_prompts = ArithmeticPrompts("validation", max_operand=9, num_validation=20)
    run = make_run(Tamper(reversed_layer), SyncProbe(), data={"val_prompts": val_prompts})
    with pytest.raises(EngineError, match="differ by"):
        run.trainer.validate(run.module, run.data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, r"`threshold` must be positive, in nats, got 0\.0"),
        ({"threshold": float("nan")}, "`threshold` must be positive, in nats, got nan"),
        ({"num_sequences": 0}, "`num_sequences` must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SyncProbe(**settings)
