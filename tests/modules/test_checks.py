import shutil
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.fsdp import MixedPrecision

from drpo_lightning.batch import Sampling
from drpo_lightning.modules.checks import (
    are_finite,
    check_adapters,
    check_model_folder,
    check_optimizer,
    check_precision,
    check_sampling,
    check_strategy,
    fraction_rounded_away,
    parameter_dtype,
)
from drpo_lightning.objectives import DRPO


def test_a_folder_without_a_model_is_named(model_folder, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match=rf"`model` '{folder}' is no folder; a name on the Hugging Face hub"):
        check_model_folder(str(folder))
    folder.mkdir()
    with pytest.raises(ValueError, match=rf"'{folder}' has no config\.json: it is no folder of a transformers model"):
        check_model_folder(str(folder))
    shutil.copy(f"{model_folder}/config.json", folder)
    with pytest.raises(ValueError, match=rf"'{folder}' has no weights: no \*\.safetensors or pytorch_model\*\.bin"):
        check_model_folder(str(folder))
    shutil.copy(f"{model_folder}/model.safetensors", folder)
    check_model_folder(str(folder))


def strategy(made, device="cpu"):
    made.parallel_devices = [torch.device(device)]
    made.cluster_environment = LightningEnvironment()
    return made


def test_strategies_that_spread_or_copy_the_policy_are_taken():
    check_strategy(SingleDeviceStrategy())
    for made in (DDPStrategy(), FSDPStrategy(), ModelParallelStrategy()):
        check_strategy(strategy(made))


def test_a_strategy_without_support_is_refused():
    with pytest.raises(ValueError, match=r"`trainer\.strategy` SimpleNamespace is not supported; take `ddp`"):
        check_strategy(SimpleNamespace(root_device=torch.device("cpu")))
    with pytest.raises(ValueError, match=r"with `use_orig_params: false` is not supported.*leave the setting out"):
        check_strategy(strategy(FSDPStrategy(use_orig_params=False)))
    with pytest.raises(ValueError, match=r"with `mixed_precision` is not supported.*set `trainer\.precision`"):
        check_strategy(strategy(FSDPStrategy(mixed_precision=MixedPrecision())))
    with pytest.raises(ValueError, match=r"mps is not supported.*set `trainer.accelerator: cpu`"):
        check_strategy(SingleDeviceStrategy(device="mps"))


@pytest.mark.parametrize("precision", ["16-true", "64-true", "transformer-engine"])
def test_a_precision_without_support_is_refused(precision):
    with pytest.raises(ValueError, match=f"`trainer.precision` {precision} is not supported; take one of 32-true"):
        check_precision(precision)


def test_a_fused_optimizer_is_refused_where_gradients_are_scaled():
    parameters = [torch.ones(2, requires_grad=True)]
    for fused, precision in ((True, "bf16-mixed"), (None, "16-mixed"), (False, "16-mixed")):
        check_optimizer(torch.optim.AdamW(parameters, fused=fused), precision)
    with pytest.raises(ValueError, match=r"`fused: true` takes the loss scale off.*leave `fused` out"):
        check_optimizer(torch.optim.AdamW(parameters, fused=True), "16-mixed")


def test_adapters_are_refused_where_fsdp1_does_not_shard():
    check_adapters(FSDPStrategy(), 2)
    check_adapters(ModelParallelStrategy(), 1)
    with pytest.raises(ValueError, match=r"on one rank does not work with `model\.peft`.*take `auto`"):
        check_adapters(FSDPStrategy(), 1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_parameters_are_float32_unless_asked(precision):
    check_precision(precision)
    assert parameter_dtype(precision) == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_samples_of_the_same_distribution_are_taken():
    check_sampling(Sampling(temperature=0.7), DRPO(), 0.7)


class NoRatio(DRPO):
    uses_importance_ratio = False


def test_an_objective_without_a_ratio_may_take_any_sampling():
    check_sampling(Sampling(top_p=0.5, top_k=3), NoRatio(), 1.0)


def test_a_step_is_lost_on_parameters_that_are_too_coarse():
    parameters = [torch.tensor([1.0, 1e-3, 0.0, -2.0], dtype=torch.bfloat16)]
    assert fraction_rounded_away(parameters, 1e-3) == 0.5
    assert fraction_rounded_away(parameters, 1e-7) == 0.75
    assert fraction_rounded_away(parameters, 1.0) == 0.0


def test_float32_parameters_are_not_counted():
    assert fraction_rounded_away([torch.ones(4)], 1e-9) == 0.0
    mixed = [torch.ones(4), torch.ones(4, dtype=torch.bfloat16)]
    assert fraction_rounded_away(mixed, 1e-6) == 1.0
    assert fraction_rounded_away([], 1e-6) == 0.0


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0], True),
        ([6e4, 6e4], True),
        ([1.0, float("nan")], False),
        ([1.0, float("inf")], False),
        ([float("inf"), -float("inf")], False),
        ([], True),
    ],
)
def test_finite_values_are_told_from_others_whatever_their_sum(precision, values, finite):
    """6e4 + 6e4 overflows in float16."""
    tensor = torch.tensor(values, dtype=precision)
    assert are_finite([torch.ones(3), tensor]) is finite
