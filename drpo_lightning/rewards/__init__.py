"""Rewards: text to float."""

from drpo_lightning.rewards.answers import exact_match, numeric_answer
from drpo_lightning.rewards.base import FailurePolicy, Reward, RewardBatch, RewardError, RewardFailure, RewardSample
from drpo_lightning.rewards.scoring import RewardScores, combine_rewards, score_rewards

__all__ = [
    "FailurePolicy",
    "Reward",
    "RewardBatch",
    "RewardError",
    "RewardFailure",
    "RewardSample",
    "RewardScores",
    "combine_rewards",
    "exact_match",
    "numeric_answer",
    "score_rewards",
]
