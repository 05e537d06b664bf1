"""Adapters on their way to an engine: what is merged, what is written, and what real engines make of it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drpo_lightning.errors import SettingError
from drpo_lightning.modules.lora import LoRA, attach_adapter
from drpo_lightning.rollout import TransformersEngine, VLLMEngine, check_weights
from drpo_lightning.rollout.adapters import (
    adapter_weights,
    is_adapter_weight,
    merged_shapes,
    merged_weights,
    paired_factors,
    write_adapter,
)
from drpo_lightning.rollout.transformers import round_to_fp8
from drpo_lightning.rollout.vllm_settings import adapter_kwargs
from drpo_lightning.rollout.weights import model_weight_shapes
from tests.rollout.conftest import MODEL
from tests.rollout.test_engines import TOLERANCE
from tests.rollout.test_weight_sync import worst_difference

SETTINGS = LoRA(r=8, lora_alpha=24.0)


def adapted(seed, settings=SETTINGS):
    """The small model with adapters that change its logprobs by whole nats."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    attach_adapter(model, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def load_adapter(engine, model, settings=SETTINGS):
    engine.load_adapter(settings.adapter_config(MODEL), adapter_weights(model.state_dict().items()))


def start(engine):
    engine.start(MODEL, device=torch.device("cpu"), num_ranks=1, seed=0, adapter_rank=SETTINGS.r)
    return engine


# ---------------------------------------------------------------- tensors


def test_merged_weights_are_the_models_own_with_scale_times_b_a_added(policy):
    state, own = adapted(1).state_dict(), policy.state_dict()
    merged = dict(merged_weights(state.items(), SETTINGS.scale))
    assert merged.keys() == own.keys()
    num_adapted = 0
    for name, tensor in own.items():
        layer = name.removesuffix(".weight")
        expected = tensor.double()
        if f"{layer}.lora_A.default.weight" in state:
            num_adapted += 1
            a, b = (state[f"{layer}.lora_{factor}.default.weight"].double() for factor in "AB")
            for i in range(len(expected)):
                expected[i] += 3.0 * sum(b[i, j] * a[j] for j in range(8))
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert num_adapted == 14


def test_the_merged_model_computes_what_the_adapted_one_does(policy):
    model = adapted(1)
    policy.load_state_dict(dict(merged_weights(model.state_dict().items(), SETTINGS.scale)))
    input_ids = torch.arange(20)[None]
    torch.testing.assert_close(policy(input_ids).logits, model(input_ids).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_merging_reads_each_tensor_before_the_next_is_asked_for():
    """As weights that are gathered one at a time: the tensor before has lost its values by then."""

    def gathered(state):
        for name, tensor in state.items():
            given = tensor.clone()
            yield name, given
            given.fill_(torch.nan)

    state = adapted(1).state_dict()
    expected = dict(merged_weights(state.items(), SETTINGS.scale))
    for name, tensor in merged_weights(gathered(state), SETTINGS.scale):
        assert torch.equal(tensor, expected[name])


def test_merged_shapes_are_those_of_the_model_without_adapters():
    shapes = {name: tensor.shape for name, tensor in adapted(1).state_dict().items()}
    check_weights(merged_shapes(shapes), model_weight_shapes(MODEL))


def test_a_bias_keeps_its_name_and_its_values():
    state = {
        "layer.base_layer.weight": torch.ones(3, 2),
        "layer.base_layer.bias": torch.arange(3.0),
        "layer.lora_A.default.weight": torch.ones(1, 2),
        "layer.lora_B.default.weight": torch.ones(3, 1),
    }
    merged = dict(merged_weights(state.items(), 0.5))
    assert merged.keys() == merged_shapes({name: t.shape for name, t in state.items()}).keys()
    assert torch.equal(merged["layer.bias"], torch.arange(3.0))
    assert torch.equal(merged["layer.weight"], torch.full((3, 2), 1.5))


def test_a_weight_in_bfloat16_is_rounded_once_after_the_sum_in_float32():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 30, generator=generator).bfloat16()
    a, b = torch.randn(4, 30, generator=generator), torch.randn(20, 4, generator=generator)
    state = {"l.base_layer.weight": weight, "l.lora_A.default.weight": a, "l.lora_B.default.weight": b}
    (merged,) = dict(merged_weights(state.items(), 2.0)).values()
    expected = (weight.double() + 2.0 * b.double() @ a.double()).bfloat16()
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, expected)


