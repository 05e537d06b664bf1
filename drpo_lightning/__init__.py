"""Reinforcement learning of language models with Divergence Regularized Policy Optimization, on Lightning."""

__version__ = "0.1.0"
