"""The main job on a CUDA GPU. Run with `pytest -m gpu` where there is one."""

import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import Divergence, FunctionReward, MaskStatistics, PolicyShift
from drpo_lightning.export import export_checkpoint
from drpo_lightning.modules import LoRA
from drpo_lightning.objectives import DPPO
from drpo_lightning.rollout import VLLMEngine
from drpo_lightning.rollout.process import EngineProcess
from tests.rollout.test_process import Recorder

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


def test_weights_go_to_an_engine_of_its_own_process_over_the_gpu_and_the_memory_comes_back():
    gpu = torch.device("cuda", torch.cuda.device_count() - 1)
    weights = {
        "matrix": torch.arange(48.0, device=gpu).view(6, 8),
        "half": torch.arange(7.0, device=gpu).bfloat16(),
        "empty": torch.zeros(0, device=gpu),
        "on the host": torch.arange(5),
        "large": torch.arange(2.0**22, device=gpu),
    }
    one_gpu = {"CUDA_VISIBLE_DEVICES": str(gpu.index)}
    process = EngineProcess(Recorder, ("hello",), one_gpu, weights["large"].nbytes, device=gpu)
    try:
        process.call("greet", "you", timeout_seconds=60)
        before = torch.cuda.memory_allocated(gpu)
        for factor in (1, 2):
            process.load_weights([(name, factor * tensor) for name, tensor in weights.items()], timeout_seconds=60)
            loaded = process.call("loaded", timeout_seconds=60)
            for name, tensor in weights.items():
                assert loaded[name] == [str(tensor.dtype), (factor * tensor).double().tolist()], name
            torch.cuda.ipc_collect()
            assert torch.cuda.memory_allocated(gpu) == before
    finally:
        process.close()


def test_vllm_on_a_gpu_takes_weights_without_laying_its_model_out_anew(model_folder):
    from drpo_lightning.rollout.in_process_vllm import InProcessVLLM

    engine = InProcessVLLM({"model": model_folder, "enforce_eager": True, "gpu_memory_utilization": 0.3})
    try:
        assert engine._loads_in_place
    finally:
        engine.close()


def strategy(name):
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    return {"fsdp1": FSDPStrategy(state_dict_type="sharded"), "ddp": DDPStrategy()}.get(name, "auto")


@pytest.fixture(autouse=True)
def process_groups_end():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def statistics_of(make_run, tmp_path):
    """Runs two updates of one rollout on the GPU and returns what they logged, by name, and the callbacks."""

    def statistics_of(strategy_name, precision, *, accumulate=1, checkpointing=False):
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
                "accumulate_grad_batches": accumulate,
                "max_epochs": 2,
            },
            module={"objective": DPPO(threshold=0.01), "gradient_checkpointing": checkpointing},
        )
        counted = []
        for callback in callbacks:
            update = callback.statistics.update

            def counting(values, subsets, update=update):
                counted.append(len(next(iter(values.values()))))
                update(values, subsets)

            callback.statistics.update = counting
        tokens = []
        run.data.on_before_batch_transfer = noting(run.data.on_before_batch_transfer, tokens)
        run.fit()
        assert sum(counted) == len(callbacks) * sum(tokens) > 0
        for callback in callbacks:
            assert callback.statistics.sums.dtype == callback.statistics.maxima.dtype == torch.float64
        with Path(logger.log_dir, "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows if row.get(name)] for name in rows[0] if name != "epoch"}

    return statistics_of


def noting(hook, tokens):
    def noted(batch, index):
        batch = hook(batch, index)
        tokens.append(int(batch.completion_mask.sum()))
        return batch

    return noted


COMBINATIONS = [
    ("ddp", "16-mixed"),
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
    absolute = {"32-true": 1e-5, "bf16-mixed": 2e-2, "16-mixed": 2e-3}[precision]
    # Of the first rollout: from its samples on, runs of different precision go different ways.
    for name in ("divergence/k3_kl", "policy_shift/abs_mean"):
        assert logged[name][0] == pytest.approx(expected[name][0], rel=tolerance, abs=absolute), name
    # The loss scaler starts too high and leaves updates out, whose gradient is infinite, until it is right.
    finite = [norm for norm in logged["optim/grad_norm"] if math.isfinite(norm)]
    assert finite
    assert max(finite) < 10 * max(expected["optim/grad_norm"])


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_accumulation_and_checkpointing_change_nothing(statistics_of, name):
    plain = statistics_of(name, "32-true")
    split = statistics_of(name, "32-true", accumulate=2, checkpointing=True)
    for key in ("optim/loss", "optim/grad_norm", "divergence/k3_kl"):
        assert split[key] == pytest.approx(plain[key], rel=2e-3, abs=1e-6), key


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_a_sharded_checkpoint_is_resumed_and_exported(make_run, make_recorder, tmp_path, name):
    def save(trainer, module, batch_idx):
        if batch_idx == 0:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    def run(*callbacks):
        return make_run(*callbacks, trainer={"accelerator": "gpu", "strategy": strategy(name), "max_epochs": 1})

    whole = run(make_recorder(save))
    whole.fit()
    assert (tmp_path / "run.ckpt").is_dir()
    expected = {key: tensor.cpu() for key, tensor in whole.module.named_weights()}
    resumed = run()
    resumed.fit(ckpt_path=tmp_path / "run.ckpt")
    for key, tensor in resumed.module.named_weights():
        torch.testing.assert_close(tensor.cpu(), expected[key], rtol=0, atol=1e-6)
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "exported")


@pytest.mark.parametrize("name", ["single", "fsdp2"])
def test_adapters_are_trained(make_run, name):
    settings = {"accelerator": "gpu", "strategy": strategy(name), "precision": "bf16-mixed"}
    run = make_run(trainer=settings, module={"peft": LoRA(r=4)})
    run.fit()
    assert run.trainer.global_step == 2


@pytest.mark.parametrize("name", ["single", "fsdp2"])
def test_a_run_whose_optimizer_leaves_the_gpu_meanwhile_is_the_same(make_run, name):
    taken, weights = [], []

    def watching(completion_ids, **_):
        taken.append(torch.cuda.memory_allocated())
        return [sum(i * token for i, token in enumerate(ids, start=1)) % 5 / 4 for ids in completion_ids]

    for is_offloaded in (True, False):
        run = make_run(
            trainer={"accelerator": "gpu", "strategy": strategy(name), "max_epochs": 3},
            data={"offload_optimizer": is_offloaded, "seeded_requests": True},
            rewards=[FunctionReward(watching, name="watching")],
        )
        run.fit()
        weights.append(torch.cat([tensor.flatten().cpu() for _, tensor in run.module.named_weights()]))
    moments = 2 * 4 * weights[0].numel()
    assert taken[1] + moments / 2 < taken[4]  # the second rollout with it, without it
    torch.testing.assert_close(weights[0], weights[1])


def test_float16_is_refused_under_fsdp2(make_run):
    with pytest.raises(ValueError, match="does not support"):
        make_run(trainer={"accelerator": "gpu", "strategy": strategy("fsdp2"), "precision": "16-mixed"})
