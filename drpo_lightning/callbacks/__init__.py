"""Callbacks: rewards, the trust region's statistics, the sync probe, what is shown and what is exported."""

from drpo_lightning.callbacks.adaptive_delta import AdaptiveDelta
from drpo_lightning.callbacks.async_reward import AsyncReward
from drpo_lightning.callbacks.code_reward import CodeReward
from drpo_lightning.callbacks.completion_logger import CompletionLogger
from drpo_lightning.callbacks.dashboard import Dashboard
from drpo_lightning.callbacks.divergence import Divergence
from drpo_lightning.callbacks.divergence_proxy import DivergenceProxy
from drpo_lightning.callbacks.export_policy import ExportPolicy
from drpo_lightning.callbacks.fallible_reward import FallibleReward
from drpo_lightning.callbacks.format_reward import FormatReward
from drpo_lightning.callbacks.guardrail import Guardrail, Rule
from drpo_lightning.callbacks.http_judge_reward import HTTPJudgeReward
from drpo_lightning.callbacks.hyperparameters import HyperparameterLogger
from drpo_lightning.callbacks.isolated_reward import IsolatedReward
from drpo_lightning.callbacks.mask_statistics import MaskStatistics
from drpo_lightning.callbacks.math_verify_reward import MathVerifyReward
from drpo_lightning.callbacks.mismatch_and_drift import MismatchAndDrift
from drpo_lightning.callbacks.overlong_reward import OverlongReward
from drpo_lightning.callbacks.policy_checkpoint import PolicyCheckpoint
from drpo_lightning.callbacks.policy_entropy import PolicyEntropy
from drpo_lightning.callbacks.policy_shift import PolicyShift
from drpo_lightning.callbacks.progress import RolloutProgress
from drpo_lightning.callbacks.prompt_statistics import PromptStatistics
from drpo_lightning.callbacks.reasoning_gym_reward import ReasoningGymReward
from drpo_lightning.callbacks.reference_divergence import ReferenceDivergence
from drpo_lightning.callbacks.reward_model_reward import RewardModelReward
from drpo_lightning.callbacks.rewards import ExactMatchReward, FunctionReward, NumericAnswerReward, RewardCallback
from drpo_lightning.callbacks.rollout_statistics import RolloutStatistics
from drpo_lightning.callbacks.run_summary import RunSummary
from drpo_lightning.callbacks.sample_writer import SampleWriter
from drpo_lightning.callbacks.shift_map import ShiftMap
from drpo_lightning.callbacks.sync_probe import SyncProbe
from drpo_lightning.callbacks.token_export import TokenExport
from drpo_lightning.callbacks.token_table import TokenTable
from drpo_lightning.callbacks.validation_table import ValidationTable

__all__ = [
    "AdaptiveDelta",
    "AsyncReward",
    "CodeReward",
    "CompletionLogger",
    "Dashboard",
    "Divergence",
    "DivergenceProxy",
    "ExactMatchReward",
    "ExportPolicy",
    "FallibleReward",
    "FormatReward",
    "FunctionReward",
    "Guardrail",
    "HTTPJudgeReward",
    "HyperparameterLogger",
    "IsolatedReward",
    "MaskStatistics",
    "MathVerifyReward",
    "MismatchAndDrift",
    "NumericAnswerReward",
    "OverlongReward",
    "PolicyCheckpoint",
    "PolicyEntropy",
    "PolicyShift",
    "PromptStatistics",
    "ReasoningGymReward",
    "ReferenceDivergence",
    "RewardCallback",
    "RewardModelReward",
    "RolloutProgress",
    "RolloutStatistics",
    "Rule",
    "RunSummary",
    "SampleWriter",
    "ShiftMap",
    "SyncProbe",
    "TokenExport",
    "TokenTable",
    "ValidationTable",
]
