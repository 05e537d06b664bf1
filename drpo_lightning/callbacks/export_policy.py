"""Writes the trained policy as a folder that transformers and vLLM load."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from drpo_lightning.errors import SettingError
from drpo_lightning.export import check_exported, export_dtype, write_model
from drpo_lightning.modules import PolicyModule
from drpo_lightning.rollout.adapters import write_adapter


class ExportPolicy(Callback):
    """Exports the policy at the end of the training.

    Args:
        folder: where to; by default `policy` in the run's log folder.
        dtype: precision of the exported weights; by default that of the training.
        check: also gives the weights to the engine, whose `SyncProbe` then confirms them, and reads back what was
            written.
        adapter: writes the LoRA adapters alone, as PEFT's folder; by default they are merged into the model.

    Raises:
        ValueError: if the precision is not exported.
    """

    def __init__(
        self, folder: str | None = None, dtype: str | None = None, check: bool = True, adapter: bool = False
    ) -> None:
        self.folder = folder
        self.dtype = export_dtype(dtype)
        self.check = check
        self.adapter = adapter
        self.exported: Path | None = None
        """The folder, once it is written."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Checks that there are adapters, if they are to be exported."""
        if self.adapter and getattr(pl_module, "peft", None) is None:
            raise SettingError("`ExportPolicy.adapter` needs `model.peft`: the policy has no adapters; leave it out")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the model and its tokenizer on rank 0; the other ranks help to gather the weights."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, PolicyModule):
            raise TypeError(f"the LightningModule must be a `PolicyModule`, got {type(pl_module).__name__}")
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "policy")
        weights = {}
        source = pl_module.named_adapter_weights() if self.adapter else pl_module.named_weights()
        for name, tensor in source:  # every rank helps to gather a tensor; only rank 0 keeps it
            if trainer.is_global_zero:
                weights[name] = tensor.to("cpu", self.dtype or tensor.dtype, copy=True)
        if trainer.is_global_zero:
            self._write(pl_module, weights, folder)
        if self.check:
            trainer.datamodule.refresh_engine()  # type: ignore[attr-defined]
            if trainer.is_global_zero:
                check_exported(folder, weights)
        self.exported = folder
        rank_zero_info(f"Policy exported to {folder}")

    def _write(self, module: PolicyModule, weights: dict[str, Tensor], folder: Path) -> None:
        if self.adapter:
            assert module.peft is not None, "checked in `setup`"
            write_adapter(folder, module.peft.adapter_config(module.model_name), weights.items())
        else:
            write_model(module.model_name, weights, folder, trust_remote_code=module.trust_remote_code)
