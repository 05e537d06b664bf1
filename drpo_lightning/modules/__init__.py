"""LightningModules and the network they train."""

from drpo_lightning.modules.lora import LoRA
from drpo_lightning.modules.policy import PolicyModule
from drpo_lightning.modules.policy_network import PolicyNetwork
from drpo_lightning.modules.reference import ReferencePenalty

__all__ = ["LoRA", "PolicyModule", "PolicyNetwork", "ReferencePenalty"]
