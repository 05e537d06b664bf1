"""Policy objectives: one per file, a pure function of tensors and the frozen class of its settings."""

from drpo_lightning.objectives.base import Objective, ObjectiveOutput, TokenTerms
from drpo_lightning.objectives.cispo import CISPO, cispo
from drpo_lightning.objectives.clipped_ratio import ClippedRatio, clipped_ratio
from drpo_lightning.objectives.decoupled import Decoupled
from drpo_lightning.objectives.divergence_penalty import DivergencePenalty, divergence_penalty
from drpo_lightning.objectives.dppo import DPPO, dppo
from drpo_lightning.objectives.drpo import DRPO, drpo
from drpo_lightning.objectives.gspo import GSPO, gspo
from drpo_lightning.objectives.mask_drpo import MaskDRPO, mask_drpo
from drpo_lightning.objectives.sapo import SAPO, sapo
from drpo_lightning.objectives.spo import SPO, spo
from drpo_lightning.objectives.topk_dppo import TopKDPPO, topk_dppo
from drpo_lightning.objectives.unregularized import Unregularized, unregularized

__all__ = [
    "CISPO",
    "DPPO",
    "DRPO",
    "GSPO",
    "SAPO",
    "SPO",
    "ClippedRatio",
    "Decoupled",
    "DivergencePenalty",
    "MaskDRPO",
    "Objective",
    "ObjectiveOutput",
    "TokenTerms",
    "TopKDPPO",
    "Unregularized",
    "cispo",
    "clipped_ratio",
    "divergence_penalty",
    "dppo",
    "drpo",
    "gspo",
    "mask_drpo",
    "sapo",
    "spo",
    "topk_dppo",
    "unregularized",
]
