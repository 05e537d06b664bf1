"""Our side of `step.py`, which runs it: python step_drpo.py WORKLOAD.json."""

import logging
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from step_clock import StepClock, Workload, scattered_reward

from drpo_lightning.batch import Rollout, RolloutBatch, Sampling
from drpo_lightning.callbacks import FunctionReward, MaskStatistics, PolicyShift, RolloutStatistics
from drpo_lightning.datamodules import RolloutDataModule
from drpo_lightning.datamodules.prompts import PromptSource
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import ClippedRatio
from drpo_lightning.rollout import RolloutEngine, RolloutHooks, TransformersEngine, VLLMEngine


class FixedPrompts(PromptSource):
    """The same texts at every step."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts

    def load(self) -> list[dict[str, Any]]:
        """A row for each."""
        return [{"prompt": prompt} for prompt in self.prompts]


class SteppedRun(Callback, RolloutHooks):
    """Stops at the start of each iteration until it is asked for; the first of the callbacks.

    Args:
        clock: times the steps.
        engine: the one that samples.
    """

    def __init__(self, clock: StepClock, engine: RolloutEngine) -> None:
        self.clock = clock
        self.engine = engine
        self.started = 0.0
        self.sampling_seconds = 0.0

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """The iteration before ends here, too."""
        self._note_engine()
        self.clock.next_step(trainer.global_step)
        self.started = self.clock.now()

    def _note_engine(self) -> None:
        """Notes how long an engine in a process of its own has computed since this was last noted."""
        before = self.sampling_seconds
        self.sampling_seconds = self.engine.sampling_seconds or 0.0
        self.clock.add_seconds("engine", self.sampling_seconds - before)

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:  # noqa: ARG002
        """Notes the phases."""
        self.clock.add_seconds("rollout", self.clock.now() - self.started)
        phases: dict[str, float] = trainer.datamodule.phase_seconds  # type: ignore[attr-defined]
        self.clock.add_seconds("sync", phases["sync"])
        self.clock.add_seconds("waiting", phases["generate"])
        self.clock.count("sampled_tokens", rollout.num_completion_tokens)
        self.clock.count("prompt_tokens", sum(map(len, rollout.prompt_ids)))

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: RolloutBatch,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Counts the tokens that were trained on."""
        self.clock.count("trained_tokens", batch.completion_mask.sum())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """The last iteration ends."""
        self._note_engine()
        self.clock.end_step(trainer.global_step)


def make_engine(workload: Workload) -> RolloutEngine:
    """The engine, in this process unless the workload says otherwise."""
    if workload.engine == "transformers":
        return TransformersEngine(dtype="float32" if workload.precision == "32-true" else "bfloat16")
    return VLLMEngine(
        process=workload.engine_process,
        sleep="never" if workload.engine_process == "own" else "auto",
        max_model_len=workload.max_model_len,
        gpu_memory_utilization=workload.gpu_memory_utilization,
    )


def main() -> None:
    """Runs as many steps as the workload says, one each time that it is asked."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    workload = Workload.from_file(sys.argv[1])
    clock = StepClock(workload.device)
    torch.set_num_threads(workload.threads)
    seed_everything(0, verbose=False)
    engine = make_engine(workload)
    trainer = Trainer(
        accelerator="cpu" if workload.device == "cpu" else "gpu",
        devices=1,
        precision=workload.precision,  # type: ignore[arg-type]
        max_epochs=workload.num_steps,
        accumulate_grad_batches=workload.num_micro_batches,
        gradient_clip_val=1.0,
        callbacks=[
            SteppedRun(clock, engine),
            FunctionReward(scattered_reward, name="scattered"),
            RolloutStatistics(),
            PolicyShift(),
            MaskStatistics(),
        ],
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = PolicyModule(
        workload.model,
        ClippedRatio(clip_low=0.2, clip_high=0.2),
        optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=workload.learning_rate, weight_decay=0.01, fused=True
        ),
        temperature=workload.temperature,
        gradient_checkpointing=workload.gradient_checkpointing,
    )
    data = RolloutDataModule(
        engine=engine,
        prompts=FixedPrompts(workload.prompts),
        model=workload.model,
        num_prompts=len(workload.prompts),
        group_size=workload.group_size,
        num_updates=workload.num_updates,
        sampling=Sampling(max_tokens=workload.max_tokens, temperature=workload.temperature),
        advantage="group_mean_std",
        max_staleness=workload.max_staleness,
        seeded_requests=workload.seeded_requests,
    )
    if data.encoder.tokenizer.pad_token is None:
        data.encoder.tokenizer.pad_token = data.encoder.tokenizer.eos_token
    data.encoder.stop_token_ids = []
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
