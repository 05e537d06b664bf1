"""Rollout engines: what samples completions, and how the trainer's weights get there."""

from drpo_lightning.rollout.engine import EngineError, RolloutEngine
from drpo_lightning.rollout.hooks import RolloutHooks
from drpo_lightning.rollout.node import NodeEngine
from drpo_lightning.rollout.server import VLLMServerEngine
from drpo_lightning.rollout.transformers import TransformersEngine
from drpo_lightning.rollout.vllm import VLLMEngine
from drpo_lightning.rollout.weights import WeightSource, check_weights

__all__ = [
    "EngineError",
    "NodeEngine",
    "RolloutEngine",
    "RolloutHooks",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "WeightSource",
    "check_weights",
]
