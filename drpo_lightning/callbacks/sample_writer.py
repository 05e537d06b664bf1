"""Samples with all that is known of them, as JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.batch import Rollout, ValidationBatch
from drpo_lightning.logs import updates_completed
from drpo_lightning.ranks import of_all_ranks
from drpo_lightning.rewards.scoring import json_score
from drpo_lightning.rollout.hooks import RolloutHooks


class SampleWriter(Callback, RolloutHooks):
    """Writes samples to `samples/` in the log folder: of every validation, and of rollouts if asked for.

    `validation-000040.jsonl` holds the validation after 40 updates, in the order of the data set,
    `rollout-000010.jsonl` the tenth rollout, in the order in which its prompts were taken, however many ranks there
    are; one line per sample, those of a prompt next to each other. `drpo score --data` reads them. Nothing is written
    under `fast_dev_run`.

    Args:
        every_n_rollouts: writes every n-th rollout, the first included; 0 for none.
        validation: whether validations are written.
    """

    def __init__(self, every_n_rollouts: int = 0, validation: bool = True) -> None:
        if every_n_rollouts < 0:
            raise ValueError(f"`every_n_rollouts` must be 0 or positive, got {every_n_rollouts}")
        self.every_n_rollouts = every_n_rollouts
        self.validation = validation

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:  # noqa: ARG002
        """Writes the rollout. Collective."""
        number = trainer.datamodule.iteration  # type: ignore[attr-defined]
        if self.every_n_rollouts and (number - 1) % self.every_n_rollouts == 0:
            self._write(trainer, _of_all_ranks(trainer, rollout), f"rollout-{number:06d}.jsonl")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401, ARG002 - Lightning's signature
        batch: ValidationBatch,
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Writes the validation. Collective."""
        if self.validation:
            rows = sorted(_of_all_ranks(trainer, batch.rollout), key=lambda row: row["prompt_number"])
            self._write(trainer, rows, f"validation-{updates_completed(trainer, pl_module):06d}.jsonl")

    def _write(self, trainer: Trainer, rows: list[dict[str, Any]], name: str) -> None:
        """Writes the samples of all ranks in one file, on rank 0."""
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"  # collective
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False, default=repr) + "\n" for row in rows)
            (folder / name).write_text("".join(lines), encoding="utf-8")


def _of_all_ranks(trainer: Trainer, rollout: Rollout) -> list[dict[str, Any]]:
    """The samples of all ranks, one rank's after the other's: the order of a rollout's prompts. Collective."""
    parts = of_all_ranks(list(sample_rows(rollout)), trainer.world_size)
    return [row for part in parts for row in part]


def sample_rows(rollout: Rollout) -> Iterator[dict[str, Any]]:
    """Each sample of a rollout as one object of JSON.

    Yields:
        `prompt_number` (row of the data set), `prompt`, `completion`, `finish_reason`, `completion_ids`, `logprob` (sum
        of log mu in nats), `reward` (None for a dropped sample), `rewards` by name (None where one does not apply),
        `answer` (if a reward says what it is), and `columns` of the data set.
    """
    for i, completion in enumerate(rollout.completions):
        parts = {name: json_score(values[i]) for name, values in rollout.reward_parts.items()}
        yield {
            "prompt_number": rollout.prompt_numbers[i],
            "prompt": rollout.prompts[i],
            "completion": rollout.texts[i],
            "finish_reason": completion.finish_reason,
            "completion_ids": list(completion.token_ids),
            "logprob": sum(completion.logprobs),
            "reward": json_score(rollout.rewards[i]),
            "rewards": parts,
            **({} if rollout.answers is None else {"answer": rollout.answers[i]}),
            "columns": {name: values[i] for name, values in rollout.columns.items()},
        }
