"""Sharding on one rank of each strategy; several ranks are tests/distributed's."""

import copy
import math

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from drpo_lightning.modules.language_model import empty_language_model, layers, load_language_model
from drpo_lightning.modules.policy_network import PolicyNetwork
from drpo_lightning.modules.sharding import clean_name, clip_gradient, is_sharded
from tests.distributed.strategies import CPUFSDPStrategy

FSDP2 = {"data_parallel_size": 1, "tensor_parallel_size": 1}


def strategies():
    return {"fsdp1": CPUFSDPStrategy(state_dict_type="sharded"), "fsdp2": ModelParallelStrategy(**FSDP2)}


@pytest.fixture(params=["single", "fsdp1", "fsdp2"])
def run(make_run, request):
    strategy = strategies().get(request.param, "auto")
    yield make_run(trainer={"strategy": strategy, "max_epochs": 2, "gradient_clip_val": 0.1})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def state(model_folder):
    return load_language_model(model_folder).state_dict()


@pytest.mark.filterwarnings("default:FSDP is switching to use `NO_SHARD`")
def test_a_network_holds_the_models_weights_whatever_the_strategy(run, model_folder):
    run.trainer.fit_loop.max_epochs = 0
    expected = state(model_folder)
    seen = {}

    def keep():
        seen.update({name: tensor.clone() for name, tensor in run.module.named_weights()})

    run.module.on_fit_start = keep
    run.fit()
    assert seen.keys() == expected.keys() == run.module.weight_shapes().keys()
    for name, tensor in expected.items():
        assert torch.equal(seen[name], tensor), name
        assert run.module.weight_shapes()[name] == tensor.shape


@pytest.mark.filterwarnings("default:FSDP is switching to use `NO_SHARD`")
def test_training_does_not_depend_on_the_strategy(run, make_run):
    run.fit()
    single = make_run(trainer={"max_epochs": 2, "gradient_clip_val": 0.1})
    single.fit()
    expected = dict(single.module.named_weights())
    for name, tensor in run.module.named_weights():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7, msg=name)
    assert run.module._grad_norm == pytest.approx(single.module._grad_norm, rel=1e-5)


def test_the_empty_model_has_real_buffers_and_tied_parameters_without_memory(model_folder):
    empty, loaded = empty_language_model(model_folder), load_language_model(model_folder)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    buffers = dict(loaded.named_buffers())
    assert buffers
    for name, buffer in empty.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert len(layers(empty)) == loaded.config.num_hidden_layers


def test_a_model_that_does_not_say_what_its_layers_are_is_refused(model_folder):
    model = load_language_model(model_folder)
    model._no_split_modules = None
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not say what its layers are.*take `ddp`"):
        layers(model)


def test_clipping_scales_the_gradient_to_the_norm_and_returns_what_it_was(model_folder):
    network = PolicyNetwork(load_language_model(model_folder))
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    whole = math.sqrt(sum(float(p.grad.double().square().sum()) for p in network.parameters()))
    before = [parameter.grad.clone() for parameter in network.parameters()]
    assert clip_gradient(network) == pytest.approx(whole, rel=1e-5)
    assert all(torch.equal(p.grad, old) for p, old in zip(network.parameters(), before, strict=True))
    assert clip_gradient(network, 0.5) == pytest.approx(whole, rel=1e-5)
    for parameter, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, old * 0.5 / whole, rtol=1e-4, atol=1e-9)


def test_buffers_keep_their_precision(model_folder):
    network = PolicyNetwork(load_language_model(model_folder))
    before = copy.deepcopy(dict(network.named_buffers()))
    network.to(torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_names_are_those_of_the_language_model():
    wrapped = "_fsdp_wrapped_module.language_model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.weight"
    assert clean_name(wrapped) == clean_name("." + wrapped) == "model.layers.0.self_attn.q_proj.weight"


def test_what_is_sharded():
    assert all(is_sharded(strategy) for strategy in strategies().values())
