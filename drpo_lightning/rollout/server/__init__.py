"""Rollouts by vLLM servers, on this machine or others."""

from drpo_lightning.rollout.server.engine import VLLMServerEngine

__all__ = ["VLLMServerEngine"]
