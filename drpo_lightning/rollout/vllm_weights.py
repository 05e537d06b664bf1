"""Weights into the model of a vLLM engine in this process."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def load_weights(llm: Any, weights: Iterable[tuple[str, Tensor]], *, in_place: bool) -> None:  # noqa: ANN401
    """Replaces all weights of vLLM's model.

    Args:
        llm: `vllm.LLM` whose worker is in this process.
        weights: name and tensor of the whole state dict.
        in_place: copies them to where the kernels read them, where `loads_in_place`: 16 ms for 1.7 B parameters on one
            H100 (vLLM 0.26). Else vLLM lays its model out anew, 0.28 s there, and does with the weights what it does
            once they are loaded.
    """
    if in_place:
        _model(llm).load_weights(weights)
    else:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})


def loads_in_place(llm: Any) -> bool:  # noqa: ANN401
    """True if vLLM computes with the weights as they are loaded, on a GPU and without adapters.

    Args:
        llm: `vllm.LLM` whose worker is in this process.
    """
    from vllm.platforms import current_platform

    has_adapters = llm.llm_engine.vllm_config.lora_config is not None
    return bool(current_platform.is_cuda() and not has_adapters and computes_with_loaded_weights(_model(llm)))


def computes_with_loaded_weights(model: nn.Module) -> bool:
    """True if a GPU computes with the weights of each layer as they are loaded, neither quantised nor rearranged."""
    return all(_keeps_weights(module) for module in model.modules())


def _keeps_weights(module: nn.Module) -> bool:
    """False if vLLM may make something else of this module's own weights once they are loaded."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.v1.attention.backend import AttentionImpl

    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase) and type(method) not in (
        UnquantizedLinearMethod,
        UnquantizedEmbeddingMethod,
    ):
        return False
    if not hasattr(module, "process_weights_after_loading"):
        return True
    hook = getattr(type(getattr(module, "impl", None)), "process_weights_after_loading", None)
    return hook is AttentionImpl.process_weights_after_loading


def _model(llm: Any) -> Any:  # noqa: ANN401
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
