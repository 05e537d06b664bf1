"""Writes the trained policy as a folder that transformers and vLLM load."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from drpo_lightning.errors import SettingError
from drpo_lightning.export import check_exported, export_dtype, write_model
from drpo_lightning.hub import make_repository, upload
from drpo_lightning.model_card import Record, changes_on_the_way, training_record, validation_record, write_card
from drpo_lightning.modules import PolicyModule
from drpo_lightning.rollout.adapters import write_adapter


class ExportPolicy(Callback):
    """Exports the policy at the end of the training, with a model card and a record of the training.

    `README.md` and `training.json` say what it was trained on and how, what the latest validation gave, and from which
    update on a resumed run had other settings; see `drpo_lightning.model_card`. A README.md that somebody else has
    written stays. The record is in checkpoints too, for `drpo export`.

    Args:
        folder: where to; by default `policy` in the run's log folder.
        dtype: precision of the exported weights; by default that of the training.
        check: also gives the weights to the engine, whose `SyncProbe` then confirms them, and reads back what was
            written.
        adapter: writes the LoRA adapters alone, as PEFT's folder; by default they are merged into the model.
        push_to_hub: repository on the Hugging Face hub, `owner/name`, that the folder is uploaded to at the end. It is
            made at the start, so that a run without the right to write there ends before it has begun.
        private: whether that repository is private; one that exists stays as it is.

    Raises:
        ValueError: if the precision is not exported.
    """

    def __init__(
        self,
        folder: str | None = None,
        dtype: str | None = None,
        check: bool = True,
        adapter: bool = False,
        push_to_hub: str | None = None,
        private: bool = True,
    ) -> None:
        self.folder = folder
        self.dtype = export_dtype(dtype)
        self.check = check
        self.adapter = adapter
        self.push_to_hub = push_to_hub
        self.private = private
        self._validation: dict[str, Any] = {}
        self._changes: list[Record] = []
        self._resumed: Record | None = None
        self.exported: Path | None = None
        """The folder, once it is written."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there are adapters, if they are to be exported, and that the hub can be written to."""
        if self.adapter and getattr(pl_module, "peft", None) is None:
            raise SettingError("`ExportPolicy.adapter` needs `model.peft`: the policy has no adapters; leave it out")
        is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self.push_to_hub and stage == "fit" and trainer.is_global_zero and not is_trial:
            make_repository(self.push_to_hub, private=self.private)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keeps the latest figures."""
        self._validation = validation_record(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The latest figures, which a resumed run has until its next validation."""
        return dict(self._validation)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the figures over."""
        self._validation = dict(state_dict)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes what is known of the training, for `drpo export`."""
        checkpoint["training"] = self._record(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Takes over what is known of the training so far."""
        self._resumed = checkpoint.get("training")

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401, ARG002 - Lightning's signature
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Notes, before the first update of a run that goes on, which settings are others than before."""
        if self._resumed is not None:
            self._record(trainer, pl_module)

    def _record(self, trainer: Trainer, module: LightningModule) -> Record:
        """What is known of the training, with the changes on the way."""
        record = training_record(trainer, module, self._validation)
        if self._resumed is not None:  # what callbacks restore at the start of the training is restored
            self._changes = changes_on_the_way(self._resumed, record)
            self._resumed = None
        return record | ({"changes": self._changes} if self._changes else {})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the model and its tokenizer on rank 0; the other ranks help to gather the weights."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(pl_module, PolicyModule):
            raise TypeError(f"the LightningModule must be a `PolicyModule`, got {type(pl_module).__name__}")
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "policy")
        weights = self._gathered(trainer, pl_module)
        if trainer.is_global_zero:
            self._write(pl_module, weights, folder)
            write_card(folder, self._record(trainer, pl_module), is_adapter=self.adapter)
        if self.check:
            trainer.datamodule.refresh_engine()  # type: ignore[attr-defined]
            if trainer.is_global_zero:
                check_exported(folder, weights)
        self.exported = folder
        rank_zero_info(f"Policy exported to {folder}")
        if self.push_to_hub and trainer.is_global_zero:
            rank_zero_info(f"Policy uploaded to {upload(folder, self.push_to_hub)}")

    def _gathered(self, trainer: Trainer, module: PolicyModule) -> dict[str, Tensor]:
        """The weights, whole and in the precision to write; none on ranks other than 0. Collective."""
        weights = {}
        source = module.named_adapter_weights() if self.adapter else module.named_weights()
        for name, tensor in source:  # every rank helps to gather a tensor; only rank 0 keeps it
            if trainer.is_global_zero:
                weights[name] = tensor.to("cpu", self.dtype or tensor.dtype, copy=True)
        return weights

    def _write(self, module: PolicyModule, weights: dict[str, Tensor], folder: Path) -> None:
        if self.adapter:
            assert module.peft is not None, "checked in `setup`"
            write_adapter(folder, module.peft.adapter_config(module.model_name), weights.items())
        else:
            write_model(module.model_name, weights, folder, trust_remote_code=module.trust_remote_code)
