"""The main job as a user runs it: real processes, real vLLM, no compiler."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
COMPILERS = re.compile(r"(^|-)(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|cpp|nvcc|icpx?)(-\d+)?$")
TIMEOUT_SECONDS = 400


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The environment of a machine without compilers: a PATH on which everything else is."""
    programs = tmp_path_factory.mktemp("bin")
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*"):
            link = programs / program.name
            if not COMPILERS.search(program.name) and not link.is_symlink():
                link.symlink_to(program)
    assert not (programs / "g++").exists()
    return {**os.environ, "PATH": str(programs)}


def drpo(*arguments):
    return [sys.executable, "-m", "drpo_lightning", *map(str, arguments)]


def fit_arguments(folder, *arguments):
    logger = "--trainer.logger.init_args"
    where = (f"{logger}.save_dir={folder}", f"{logger}.name=run", f"--trainer.default_root_dir={folder}")
    return ("fit", "--config=configs/quickstart.yaml", *where, "--trainer.accelerator=cpu", *arguments)


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    """The quickstart, three rollouts long: its log folder, what it printed, and the time at which it was started."""
    folder = tmp_path_factory.mktemp("a run")
    started = time.time()
    command = drpo(*fit_arguments(folder, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=3"))
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "run" / "version_0", result.stdout + result.stderr, started


def test_the_first_update_comes_within_a_minute(finished):
    folder, _, started = finished
    events = EventAccumulator(str(folder))
    events.Reload()
    first = events.Scalars("optim/loss")[0]
    assert first.step == 1
    assert first.wall_time - started < 60


def test_the_run_says_its_regime_its_batches_and_its_result(finished):
    folder, printed, _ = finished
    assert "DRPO(delta=0.2): trust-region regime" in printed
    assert "64 prompts x 8 samples = 512 completions -> 4 updates of 128" in printed
    before, after = map(float, re.search(r"held-out pass@1: (\S+) before -> (\S+) after", printed).groups())
    assert 0.2 < before < 0.4 < after
    for line in (f"logs:    {folder}", f"policy:  {folder}/policy", f"tensorboard --logdir '{folder.parent}'"):
        assert line in printed


def test_the_dashboard_has_its_charts_histograms_and_samples(finished):
    events = EventAccumulator(str(finished[0]))
    events.Reload()
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["val/pass@1"] == [0, 12]
    assert scalars["reward/mean"] == [0, 4, 8]
    assert scalars["policy_shift/abs_mean"] == list(range(1, 13))
    assert {"histogram/grad_weight", "histogram/probability_shift", "histogram/log_ratio"} <= set(
        events.Tags()["histograms"]
    )
    assert "completions/text_summary" in events.Tags()["tensors"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_the_first_update_sees_only_the_mismatch_of_two_engines(finished):
    events = EventAccumulator(str(finished[0]))
    events.Reload()
    shift = {event.step: event.value for event in events.Scalars("policy_shift/abs_max")}
    assert all(shift[step] < 1e-4 for step in (1, 5, 9)), "pi = mu on the weights that sampled"
    assert all(shift[step] > 1e-3 for step in (2, 3, 4, 6, 7, 8))
    assert all(event.value < 1e-4 for event in events.Scalars("sync/probe_logprob_diff"))


def test_the_exported_policy_loads_in_transformers_and_vllm_and_scores_the_same(finished, environment, tmp_path):
    folder, printed, _ = finished
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    original = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "arithmetic")
    assert not torch.equal(policy.model.norm.weight, original.model.norm.weight)
    assert AutoTokenizer.from_pretrained(folder / "policy")("1+2=").input_ids == [20, 14, 21, 32]
    command = drpo("validate", "--config=configs/quickstart.yaml", f"--model.model={folder / 'policy'}")
    command += [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    after = float(re.search(r"held-out pass@1: \S+ before -> (\S+) after", printed).group(1))
    assert float(re.search(r"^ *all +\d+ +(\S+)", result.stdout, re.MULTILINE).group(1)) == pytest.approx(
        after, abs=1e-3
    )


def test_a_checkpoint_is_exported_as_the_same_policy(finished, tmp_path):
    folder, *_ = finished
    command = drpo("export", "--ckpt", folder / "checkpoints" / "last.ckpt", "--out", tmp_path / "policy")
    subprocess.run(command, cwd=ROOT, check=True, timeout=TIMEOUT_SECONDS, capture_output=True)
    ours, exported = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "policy", folder / "policy")
    )
    assert ours.keys() == exported.keys()
    assert all(torch.equal(ours[name], exported[name]) for name in ours)


def test_exporting_what_is_no_checkpoint_says_so(tmp_path):
    command = drpo("export", "--ckpt", tmp_path / "nothing.ckpt", "--out", tmp_path / "policy")
    result = subprocess.run(command, cwd=ROOT, check=False, timeout=TIMEOUT_SECONDS, capture_output=True, text=True)
    assert result.returncode == 2
    assert "nothing.ckpt' is no file" in result.stderr


def children(pid):
    """Processes below one, by a walk over /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {pid}


@pytest.mark.parametrize("engine_process", ["in_process", pytest.param("own", marks=pytest.mark.reliability)])
def test_ctrl_c_ends_the_engine_and_keeps_a_checkpoint(environment, tmp_path, engine_process):
    arguments = fit_arguments(
        tmp_path, "--trainer.max_epochs=1000", f"--data.engine.init_args.process={engine_process}"
    )
    log = tmp_path / "printed"
    with log.open("w") as output:
        run = subprocess.Popen(
            drpo(*arguments),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Tests that run in the background are started with Ctrl-C ignored, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while not re.search(r"(?m)^ +[3-9] +\d+", log.read_text()):
                assert run.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            started = children(run.pid)
            if engine_process == "own":
                assert started, "the engine's process"
            os.killpg(run.pid, signal.SIGINT)
            run.wait(timeout=60)
        finally:
            run.kill()
            run.wait(timeout=30)
    deadline = time.monotonic() + 20
    while (alive := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive, "processes of the run are left"
    assert (tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt").is_file(), log.read_text()[-3000:]


@pytest.mark.reliability
def test_two_ranks_have_an_engine_each(environment, tmp_path):
    arguments = fit_arguments(
        tmp_path, "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=2", "--data.num_prompts=8"
    )
    result = subprocess.run(
        drpo(*arguments),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    events = EventAccumulator(str(tmp_path / "run" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("sync/probe_logprob_diff")] == [0, 4]
    assert all(event.value < 1e-4 for event in events.Scalars("sync/probe_logprob_diff"))
    shift = {event.step: event.value for event in events.Scalars("policy_shift/abs_max")}
    assert shift[1] < 1e-4
    assert shift[5] < 1e-4


REWARDS = """
import os

from drpo_lightning.callbacks import RewardCallback


class EvenSum(RewardCallback):
    def score(self, batch):
        return [float(text.isdigit() and int(text) % 2 == 0) for text in batch.completions]


class FailsOnOneRank(RewardCallback):
    def score(self, batch):
        if os.environ.get("LOCAL_RANK") == "1":
            raise LookupError("no such answer")
        return [0.0] * len(batch.completions)
"""


@pytest.fixture
def user_folder(tmp_path):
    """A working directory of a user's, with rewards of their own."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path


def user_run(folder, environment, *arguments):
    small = ("--trainer.max_epochs=1", "--data.num_prompts=8", "--trainer.accelerator=cpu")
    engine = "--data.engine=drpo_lightning.rollout.TransformersEngine"
    config = f"--config={ROOT / 'configs' / 'quickstart.yaml'}"
    command = [Path(sys.executable).parent / "drpo", "fit", config, *small, engine]
    command += [f"--model.model={ROOT / 'models' / 'arithmetic'}", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_reward_in_the_working_directory_is_found_by_the_command(user_folder, environment):
    result = user_run(user_folder, environment, "--trainer.callbacks+=my_rewards.EvenSum")
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_reward_that_fails_on_one_rank_ends_all(user_folder, environment):
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks+=my_rewards.FailsOnOneRank")
    result = user_run(user_folder, environment, *ranks)
    assert result.returncode != 0
    assert "reward 'failsononerank' raised LookupError('no such answer')" in result.stderr


def test_fsdp2_with_default_sizes_is_refused(user_folder, environment):
    strategy = "--trainer.strategy={class_path: ModelParallelStrategy}"
    result = user_run(user_folder, environment, "--trainer.devices=2", strategy)
    assert result.returncode != 0
    assert "set its init_args to data_parallel_size: 2, tensor_parallel_size: 1" in result.stderr