def test_the_folder_is_one_that_peft_loads(policy, tmp_path):
    from peft import PeftModel

    model = adapted(1)
    for seed in (2, 1):  # the second replaces the first
        write_adapter(tmp_path, SETTINGS.adapter_config(MODEL), adapter_weights(adapted(seed).state_dict().items()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    loaded = PeftModel.from_pretrained(policy, tmp_path)
    input_ids = torch.arange(20)[None]
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(trained) == 28
    assert all(map(is_adapter_weight, trained))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.norm.weight"], r"'model\.norm\.weight' is no tensor of a LoRA adapter"),
        (["base_model.model.layer.lora_A.weight"], "the adapter of 'layer' lacks one of its two factors"),
    ],
)
def test_what_is_no_complete_adapter_is_named(names, message):
    with pytest.raises(ValueError, match=message):
        list(paired_factors((name, torch.zeros(1, 1)) for name in names))


# ---------------------------------------------------------------- engines


@pytest.fixture(scope="module")
def vllm_with_adapters():
    engine = start(VLLMEngine(process="own", dtype="float32", enforce_eager=True))
    yield engine
    engine.close()


@pytest.fixture(params=["transformers", "vllm"])
def adapter_engine(request):
    if request.param == "vllm":
        return request.getfixturevalue("vllm_with_adapters")
    return start(TransformersEngine())


def test_a_loaded_adapter_takes_the_place_of_the_one_before(adapter_engine):
    first, second = adapted(1), adapted(2)
    assert adapter_engine.supports_adapters
    for model, other in ((first, second), (second, first), (first, second)):
        load_adapter(adapter_engine, model)  # the prompts of the one before are in the prefix cache
        assert worst_difference(adapter_engine, model) < TOLERANCE
        assert worst_difference(adapter_engine, other) > 0.5


def test_merged_weights_are_taken_by_any_engine(engine, policy):
    model = adapted(1)
    assert worst_difference(engine, model) > 0.3
    engine.load_weights(merged_weights(model.state_dict().items(), SETTINGS.scale))
    assert worst_difference(engine, model) < TOLERANCE


def test_transformers_merges_into_the_weights_it_was_given_last(perturbed):
    engine, model = start(TransformersEngine()), adapted(1)
    load_adapter(engine, model)
    engine.load_weights(perturbed.state_dict().items())
    load_adapter(engine, model)
    both = adapted(1)
    own = perturbed.state_dict()
    both.load_state_dict(
        {name.replace(".weight", ".base_layer.weight"): own[name] for name in own if "proj" in name}
        | {name: own[name] for name in own if "proj" not in name},
        strict=False,
    )
    assert worst_difference(engine, both) < TOLERANCE


def test_transformers_takes_a_layer_back_that_lost_its_adapter(policy):
    engine = start(TransformersEngine())
    load_adapter(engine, adapted(1))
    less = LoRA(r=8, lora_alpha=24.0, target_modules=["q_proj"])
    model = adapted(2, less)
    load_adapter(engine, model, less)
    assert worst_difference(engine, model) < TOLERANCE


def test_transformers_in_fp8_rounds_the_sum():
    engine, model = start(TransformersEngine("fp8")), adapted(1)
    load_adapter(engine, model)
    merged = dict(merged_weights(model.state_dict().items(), SETTINGS.scale))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(engine._model.state_dict()[name], round_to_fp8(merged[name]))


def test_an_adapter_of_another_model_is_refused():
    engine = start(TransformersEngine())
    weights = {f"base_model.model.other.lora_{factor}.weight": torch.zeros(8, 8) for factor in "AB"}
    with pytest.raises(ValueError, match=r"the adapters do not fit .* no linear layer has the weight other\.weight"):
        engine.load_adapter(SETTINGS.adapter_config(MODEL), weights.items())


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_vllm_is_started_with_room_for_the_rank(rank, room):
    assert adapter_kwargs(rank) == {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def test_vllm_without_adapters_is_started_as_ever():
    assert adapter_kwargs(None) == {}


def test_a_rank_that_vllm_has_no_room_for_is_an_error_with_a_way_out():
    with pytest.raises(SettingError, match=r"`model\.peft\.r` 513 .* set `model\.peft\.sync: merged`"):
        adapter_kwargs(513)
