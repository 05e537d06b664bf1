"""What a policy takes in memory, by strategy: worked out from the number of parameters, and measured.

    python benchmarks/memory.py --strategy single
    python benchmarks/memory.py --strategy ddp --ranks 2
    python benchmarks/memory.py --strategy fsdp2 --ranks 2 --gradient-checkpointing

A Llama of random weights is loaded and updated twice by AdamW on random sequences. On a CPU the peaks are those of the
process's resident memory above what it had before, on a GPU those of the allocator.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from drpo_lightning.batch import RolloutBatch
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import DRPO

MIB = 2**20
VOCABULARY = 32000


def random_model(folder: str, hidden: int, layers: int) -> None:
    """Writes a Llama of random weights in bfloat16."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


class RandomBatches(LightningDataModule):
    """Two updates on random sequences."""

    def __init__(self, batch_size: int, num_tokens: int) -> None:
        super().__init__()
        self.shape = (batch_size, num_tokens)

    def train_dataloader(self) -> "DataLoader[RolloutBatch]":
        """As many batches as updates."""
        assert self.trainer is not None, "the data module needs a trainer"
        mask = torch.ones(self.shape, dtype=torch.bool)
        mask[:, 0] = False
        batch = RolloutBatch(
            input_ids=torch.randint(VOCABULARY, self.shape),
            attention_mask=torch.ones(self.shape, dtype=torch.bool),
            completion_mask=mask,
            rollout_logprobs=torch.full(self.shape, -10.0),
            advantages=torch.randn(self.shape),
            num_update_tokens=int(mask.sum()) * self.trainer.world_size,
            num_update_sequences=self.shape[0] * self.trainer.world_size,
            sample_ids=torch.arange(self.shape[0]),
        )
        return DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]


class Peak:
    """Highest memory in bytes since the last reset, of the GPU's allocator or of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Forgets the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> int:
        """The peak."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Memory(Callback):
    """Measures the peaks of loading and of training, and counts the bytes that stay."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Starts before the model is loaded."""
        self.peak = Peak(trainer.strategy.root_device)
        self.peak.reset()
        self.before = self.peak.now()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """The model is loaded."""
        self.loading = self.peak.now() - self.before
        self.peak.reset()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints a line for each rank."""
        training = self.peak.now() - self.before
        parameters = list(pl_module.parameters())
        state = trainer.optimizers[0].state.values()
        sizes = {
            "parameters": sum(map(local_bytes, parameters)),
            "AdamW's moments": sum(local_bytes(v) for s in state for v in s.values() if torch.is_tensor(v) and v.ndim),
            "peak of loading": self.loading,
            "peak of training": training,
        }
        ranks: list[Any] = [sizes]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, sizes)
        if trainer.is_global_zero:
            assert isinstance(pl_module, PolicyModule)
            report(sum(shape.numel() for shape in unique_shapes(pl_module)), ranks)


def local_bytes(tensor: Tensor) -> int:
    """Bytes of this rank's part of a tensor."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes


def unique_shapes(module: PolicyModule) -> list[torch.Size]:
    """Shapes of the policy's tensors, a tied head left out."""
    return [shape for name, shape in module.weight_shapes().items() if name != "lm_head.weight"]


def report(num_parameters: int, ranks: list[dict[str, int]]) -> None:
    """Prints what each rank took, in MiB and in bytes per parameter of the whole model."""
    print(f"torch {torch.__version__}; {num_parameters / 1e6:.1f} M parameters, {len(ranks)} rank(s)")
    for name in ranks[0]:
        row = "  ".join(f"{r[name] / MIB:8.0f} MiB {r[name] / num_parameters:6.2f} B/parameter" for r in ranks)
        print(f"{name:18}{row}")


def make_strategy(name: str, ranks: int) -> Strategy | str:
    """Lightning's strategy of that name."""
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    if name == "fsdp1":
        return FSDPStrategy()
    return DDPStrategy() if name == "ddp" else "auto"


def main() -> None:
    """Runs one strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["single", "ddp", "fsdp1", "fsdp2"], default="single")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--fused", action="store_true", help="AdamW without a copy of the parameters in its step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = os.environ.setdefault("DRPO_BENCHMARK_MODEL", folder)
        if model == folder:  # the other ranks run this file again and find it made
            random_model(folder, arguments.hidden, arguments.layers)
        trainer = Trainer(
            accelerator=arguments.accelerator,
            devices=arguments.ranks,
            strategy=make_strategy(arguments.strategy, arguments.ranks),
            precision=arguments.precision,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            gradient_clip_val=1.0,
            callbacks=[Memory()],
        )
        module = PolicyModule(
            model,
            DRPO(),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=arguments.fused),
            gradient_checkpointing=arguments.gradient_checkpointing,
        )
        trainer.fit(module, RandomBatches(arguments.batch_size, arguments.num_tokens))


if __name__ == "__main__":
    main()
