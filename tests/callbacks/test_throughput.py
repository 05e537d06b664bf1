"""Speed of the updates: counted from the rollout, over all ranks, as much of it as is trained on."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drpo_lightning.callbacks import RolloutStatistics
from drpo_lightning.callbacks.throughput import UpdateWork, update_work
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.modules.lora import LoRA
from drpo_lightning.objectives import DRPO, Decoupled
from drpo_lightning.rollout import TransformersEngine


def sizes(rollout):
    lengths = [len(p) + len(c.token_ids) for p, c in zip(rollout.prompt_ids, rollout.completions, strict=True)]
    return lengths, rollout.num_completion_tokens


def flops_by_hand(lengths, num_completion_tokens):
    hidden, between, vocabulary, layers = 128, 352, 98, 2
    body = layers * (4 * hidden**2 + 3 * hidden * between)
    products = body * sum(lengths) + vocabulary * hidden * num_completion_tokens
    return 6 * products + 6 * layers * hidden * sum(length**2 for length in lengths)


def test_the_work_of_a_real_run(make_run, make_memory, make_recorder):
    logger, recorder = make_memory(), make_recorder()
    run = make_run(RolloutStatistics(), recorder, trainer={"logger": logger, "max_epochs": 2})
    run.fit()
    assert "perf/mfu" not in logger.scalars  # nobody knows the peak of a CPU
    for i, rollout in enumerate(recorder.rollouts):
        lengths, sampled = sizes(rollout)
        seconds, speed = (logger.values(f"perf/{name}")[i] for name in ("update_seconds", "update_tokens_per_second"))
        assert speed * seconds == pytest.approx(sum(lengths))
        seconds, speed = (
            logger.values(f"perf/{name}")[i] for name in ("generate_seconds", "generate_tokens_per_second")
        )
        assert speed * seconds == pytest.approx(sampled)
        work = update_work(run.trainer, run.module, rollout)
        assert work.model_flops == pytest.approx(flops_by_hand(lengths, sampled))
        assert work.peak_flops is None


def test_a_peak_can_be_given(make_run, make_memory):
    logger = make_memory()
    run = make_run(RolloutStatistics(peak_tflops=0.5), trainer={"logger": logger, "max_epochs": 1})
    run.fit()
    lengths, sampled = sizes(run.data.rollout)
    (seconds,), (utilization,) = (logger.values(f"perf/{name}") for name in ("update_seconds", "mfu"))
    assert utilization * seconds == pytest.approx(flops_by_hand(lengths, sampled) / 0.5e12)
    with pytest.raises(ValueError, match="`peak_tflops` must be positive, got 0"):
        RolloutStatistics(peak_tflops=0)


def test_the_phases_of_an_iteration_do_not_overlap(make_run, make_memory):
    logger = make_memory()
    make_run(
        RolloutStatistics(),
        trainer={"logger": logger, "max_epochs": 3},
        module={"objective": Decoupled(DRPO(0.2))},
        data={"offload_optimizer": True},
    ).fit()
    phases = ("sync", "generate", "reward", "update", "offload", "score")
    summed = torch.tensor([logger.values(f"perf/{name}_seconds") for name in phases]).sum(0)
    assert (summed <= torch.tensor(logger.values("perf/iteration_seconds"))).all()
    assert not any(name in logger.scalars for name in ("perf/wake_seconds", "perf/sleep_seconds"))


class SleepingEngine(TransformersEngine):
    """Notes when it is put to sleep, and when it is woken."""

    can_sleep = True

    def __init__(self):
        super().__init__()
        self.events = []

    def _sleep(self):
        self.events.append("sleep")

    def _wake(self):
        self.events.append("wake")


def test_sleep_and_waking_are_phases_of_an_engine_that_sleeps(make_run, make_memory):
    logger = make_memory()
    run = make_run(RolloutStatistics(), trainer={"logger": logger, "max_epochs": 3}, data={"engine": SleepingEngine()})
    run.fit()
    assert run.data.engine.events == ["sleep", "wake", "sleep", "wake", "sleep"]
    assert len(logger.values("perf/sleep_seconds")) == 3
    assert len(logger.values("perf/wake_seconds")) == 2  # it starts awake


class TimedEngine(TransformersEngine):
    """Says for how long it has sampled, as an engine in a process of its own does."""

    seconds = 0.0

    def generate(self, *arguments, **settings):
        self.seconds += 0.25
        return super().generate(*arguments, **settings)

    @property
    def sampling_seconds(self):
        return self.seconds if self.is_started else None


def test_the_share_in_which_the_engine_computes_is_of_the_iteration(make_run, make_memory):
    logger = make_memory()
    data = {"engine": TimedEngine(), "val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=4)}
    run = make_run(RolloutStatistics(), trainer={"logger": logger, "max_epochs": 3}, data=data)
    run.fit()
    iterations, shares = (logger.values(f"perf/{name}") for name in ("iteration_seconds", "engine_busy_fraction"))
    assert run.data.engine.seconds == 7 * 0.25  # three rollouts, and validations before, between and after them
    assert [share * seconds for share, seconds in zip(shares, iterations, strict=True)] == pytest.approx([0.25] * 3)


def test_time_and_memory_of_the_process_only_grow(make_run, make_memory):
    logger = make_memory()
    begun = time.perf_counter()
    make_run(RolloutStatistics(), trainer={"logger": logger, "max_epochs": 2}).fit()
    assert logger.steps("perf/elapsed_seconds") == logger.steps("perf/peak_memory_gib") == [2, 4]
    first, second = logger.values("perf/elapsed_seconds")
    assert logger.values("perf/iteration_seconds")[0] <= first < second < time.perf_counter() - begun
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:"))
    before, after = logger.values("perf/peak_memory_gib")
    assert 0.9 * peak < before <= after


def test_utilization_is_the_work_over_what_the_devices_could_have_done():
    work = UpdateWork(num_tokens=100.0, model_flops=6e12, peak_flops=4e12)
    assert work.metrics(2.0) == {"perf/update_tokens_per_second": 50.0, "perf/mfu": 0.75}
    assert UpdateWork(100.0, None, 4e12).metrics(2.0) == {"perf/update_tokens_per_second": 50.0}
    assert UpdateWork(100.0, 6e12, None).metrics(2.0) == {"perf/update_tokens_per_second": 50.0}


def test_only_what_is_trained_on_counts(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"overfit_batches": 1})  # of two micro-batches
    run.fit()
    lengths, sampled = sizes(recorder.rollouts[0])
    work = update_work(run.trainer, run.module, recorder.rollouts[0])
    assert work.num_tokens == pytest.approx(sum(lengths) / 2)
    assert work.model_flops == pytest.approx(flops_by_hand(lengths, sampled) / 2)


def test_all_ranks_count(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder)
    run.fit()
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: 2 * tensor, root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, datamodule=run.data, accumulate_grad_batches=1, num_training_batches=2)
    alone, both = (update_work(t, run.module, recorder.rollouts[0]) for t in (run.trainer, trainer))
    assert both.num_tokens == 2 * alone.num_tokens
    assert both.model_flops == pytest.approx(2 * alone.model_flops)


def test_adapters_take_less_work(make_run, make_recorder):
    works = []
    for peft in (None, LoRA(r=2)):
        recorder = make_recorder()
        run = make_run(recorder, module={"peft": peft})
        run.fit()
        works.append(update_work(run.trainer, run.module, recorder.rollouts[0]))
    assert 0.6 < works[1].model_flops / works[0].model_flops < 0.75
