"""Weights into the model of a vLLM engine in this process."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

WeightLoader = Callable[[Iterable[tuple[str, Tensor]]], None]


def weight_loader(llm: Any) -> WeightLoader:  # noqa: ANN401
    """The fastest way to load a complete state dict that is right for vLLM's model.

    Its own `load_weights` copies each tensor to where the kernels read it: 16 ms for 1.7 B parameters on one H100
    (vLLM 0.26), where `reload_weights` takes 0.28 s. The latter is for all else: it lays the model out anew, and does
    with the weights what vLLM does once they are loaded.

    Args:
        llm: `vllm.LLM` whose worker is in this process.
    """
    from vllm.platforms import current_platform

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    has_adapters = llm.llm_engine.vllm_config.lora_config is not None
    if current_platform.is_cuda() and not has_adapters and computes_with_loaded_weights(model):
        return model.load_weights  # type: ignore[no-any-return]

    def reload(weights: Iterable[tuple[str, Tensor]]) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})

    return reload


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
