"""Runs cases, in the process that asks or in a group of ranks, and keeps what came out of them."""

import datetime
import os
import time
import traceback
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from drpo_lightning.batch import Completion, Rollout, RolloutBatch, ValidationBatch
from drpo_lightning.callbacks import Divergence, MaskStatistics, MismatchAndDrift, PolicyShift
from drpo_lightning.modules import PolicyModule
from tests.callbacks.conftest import MemoryLogger
from tests.distributed.cases import HORIZON, PROBLEMS
from tests.distributed.reference import is_masked
from tests.distributed.samples import TEMPERATURE
from tests.distributed.strategies import CPUFSDPStrategy

NUM_RANKS = 2
NUM_VALIDATION_PROMPTS, NUM_VALIDATION_SAMPLES = 300, 2
PATIENCE = datetime.timedelta(seconds=60)
"""How long a rank waits for another."""


class Result(NamedTuple):
    """What one rank has to say of a case.

    Attributes:
        error: traceback of what was raised; None if all went well.
        scalars: logged metrics, by name, as (step, value).
        weights: the whole policy after the last update, by name.
        dtypes: of the states of all metrics at the end.
        warnings: messages.
        seconds: that it took.
    """

    error: str | None
    scalars: dict[str, list[tuple[int, float]]]
    weights: dict[str, torch.Tensor]
    dtypes: set[torch.dtype]
    warnings: list[str]
    seconds: float


class RecordedRollout(LightningDataModule):
    """Serves this rank's part of the recorded samples, and after them validation completions."""

    def __init__(self, updates, problem):
        super().__init__()
        self.updates = updates
        self.problem = problem
        self.batches = {}
        """Micro-batches by the number of their first sample."""

    def train_dataloader(self):
        for number in range(len(self.updates)):
            self.batches |= {int(batch.sample_ids[0]): batch for batch in self.micro_batches(number)}
        return self.batches.values()  # a list would be as many loaders

    def micro_batches(self, number):
        """This rank's micro-batches of an update: consecutive parts of its samples, which may be empty."""
        samples, accumulate = self.updates[number], self.trainer.accumulate_grad_batches
        masked = [is_masked(self.problem, row) for row in range(len(samples))]
        num_tokens = sum(
            0 if is_without else len(sample.token_ids) for sample, is_without in zip(samples, masked, strict=True)
        )
        own = torch.arange(len(samples)).tensor_split(self.trainer.world_size)[self.trainer.global_rank]
        for part in own.tensor_split(accumulate):
            rows = part.tolist()
            batch = RolloutBatch.collate(
                rollout_of(samples),
                rows,
                torch.tensor([sample.advantage for sample in samples]),
                pad_token_id=0,
                num_update_tokens=num_tokens,
                num_update_sequences=len(samples),
            )
            if rows:
                batch.completion_mask[torch.tensor([masked[row] for row in rows])] = False
            batch.sample_ids += number * len(samples) if rows else -number
            yield batch

    def val_dataloader(self):
        """Two thirds of the prompts are the first rank's; one of a prompt's two samples passes."""
        share = NUM_VALIDATION_PROMPTS * 2 // 3 if self.trainer.world_size > 1 else NUM_VALIDATION_PROMPTS
        prompts = range(share) if self.trainer.global_rank == 0 else range(share, NUM_VALIDATION_PROMPTS)
        rollout = Rollout(
            prompts=["1+1="] * len(prompts) * NUM_VALIDATION_SAMPLES,
            prompt_ids=[[20, 14, 20, 32]] * len(prompts) * NUM_VALIDATION_SAMPLES,
            completions=[Completion([21] * n, [-0.5] * n, "stop") for i in prompts for n in (1, 1 + i % 3)],
            texts=["2"] * len(prompts) * NUM_VALIDATION_SAMPLES,
            columns={},
            group_size=NUM_VALIDATION_SAMPLES,
            rewards=torch.tensor([1.0, 0.25] * len(prompts)),
        )
        return {0: ValidationBatch(rollout, {})}.values()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        """The micro-batch as it was made, see `RolloutDataModule`."""
        return self.batches[int(batch.sample_ids[0])] if isinstance(batch, RolloutBatch) else batch

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def rollout_of(samples):
    return Rollout(
        prompts=[""] * len(samples),
        prompt_ids=[sample.prompt_ids for sample in samples],
        completions=[Completion(sample.token_ids, sample.logprobs, "stop") for sample in samples],
        texts=[""] * len(samples),
        columns={},
        group_size=1,
        rewards=torch.zeros(len(samples)),
    )


def make_strategy(name):
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=NUM_RANKS, tensor_parallel_size=1, timeout=PATIENCE)
    if name == "fsdp1":
        return CPUFSDPStrategy(timeout=PATIENCE)
    return SingleDeviceStrategy("cpu")


def run_case(case, updates, model_folder, folder):
    """Trains; what is raised is part of the result."""
    started, logger, callbacks, module = time.perf_counter(), MemoryLogger(), make_callbacks(), None
    error, weights, dtypes = None, {}, set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module = fit(case, updates, model_folder, folder, [logger, make_writer(case, folder)], callbacks)
            weights = {name: tensor.clone() for name, tensor in module.named_weights()}
            dtypes = {state.dtype for metric in metrics_of(module, callbacks) for state in (metric.sums, metric.maxima)}
        except Exception:  # noqa: BLE001 - of a case, not of all
            error = traceback.format_exc()
    messages = [str(warning.message) for warning in caught]
    return Result(error, dict(logger.scalars), weights, dtypes, messages, time.perf_counter() - started)


def make_callbacks():
    return [PolicyShift(), Divergence(), MaskStatistics(), MismatchAndDrift(num_sequences=0)]


def metrics_of(module, callbacks):
    *of_updates, mismatch = callbacks
    return [callback.statistics for callback in of_updates] + [
        mismatch.statistics["mismatch"],
        module.validation_statistics,
    ]


def make_writer(case, folder):
    return TensorBoardLogger(folder, name=str(case), version="", default_hp_metric=False)


def fit(case, updates, model_folder, folder, loggers, callbacks):
    problem = PROBLEMS[case.problem]
    module = PolicyModule(
        model_folder,
        objective=problem.objective,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=problem.learning_rate),
        aggregation=problem.aggregation,
        horizon=HORIZON,
        temperature=TEMPERATURE,
        gradient_checkpointing=case.checkpointing,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=case.num_ranks,
        strategy=make_strategy(case.strategy),
        plugins=[TorchElasticEnvironment()] if case.num_ranks > 1 else None,
        precision=case.precision,
        max_epochs=1,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=problem.clip,
        log_every_n_steps=1,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(module, RecordedRollout(updates, problem))
    return module


# ---------------------------------------------------------------- in a group of ranks


def run_rank(rank, cases, updates, model_folder, folder):
    """This rank's results by case, each of a process group of its own: a case that fails leaves the next in peace."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(NUM_RANKS), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    results = {}
    for case in cases:
        store = dist.FileStore(str(folder / f"{case}.store"), NUM_RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=PATIENCE)
        try:
            results[case] = run_case(case, updates, model_folder, folder)
        finally:
            dist.destroy_process_group()
        print(rank, case, f"{results[case].seconds:.1f} s", results[case].error or "", flush=True)  # noqa: T201
    return results
