"""Rewards: text to float."""

from drpo_lightning.rewards.answers import exact_match, numeric_answer
from drpo_lightning.rewards.base import Reward, RewardBatch, combine_rewards, score_rewards

__all__ = ["Reward", "RewardBatch", "combine_rewards", "exact_match", "numeric_answer", "score_rewards"]
