"""The main job on a CUDA GPU. Run with `pytest -m gpu` where there is one."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import Divergence, MaskStatistics, PolicyShift
from drpo_lightning.objectives import DPPO
from drpo_lightning.rollout import VLLMEngine

ROOT = Path(__file__).parent.parent
# vLLM, and PyTorch of the version that it pins, warn of what they do themselves.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def test_the_quickstart_runs_and_learns(tmp_path):
    command = [sys.executable, "-m", "drpo_lightning", "fit", "--config=configs/quickstart.yaml"]
    command += ["--trainer.max_epochs=10", "--trainer.check_val_every_n_epoch=10", "--trainer.accelerator=gpu"]
    command += [f"--trainer.logger.init_args.save_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    before, after = map(float, re.search(r"held-out pass@1: (\S+) before -> (\S+) after", result.stdout).groups())
    assert after > before + 0.1


@pytest.mark.parametrize("process", ["in_process", "own"])
def test_a_sleeping_engine_frees_memory_and_wakes_with_new_weights(model_folder, process):
    from transformers import AutoModelForCausalLM

    engine = VLLMEngine(process=process, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3)
    engine.start(model_folder, device=torch.device("cuda", 0), num_ranks=1, seed=0)
    try:
        awake = torch.cuda.mem_get_info()[0]
        engine.sleep()
        assert torch.cuda.mem_get_info()[0] > awake + 2**30
        engine.wake()
        policy = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).cuda()
        engine.load_weights(policy.state_dict().items())
        prompt = [20, 21, 14, 22, 23, 32]
        group = engine.generate([prompt], Sampling(max_tokens=8), num_samples=4, stop_token_ids=[1])[0]
        for completion in group:
            ids = torch.tensor([prompt + completion.token_ids], device="cuda")
            with torch.no_grad():
                logprobs = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=5e-3)
    finally:
        engine.close()


def strategy(name):
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    return FSDPStrategy(state_dict_type="sharded") if name == "fsdp1" else "auto"


@pytest.fixture
def statistics_of(make_run, tmp_path):
    """Runs two updates of one rollout on the GPU and returns what they logged, by name, and the callbacks."""

    def statistics_of(strategy_name, precision):
        callbacks = [PolicyShift(), Divergence(), MaskStatistics()]
        logger = CSVLogger(tmp_path, name=f"{strategy_name}-{precision}")
        run = make_run(
            *callbacks,
            trainer={
                "accelerator": "gpu",
                "strategy": strategy(strategy_name),
                "precision": precision,
                "logger": logger,
                "gradient_clip_val": 0.1,
            },
            module={"objective": DPPO(threshold=0.01)},
        )
        counted = []
        for callback in callbacks:
            update = callback.statistics.update

            def counting(values, subsets, update=update):
                counted.append(len(next(iter(values.values()))))
                update(values, subsets)

            callback.statistics.update = counting
        run.fit()
        assert sum(counted) == len(callbacks) * run.data.rollout.num_completion_tokens
        for callback in callbacks:
            assert callback.statistics.sums.dtype == callback.statistics.maxima.dtype == torch.float64
        with Path(logger.log_dir, "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows if row.get(name)] for name in rows[0] if name != "epoch"}

    return statistics_of


COMBINATIONS = [
    ("single", "bf16-mixed"),
    ("single", "16-mixed"),
    ("fsdp1", "32-true"),
    ("fsdp1", "bf16-mixed"),
    ("fsdp1", "16-mixed"),
    ("fsdp2", "32-true"),
    ("fsdp2", "bf16-mixed"),
]


@pytest.mark.parametrize(("strategy_name", "precision"), COMBINATIONS)
def test_statistics_do_not_depend_on_the_strategy_or_on_loss_scaling(statistics_of, strategy_name, precision):
    # The engine samples in float32 with the same weights and seeds: all runs train on the same tokens.
    expected, logged = statistics_of("single", "32-true"), statistics_of(strategy_name, precision)
    assert logged.keys() == expected.keys()
    # float16's scale is 65536: a statistic that saw it would be off by orders of magnitude.
    tolerance = {"32-true": 1e-3, "bf16-mixed": 0.1, "16-mixed": 0.02}[precision]
    for name in ("optim/grad_norm", "reward/mean", "divergence/k3_kl", "policy_shift/abs_mean"):
        if name in expected:
            absolute = {"32-true": 1e-5, "bf16-mixed": 2e-2, "16-mixed": 2e-3}[precision]
            assert logged[name] == pytest.approx(expected[name], rel=tolerance, abs=absolute), name
    assert all(0 < norm < 1e3 for norm in logged["optim/grad_norm"])


def test_float16_is_refused_under_fsdp2(make_run):
    with pytest.raises(ValueError, match="does not support"):
        make_run(trainer={"accelerator": "gpu", "strategy": strategy("fsdp2"), "precision": "16-mixed"})
