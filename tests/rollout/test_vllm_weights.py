"""Weights straight into vLLM's model, as on a GPU: here in vLLM's fallback without packed weights, on a CPU."""

from unittest.mock import patch

import pytest

from drpo_lightning.rollout import VLLMEngine
from drpo_lightning.rollout.in_process_vllm import InProcessVLLM
from drpo_lightning.rollout.vllm_weights import computes_with_loaded_weights, loads_in_place
from tests.rollout.conftest import start
from tests.rollout.test_engines import TOLERANCE
from tests.rollout.test_weight_sync import worst_difference


class AsOnAGPU(InProcessVLLM):
    """vLLM whose linear layers compute with their weights as they are loaded."""

    def __init__(self, llm_kwargs, heartbeat):
        from vllm import _custom_ops
        from vllm.platforms import current_platform

        _custom_ops._supports_onednn = False
        super().__init__(llm_kwargs, heartbeat)
        with patch.object(type(current_platform), "is_cuda", lambda _: True):
            self._loads_in_place = loads_in_place(self._llm)

    def loads_directly(self):
        return self._loads_in_place

    @property
    def _model(self):
        return self._llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()

    def loads_directly_with(self, change):
        """Whether it would if a layer were another."""
        from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
        from vllm.v1.attention.backend import AttentionImpl

        class Rearranging(AttentionImpl):
            __init__ = forward = process_weights_after_loading = object.__init__

        layer = self._model.model.layers[0]
        module, name, value = {
            "fp8": (layer.mlp.down_proj, "quant_method", object.__new__(Fp8LinearMethod)),
            "attention": (layer.self_attn.attn, "impl", Rearranging()),
            "hook": (self._model, "process_weights_after_loading", None),
        }[change]
        before = vars(module).get(name)
        object.__setattr__(module, name, value)
        try:
            return computes_with_loaded_weights(self._model)
        finally:
            object.__setattr__(module, name, before) if before is not None else object.__delattr__(module, name)


@pytest.fixture(scope="module")
def engine():
    with patch("drpo_lightning.rollout.vllm.InProcessVLLM", AsOnAGPU):
        engine = start(VLLMEngine(process="own", dtype="float32", enforce_eager=True))
    yield engine
    engine.close()


def test_weights_are_loaded_where_they_are_computed_with(engine, policy, perturbed):
    assert engine._call("loads_directly", 60)
    for model in (perturbed, policy, perturbed):
        engine.load_weights(model.state_dict().items())
        assert worst_difference(engine, model) < TOLERANCE


def test_weights_of_another_precision_are_converted(engine, policy):
    half = {name: tensor.bfloat16() for name, tensor in policy.state_dict().items()}
    engine.load_weights(half.items())
    policy.load_state_dict(half)
    assert worst_difference(engine, policy) < TOLERANCE


@pytest.mark.parametrize("change", ["fp8", "attention", "hook"])
def test_a_model_that_vllm_makes_something_else_of_is_loaded_by_vllm(engine, change):
    assert not engine._call("loads_directly_with", 60, change)


def test_packed_weights_are_loaded_by_vllm(vllm_engine, policy, perturbed):
    for model in (perturbed, policy):
        vllm_engine.load_weights(model.state_dict().items())
        assert worst_difference(vllm_engine, model) < TOLERANCE
