"""A logger that remembers, and a rollout made by hand."""

from collections import defaultdict

import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from drpo_lightning.batch import Completion, Rollout


class MemoryLogger(Logger):
    """Keeps scalars by name, as (step, value)."""

    name = "memory"
    version = 0

    def __init__(self):
        super().__init__()
        self.scalars = defaultdict(list)

    def log_metrics(self, metrics, step=None):
        for key, value in metrics.items():
            self.scalars[key].append((step, value))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def steps(self, name):
        return [step for step, _ in self.scalars[name]]

    def values(self, name):
        return [value for _, value in self.scalars[name]]


@pytest.fixture
def make_memory():
    return MemoryLogger


@pytest.fixture
def make_rollout():
    """Two prompts of two samples each; the arguments replace parts of it."""

    def make(**changes):
        parts = {
            "prompts": ["a", "a", "b", "b"],
            "prompt_ids": [[1]] * 4,
            "completions": [
                Completion([3] * length, [-1.0] * length, reason)
                for length, reason in ((1, "stop"), (2, "length"), (3, "stop"), (6, "stop"))
            ],
            "texts": ["w", "x", "y", "z"],
            "columns": {},
            "group_size": 2,
            "rewards": torch.tensor([1.0, 0.0, 0.5, 0.5]),
            "reward_parts": {"first": torch.tensor([1.0, 0.0, 0.5, 0.5])},
        }
        return Rollout(**(parts | changes))

    return make
