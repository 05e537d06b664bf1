"""Base of rewards that may fail on single completions: failures are counted, stored, and treated by a policy."""

import json
import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from drpo_lightning.batch import ValidationBatch
from drpo_lightning.callbacks.rewards import RewardCallback
from drpo_lightning.logs import log_metrics
from drpo_lightning.rewards import FailurePolicy, RewardBatch, RewardFailure
from drpo_lightning.rewards.base import RewardOutcome
from drpo_lightning.rewards.scoring import describe_failures

OnFailure = Literal["raise", "drop_sample", "score"]
LOG = logging.getLogger(__name__)


def score_of_failures(on_failure: OnFailure, failure_score: float | None) -> float | None:
    """`failure_score`, 0 by default: of rewards whose failures are the completion's doing."""
    return 0.0 if on_failure == "score" and failure_score is None else failure_score


class FallibleReward(RewardCallback):
    """A reward that says of single completions that it failed on them.

    `RolloutStatistics` logs `reward/<name>/error_fraction` and `reward/<name>/timeout_fraction`, of all completions of
    a rollout; this callback logs the same of a validation as `val/reward/<name>/...`. The completions, with the reason
    and what the reward wrote last, are appended to `reward_failures.jsonl` in the run's log folder
    (`reward_failures.rank<n>.jsonl` on several ranks), also before a failure ends the run.

    Args:
        weight: factor of this reward in the sum.
        name: what it is logged as.
        on_failure: `raise` ends the run; `drop_sample` leaves the completion out of its group and of the training;
            `score` gives it `failure_score`.
        failure_score: the score of a failure, with `on_failure: score`.
        max_stored_failures: of a rollout, most failures that are stored.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        weight: float = 1.0,
        name: str | None = None,
        on_failure: OnFailure = "raise",
        failure_score: float | None = None,
        max_stored_failures: int = 100,
    ) -> None:
        super().__init__(weight, name)
        if max_stored_failures < 0:
            raise ValueError(f"`max_stored_failures` must be 0 or positive, got {max_stored_failures}")
        self.failure_policy = FailurePolicy(on_failure, failure_score)
        self.max_stored_failures = max_stored_failures
        self._path: Path | None = None
        self._trainer: Trainer | None = None
        self._validated = Counter[str]()

    @abstractmethod
    def outcomes(self, batch: RewardBatch) -> Sequence[RewardOutcome]:
        """A score, None or a failure for every completion."""

    def score(self, batch: RewardBatch) -> Sequence[RewardOutcome]:
        """Scores, and stores what failed."""
        outcomes = self.outcomes(batch)
        failures = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, RewardFailure)}
        if failures:
            where = self._store(failures, batch)
            LOG.warning(
                "reward %r failed on %d of %d completions%s: %s",
                self.name,
                len(failures),
                len(batch),
                where,
                describe_failures(failures.values()),
            )
        return outcomes

    def _store(self, failures: dict[int, RewardFailure], batch: RewardBatch) -> str:
        """Appends failures to the file; says where they are."""
        if self._path is None or self._trainer is None or self._trainer.fast_dev_run or not self.max_stored_failures:  # type: ignore[attr-defined]
            return ""
        run = {
            "reward": self.name,
            "stage": "validation" if self._trainer.validating or self._trainer.sanity_checking else "training",
            "step": self._trainer.global_step,
            "rank": self._trainer.global_rank,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            for i in list(failures)[: self.max_stored_failures]:
                row = run | vars(failures[i]) | vars(batch.sample(i))
                file.write(json.dumps(row, default=repr) + "\n")
        return f" (see {self._path})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Asks for the log folder. Collective."""
        part = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        self._path = Path(trainer.log_dir or trainer.default_root_dir) / f"reward_failures{part}.jsonl"
        self._trainer = trainer

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Begins to count."""
        self._validated.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002 - Lightning's signature
        batch: ValidationBatch,
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Counts the failures of the validation."""
        rollout = batch.rollout
        self._validated["completions"] += len(rollout)
        self._validated["error"] += int(rollout.reward_errors[self.name].sum())
        self._validated["timeout"] += int(rollout.reward_timeouts[self.name].sum())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the failures of the validation, over all ranks."""
        counts = torch.tensor(
            [float(self._validated[key]) for key in ("completions", "error", "timeout")],
            dtype=torch.float64,
            device=pl_module.device,
        )
        completions, errors, timeouts = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if not completions:
            return
        metrics = {
            f"val/reward/{self.name}/error_fraction": errors / completions,
            f"val/reward/{self.name}/timeout_fraction": timeouts / completions,
        }
        log_metrics(trainer, pl_module, metrics)
