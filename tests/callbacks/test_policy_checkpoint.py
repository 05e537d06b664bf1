"""Folders of shards: two ranks save them, one replaces them, and a Ctrl-C leaves a whole one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from drpo_lightning.callbacks import PolicyCheckpoint
from drpo_lightning.export import export_checkpoint, read_checkpoint

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120
CONFIG = """
trainer:
  accelerator: cpu
  devices: 2
  strategy:
    class_path: lightning.pytorch.strategies.ModelParallelStrategy
    init_args: {data_parallel_size: 2, tensor_parallel_size: 1, process_group_backend: gloo}
  max_epochs: 2
  logger: false
  callbacks:
    - class_path: drpo_lightning.callbacks.ExactMatchReward
    - class_path: drpo_lightning.callbacks.ExportPolicy
    - class_path: drpo_lightning.callbacks.PolicyCheckpoint
model:
  model: models/arithmetic
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  engine: drpo_lightning.rollout.TransformersEngine
  prompts: drpo_lightning.datamodules.ArithmeticPrompts
  num_prompts: 4
  group_size: 4
  num_updates: 2
  sampling: {max_tokens: 4}
"""


def command(folder, *arguments):
    (folder / "config.yaml").write_text(CONFIG)
    where = (f"--config={folder / 'config.yaml'}", f"--trainer.default_root_dir={folder}")
    return [sys.executable, "-m", "drpo_lightning", "fit", *where, *arguments]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two rollouts on two ranks."""
    folder = tmp_path_factory.mktemp("finished")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command(folder), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "overwriting" not in result.stderr
    return folder


def test_the_newest_checkpoint_is_kept_and_the_last_is_a_link_to_it(finished):
    checkpoints = finished / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["epoch=1-step=4.ckpt", "last.ckpt"]
    assert (checkpoints / "last.ckpt").readlink() == Path("epoch=1-step=4.ckpt")
    shards = {path.name for path in (checkpoints / "last.ckpt").iterdir()}
    assert shards == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp", "checksums.json"}


def test_the_shards_of_two_ranks_are_exported_as_the_run_itself_has_exported(finished, tmp_path):
    export_checkpoint(finished / "checkpoints" / "last.ckpt", tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, finished / "policy"))
    before = load_file(ROOT / "models" / "arithmetic" / "model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys(), "the tied head is written once"
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["model.norm.weight"], before["model.norm.weight"])


@pytest.fixture
def single_rank():
    """FSDP2 on one rank, in this process."""
    yield ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_one_rank_goes_on_and_leaves_no_shards_of_two(finished, make_run, make_recorder, single_rank, tmp_path):
    last = tmp_path / "last.ckpt"
    shutil.copytree(finished / "checkpoints" / "last.ckpt", last)
    (tmp_path / "link.ckpt").symlink_to(last)
    saved, loaded = read_checkpoint(last).weights, {}

    checkpoint = PolicyCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0, enable_version_counter=False)
    recorder = make_recorder()
    recorder.on_train_start = lambda trainer, module: loaded.update(
        {name: tensor.clone() for name, tensor in module.named_weights()}
    )
    trainer = {"strategy": single_rank, "max_epochs": 3, "enable_checkpointing": True}
    run = make_run(recorder, checkpoint, trainer=trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(is not empty|dirpath has changed|changed since the checkpoint)")
        run.fit(ckpt_path=tmp_path / "link.ckpt")
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert {path.name for path in last.iterdir()} == {".metadata", "meta.pt", "__0_0.distcp", "checksums.json"}
    trained = dict(run.module.named_weights())
    assert all(torch.equal(tensor, trained[name]) for name, tensor in read_checkpoint(last).weights.items())


def rank_1(pid):
    """The process that the launcher has started for rank 1."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise LookupError(f"process {pid} has no rank 1")


@pytest.mark.reliability
def test_an_interrupt_of_one_rank_ends_both_with_a_checkpoint(finished, tmp_path):
    log = tmp_path / "printed"
    resume = f"--ckpt_path={finished / 'checkpoints' / 'last.ckpt'}"
    with log.open("w") as output:
        run = subprocess.Popen(
            command(tmp_path, "--trainer.max_epochs=1000", resume),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
            # Tests that run in the background are started with Ctrl-C ignored, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while not re.search(r"(?m)^ +[4-9] +\d+", log.read_text()):
                assert run.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            os.kill(rank_1(run.pid), signal.SIGINT)
            run.wait(timeout=60)
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            run.wait(timeout=30)
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    assert log.read_text().count("with `--ckpt_path last` goes on from it") == 1, "one rank says so"
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last / "meta.pt", weights_only=True)["global_step"] >= 6
    read_checkpoint(last)


def test_a_second_one_is_refused(make_run, tmp_path):
    callbacks = [PolicyCheckpoint(dirpath=tmp_path, monitor=name) for name in (None, "reward/mean")]
    with pytest.raises(ValueError, match=r"has two `PolicyCheckpoint`s.*ModelCheckpoint for a second rule"):
        make_run(*callbacks, trainer={"enable_checkpointing": True}).fit()
