"""LightningModules and the network they train."""

from drpo_lightning.modules.policy import PolicyModule
from drpo_lightning.modules.policy_network import PolicyNetwork

__all__ = ["PolicyModule", "PolicyNetwork"]
