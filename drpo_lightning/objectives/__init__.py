"""Policy objectives: one per file, a pure function of tensors and the frozen class of its settings."""

from drpo_lightning.objectives.base import Objective, ObjectiveOutput, TokenTerms
from drpo_lightning.objectives.clipped_ratio import ClippedRatio, clipped_ratio
from drpo_lightning.objectives.dppo import DPPO, dppo
from drpo_lightning.objectives.drpo import DRPO, drpo
from drpo_lightning.objectives.unregularized import Unregularized, unregularized

__all__ = [
    "DPPO",
    "DRPO",
    "ClippedRatio",
    "Objective",
    "ObjectiveOutput",
    "TokenTerms",
    "Unregularized",
    "clipped_ratio",
    "dppo",
    "drpo",
    "unregularized",
]
