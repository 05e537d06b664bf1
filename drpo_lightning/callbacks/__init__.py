"""Callbacks: rewards, the trust region's statistics, the sync probe, what is shown and what is exported."""

from drpo_lightning.callbacks.completion_logger import CompletionLogger
from drpo_lightning.callbacks.dashboard import Dashboard
from drpo_lightning.callbacks.divergence import Divergence
from drpo_lightning.callbacks.export_policy import ExportPolicy
from drpo_lightning.callbacks.mask_statistics import MaskStatistics
from drpo_lightning.callbacks.policy_checkpoint import PolicyCheckpoint
from drpo_lightning.callbacks.policy_shift import PolicyShift
from drpo_lightning.callbacks.progress import RolloutProgress
from drpo_lightning.callbacks.rewards import ExactMatchReward, FunctionReward, NumericAnswerReward, RewardCallback
from drpo_lightning.callbacks.rollout_statistics import RolloutStatistics
from drpo_lightning.callbacks.run_summary import RunSummary
from drpo_lightning.callbacks.sync_probe import SyncProbe

__all__ = [
    "CompletionLogger",
    "Dashboard",
    "Divergence",
    "ExactMatchReward",
    "ExportPolicy",
    "FunctionReward",
    "MaskStatistics",
    "NumericAnswerReward",
    "PolicyCheckpoint",
    "PolicyShift",
    "RewardCallback",
    "RolloutProgress",
    "RolloutStatistics",
    "RunSummary",
    "SyncProbe",
]
