"""What leaves the policy as it is, what averages it, and what is refused."""

import math
import shutil
import sys

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
)

from tests.machinery.conftest import flat, sgd

BARE = dict.fromkeys(("logger", "log_every_n_steps", "enable_checkpointing", "enable_progress_bar"))


@pytest.fixture(scope="module")
def plain():
    """Weights of a plain run, once there has been one."""
    return []


UNCHANGED = {
    "gradient_checkpointing": {"module": {"gradient_checkpointing": True}},
    "deterministic": {"trainer": {"deterministic": True}},
    "benchmark": {"trainer": {"benchmark": True}},
    "detect_anomaly": {"trainer": {"detect_anomaly": True}},
    "inference_mode": {"trainer": {"inference_mode": False}},
    "use_distributed_sampler": {"trainer": {"use_distributed_sampler": True}},
    "reload_dataloaders": {"trainer": {"reload_dataloaders_every_n_epochs": 1}},
    "barebones": {"trainer": {"barebones": True, "enable_model_summary": None, **BARE}},
    "model_summary": {"callbacks": [ModelSummary(2)], "trainer": {"enable_model_summary": True}},
    "rich_progress_bar": {"callbacks": [RichProgressBar()], "trainer": {"enable_progress_bar": True}},
    "validations": {"trainer": {"val_check_interval": 1, "num_sanity_val_steps": 0}},
}


@pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)` but `Trainer\\(barebones=True\\)`")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("name", UNCHANGED)
def test_the_policy_comes_out_the_same_with(fit, plain, name):
    if not plain:
        plain.append(flat(fit(trainer={"max_epochs": 2})[0].module))
    settings = dict(UNCHANGED[name])
    trainer = {"max_epochs": 2} | settings.pop("trainer", {})
    try:
        run, _ = fit(*settings.pop("callbacks", []), trainer=trainer, **settings)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert torch.equal(flat(run.module), plain[0])


def test_clipping_by_value_bounds_every_step(fit):
    """With plain gradient descent a weight moves by the learning rate times the bound at most."""
    clipping = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    _, watcher = fit(trainer={"max_epochs": 2} | clipping, module={"optimizer": sgd})
    moves = [(watcher.weights[step + 1] - watcher.weights[step]).abs().max() for step in range(1, 4)]
    assert [float(move) for move in moves] == pytest.approx([1e-4] * 3, rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_run_in_bfloat16_validates(fit, precision):
    run, watcher = fit(trainer={"max_epochs": 2, "precision": precision}, module={"optimizer": sgd})
    assert watcher.validations == [0, 2, 4]
    assert math.isfinite(run.trainer.callback_metrics["val/reward/mean"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, while it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(" " in sys.prefix, reason="torch.compile does not quote the paths that it hands to the compiler")
def test_compiled_layers_train_the_same_policy(fit):
    settings = {"trainer": {"max_epochs": 1}, "data": {"num_updates": 1}}
    compiled, ours = (fit(module={"compile_layers": on, "optimizer": sgd}, **settings)[0] for on in (True, False))
    assert torch.allclose(flat(compiled.module), flat(ours.module), atol=1e-5)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averaged_weights_are_validated_and_kept_but_do_not_sample_rollouts(fit):
    run, watcher = fit(EMAWeightAveraging(decay=0.5), trainer={"max_epochs": 2})
    averages = {1: watcher.weights[1]}
    for step in range(2, 5):
        averages[step] = (averages[step - 1] + watcher.weights[step]) / 2
    torch.testing.assert_close(flat(run.module), averages[4])
    for used, expected in zip(
        [weights for _, weights in watcher.sampled_with[2:]],
        [averages[2], watcher.weights[2], averages[4]],
        strict=True,
    ):
        torch.testing.assert_close(used, expected)


@pytest.mark.parametrize(
    ("callback", "way_out"),
    [
        (GradientAccumulationScheduler({0: 1, 1: 2}), "trainer.accumulate_grad_batches"),
        (StochasticWeightAveraging(swa_lrs=1e-3), "EMAWeightAveraging"),
        (LearningRateFinder(), "model.optimizer"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_callback_that_cannot_work_is_refused_before_the_model_is_loaded(fit, monkeypatch, callback, way_out):
    monkeypatch.setattr("drpo_lightning.modules.PolicyModule.configure_model", lambda self: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"`trainer.callbacks` {type(callback).__name__} .*{way_out}"):
        fit(callback)


def test_lightning_itself_refuses_to_look_for_a_batch_size(fit):
    with pytest.raises(MisconfigurationException, match="Field batch_size not found"):
        fit(BatchSizeFinder())
