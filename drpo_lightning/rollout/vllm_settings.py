"""What vLLM is started with: arguments and environment variables that follow from the trainer's settings."""

import importlib.util
import os
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from drpo_lightning.errors import SettingError

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""


def adapter_kwargs(rank: int | None) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for adapters of a rank; none without adapters, which cost speed.

    Raises:
        SettingError: if vLLM has no room for adapters of that rank.
    """
    if rank is None:
        return {}
    if rank > ADAPTER_RANKS[-1]:
        raise SettingError(
            f"`model.peft.r` {rank} is more than the {ADAPTER_RANKS[-1]} that vLLM takes in an adapter; set "
            "`model.peft.sync: merged`"
        )
    room = next(allowed for allowed in ADAPTER_RANKS if allowed >= rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def warn_of_expandable_segments() -> None:
    """Warns of a setting of PyTorch's allocator with which vLLM's sleep frees nothing, or that vLLM refuses."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").replace(" ", "").lower():
            rank_zero_warn(
                f"`{name}` has expandable_segments:True, with which vLLM's sleep mode does not free its memory; leave "
                "it out, or set `sleep: never`"
            )


def environment_of_engine(device: torch.device, *, own_process: bool, is_eager: bool) -> dict[str, str]:
    """Environment variables that vLLM reads when it is imported.

    Args:
        device: the trainer's.
        own_process: whether the engine has a process of its own.
        is_eager: whether it computes without compiling.
    """
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # At every sync vLLM warns that a rotary embedding has no weights, which is so.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if device.type == "cpu":
        if is_eager:
            # vLLM compiles the ranking of logprobs at the first request all the same: it would need a C++ compiler.
            environment["TORCHDYNAMO_DISABLE"] = "1"
        environment["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    # vLLM sets it for the whole process, the trainer's too.
    name = "VLLM_FLOAT32_MATMUL_PRECISION"
    environment[name] = os.environ.get(name, torch.get_float32_matmul_precision())
    if importlib.util.find_spec("flashinfer") is None:
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if own_process:
        if device.type == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
            environment["CUDA_VISIBLE_DEVICES"] = devices[device.index or 0]
        # The engine is alone in its world, whatever the trainer's ranks are called.
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return environment
