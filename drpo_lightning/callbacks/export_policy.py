"""Writes the trained policy as a folder that transformers and vLLM load."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from drpo_lightning.export import check_exported, write_model
from drpo_lightning.modules import PolicyModule


class ExportPolicy(Callback):
    """Exports the policy at the end of the training.

    Args:
        folder: where to; by default `policy` in the run's log folder.
        dtype: precision of the exported weights; by default that of the training.
        check: also gives the weights to the engine, whose `SyncProbe` then confirms them, and reads back what was
            written.
    """

    def __init__(self, folder: str | None = None, dtype: str | None = None, check: bool = True) -> None:
        self.folder = folder
        self.dtype = dtype
        self.check = check
        self.exported: Path | None = None
        """The folder, once it is written."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the model and its tokenizer on rank 0; the other ranks help to gather the weights."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, PolicyModule):
            raise TypeError(f"the LightningModule must be a `PolicyModule`, got {type(pl_module).__name__}")
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "policy")
        # Every rank takes part in gathering a tensor; only rank 0 keeps it.
        weights = {name: tensor.cpu() for name, tensor in pl_module.named_weights() if trainer.is_global_zero}
        if trainer.is_global_zero:
            write_model(
                pl_module.model_name,
                weights,
                folder,
                dtype=self.dtype,
                trust_remote_code=pl_module.trust_remote_code,
            )
        if self.check:
            trainer.datamodule.refresh_engine()  # type: ignore[attr-defined]
            if trainer.is_global_zero:
                check_exported(folder, weights, dtype=self.dtype)
        self.exported = folder
        rank_zero_info(f"Policy exported to {folder}")
