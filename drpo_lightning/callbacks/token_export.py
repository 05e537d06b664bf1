"""Every sampled token of a run as a row of a table."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from drpo_lightning.batch import Rollout, RolloutBatch
from drpo_lightning.disk import whole_file
from drpo_lightning.modules.policy import StepOutput

if TYPE_CHECKING:
    import pyarrow

COLUMNS = {
    "rollout": "int32",
    "update": "int32",
    "rank": "int32",
    "sample_id": "int32",
    "prompt_number": "int32",
    "position": "int32",
    "token_id": "int32",
    "text": "string",
    "log_mu": "float32",
    "log_pi": "float32",
    "advantage": "float32",
    "grad_weight": "float32",
    "keep": "bool",
    "reward": "float32",
    "staleness": "int32",
    "updates_since_sync": "int32",
}
"""Names and types, the same in every file."""


class TokenExport(Callback):
    """Writes the completion tokens that were trained on as Parquet, a file per rollout and rank.

    `rollout_000012.rank0.parquet` appears, in one piece, when its rollout has been trained on. A run that is stopped
    in the middle of a rollout writes what it has trained on, and the run that takes it up the rest, as
    `rollout_000012.rank0.from_update51.parquet`. One line reads all of them: `pandas.read_parquet(folder)` or
    `polars.read_parquet("folder/*.parquet")`. A token is a row, once per update that it was trained in:

    | column | type | meaning |
    |---|---|---|
    | `rollout` | int | number of the rollout, from 0 |
    | `update` | int | optimizer step that the token was trained in, from 1, as on the x axis of the logs |
    | `rank` | int | process that sampled it and trained on it |
    | `sample_id` | int | completion within the rollout of its rank |
    | `prompt_number` | int | row of the data set that the prompt is |
    | `position` | int | place in the completion, from 0 |
    | `token_id` | int | the token |
    | `text` | string | the token decoded by itself; parts of a character show as U+FFFD |
    | `log_mu` | float | log-probability when it was sampled, as the engine gave it, in nats |
    | `log_pi` | float | log-probability under the policy before the update, in nats |
    | `advantage` | float | A, in units of reward |
    | `grad_weight` | float | w, the factor on the importance-weighted policy gradient; null where A = 0 |
    | `keep` | bool | False where a mask drops the token; null for an objective without a mask |
    | `reward` | float | reward of the completion |
    | `staleness` | int | weight syncs between the oldest weights of the completion and the newest synced ones |
    | `updates_since_sync` | int | optimizer steps on this rollout before the update |

    Args:
        folder: where to; by default `tokens` in the run's log folder.
        every_n_rollouts: exports every n-th rollout, the first included.
        max_rows: most rows of a file. Of a larger rollout a random part of the completions is exported, whole ones.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, folder: str | None = None, every_n_rollouts: int = 1, max_rows: int = 1_000_000) -> None:
        for name, value in (("every_n_rollouts", every_n_rollouts), ("max_rows", max_rows)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.folder = folder
        self.every_n_rollouts = every_n_rollouts
        self.max_rows = max_rows
        self._default_folder = Path()
        self._chosen: Tensor | None = None
        self._part = ""
        self._parts: list[dict[str, Tensor]] = []
        self._update = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Asks for the log folder. Collective."""
        self._default_folder = Path(trainer.log_dir or trainer.default_root_dir) / "tokens"

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Forgets the last rollout."""
        self._parts, self._chosen = [], None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Notes which update the micro-batch belongs to."""
        self._update = trainer.global_step + 1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401 - Lightning's signature; a StepOutput
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Keeps the rows of the micro-batch."""
        if trainer.current_epoch % self.every_n_rollouts:  # an epoch is a rollout
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self._chosen is None:
            seed = trainer.current_epoch * trainer.world_size + trainer.global_rank
            self._chosen = chosen_samples(data.rollout, self.max_rows, seed)
        updates_since_sync = batch_idx // int(trainer.accumulate_grad_batches)
        if not self._parts:
            # A run resumed in the middle of a rollout leaves the file of the run before it as it is.
            self._part = f".from_update{self._update}" if updates_since_sync else ""
        rows = token_rows(batch, outputs, data.rollout, self._chosen)
        constants = {
            "rollout": trainer.current_epoch,
            "update": self._update,
            "rank": trainer.global_rank,
            "updates_since_sync": updates_since_sync,
        }
        rows |= {name: torch.full_like(rows["token_id"], value) for name, value in constants.items()}
        self._parts.append(rows)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Writes the file."""
        if not self._parts:
            return
        rows = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts = []
        table = token_table(rows, trainer.datamodule.encoder.tokenizer)  # type: ignore[attr-defined]
        folder = Path(self.folder).expanduser() if self.folder else self._default_folder
        write_parquet(
            table, folder / f"rollout_{trainer.current_epoch:06d}.rank{trainer.global_rank}{self._part}.parquet"
        )


def chosen_samples(rollout: Rollout, max_rows: int, seed: int) -> Tensor:
    """True for the samples of a rollout to export: all, or a random part of at most `max_rows` tokens."""
    lengths = torch.tensor([len(completion.token_ids) for completion in rollout.completions])
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(len(lengths), dtype=torch.bool).scatter(0, order, lengths[order].cumsum(0) <= max_rows)


def token_rows(batch: RolloutBatch, outputs: StepOutput, rollout: Rollout, chosen: Tensor) -> dict[str, Tensor]:
    """Columns of the completion tokens of a micro-batch, on the CPU.

    Args:
        batch: the micro-batch.
        outputs: what the training step said of it.
        rollout: the rollout that it is part of.
        chosen: True for the samples of the rollout to export.
    """
    sample_ids = batch.sample_ids.cpu()
    completion_mask = batch.completion_mask.cpu()
    mask = completion_mask & chosen[sample_ids][:, None]
    samples = sample_ids[:, None].expand_as(mask)[mask]
    objective = outputs["objective"]
    # NaN stands for null; a mask is 0 or 1.
    keep = torch.full(mask.shape, torch.nan) if objective.keep is None else objective.keep
    tensors = {
        "position": completion_mask.cumsum(1) - 1,
        "token_id": batch.input_ids,
        "log_mu": batch.rollout_logprobs,
        "log_pi": outputs["policy_logprobs"],
        "advantage": batch.advantages,
        "grad_weight": objective.grad_weight,
        "keep": keep.float(),
    }
    return {
        "sample_id": samples,
        "prompt_number": torch.tensor(rollout.prompt_numbers)[samples],
        "reward": rollout.rewards[samples],
        "staleness": rollout.staleness[samples],
        **{name: tensor.cpu()[mask] for name, tensor in tensors.items()},
    }


def token_table(rows: dict[str, Tensor], tokenizer: Any) -> "pyarrow.Table":  # noqa: ANN401
    """The rows as a table of `COLUMNS`."""
    import pyarrow as pa

    vocabulary, places = np.unique(rows["token_id"].numpy(), return_inverse=True)
    texts = pa.array(tokenizer.batch_decode(vocabulary[:, None].tolist()), pa.string())
    columns = {"text": texts.take(pa.array(places))}
    for name, tensor in rows.items():
        # A log-probability that is NaN is an error to be seen, not a missing value.
        values = pa.array(tensor.numpy(), from_pandas=name in ("grad_weight", "keep"))
        columns[name] = values.cast(COLUMNS[name])
    return pa.table({name: columns[name] for name in COLUMNS})


def write_parquet(table: "pyarrow.Table", path: Path) -> None:
    """Writes a file that is never seen half written; raises `DiskFullError` if there is no room."""
    import pyarrow.parquet as pq

    with whole_file(path) as unfinished:
        pq.write_table(table, unfinished)
