"""Prompts, and the DataModule that turns them into rollouts."""

from drpo_lightning.datamodules.arithmetic import ArithmeticPrompts
from drpo_lightning.datamodules.prompts import FilePrompts, HubPrompts, PromptSource
from drpo_lightning.datamodules.rollout import RolloutDataModule

__all__ = ["ArithmeticPrompts", "FilePrompts", "HubPrompts", "PromptSource", "RolloutDataModule"]
