"""Prompts, and the DataModule that turns them into rollouts."""

from drpo_lightning.datamodules.arithmetic import ArithmeticPrompts
from drpo_lightning.datamodules.curriculum import PassRateCurriculum
from drpo_lightning.datamodules.file_prompts import FilePrompts
from drpo_lightning.datamodules.hub_prompts import HubPrompts
from drpo_lightning.datamodules.mixed_prompts import MixedPrompts
from drpo_lightning.datamodules.prompts import PromptSource
from drpo_lightning.datamodules.reasoning_gym_prompts import ReasoningGymPrompts
from drpo_lightning.datamodules.rollout import RolloutDataModule
from drpo_lightning.datamodules.split_prompts import SplitPrompts

__all__ = [
    "ArithmeticPrompts",
    "FilePrompts",
    "HubPrompts",
    "MixedPrompts",
    "PassRateCurriculum",
    "PromptSource",
    "ReasoningGymPrompts",
    "RolloutDataModule",
    "SplitPrompts",
]
