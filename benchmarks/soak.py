"""What a long run takes of the machine as it goes on: memory, file handles, threads, processes, and space on the disk.

    python benchmarks/soak.py --minutes 60

The quickstart's model is trained with all that the package starts: vLLM in a process of its own, a reward in worker
processes, every diagnostic, TensorBoard, checkpoints and exports. Every ten seconds the trainer and all processes below
it are counted. The first sixth of the time is warm-up; growth is the median of the last sixth against that of the
second. It exits with 1 if memory grows by more than 2 %, or anything else that should stay at all.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import psutil
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from PIL import Image

from drpo_lightning.batch import Rollout
from drpo_lightning.rollout.hooks import RolloutHooks

ROOT = Path(__file__).parent.parent
MIB = 2**20
MEMORY_GROWTH = 0.02
"""Part of the memory by which it may differ from the second sixth to the last: allocators do not stand still."""
EXTRA = """
trainer:
  max_epochs: -1
  check_val_every_n_epoch: 50
  enable_progress_bar: false
data:
  engine:
    init_args: {process: own, kv_cache_gib: 0.25}
model:
  optimizer:
    init_args: {lr: 1.0e-9}
"""
"""A KV cache on a CPU takes memory as its blocks are first used: a small one is in use as a whole sooner.

The policy does not move: after 200 rollouts it would be sure of every token, and the guardrail would end the run.
"""
ROLLOUTS = "rollouts"
"""File in the log folder that holds how many there were."""
REWARD = {
    "class_path": "drpo_lightning.callbacks.IsolatedReward",
    "init_args": {
        "reward": {"class_path": "drpo_lightning.callbacks.ExactMatchReward", "init_args": {"name": "isolated"}}
    },
}


class Sample(NamedTuple):
    """What the processes of a run hold at one moment.

    Attributes:
        seconds: since the start.
        trainer_mib: memory of the trainer that no other process shares.
        engine_mib: the same of the largest process below it.
        others_mib: the same of all others.
        handles: open files, sockets and pipes.
        threads: of all processes.
        processes: the trainer and all below it.
        shared_mib: files in shared memory that any of them has mapped.
        events_mib: TensorBoard's files.
        rollouts: made so far.
    """

    seconds: float
    trainer_mib: float
    engine_mib: float
    others_mib: float
    handles: int
    threads: int
    processes: int
    shared_mib: float
    events_mib: float
    rollouts: int


TITLES = {
    "trainer_mib": "memory of the trainer, MiB",
    "engine_mib": "memory of the engine, MiB",
    "others_mib": "memory of the reward's processes, MiB",
    "handles": "open files, sockets and pipes",
    "threads": "threads",
    "processes": "processes",
    "shared_mib": "shared memory, MiB",
    "events_kib_per_rollout": "TensorBoard, KiB per rollout",
    "seconds_per_rollout": "seconds per rollout",
}


def folder_bytes(folder: Path, pattern: str) -> int:
    """Size of all files that match; one that goes away meanwhile has none."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


class CountRollouts(Callback, RolloutHooks):
    """Notes in a file how many rollouts there were."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:  # noqa: ARG002
        """Writes beside and renames: it is read at any moment."""
        beside = self.path.with_suffix(".new")
        beside.write_text(str(trainer.datamodule.iteration))  # type: ignore[attr-defined]
        beside.replace(self.path)


def take(process: psutil.Process, logs: Path, started: float) -> Sample:
    """Counts what the run holds now.

    Raises:
        psutil.NoSuchProcess: if the trainer has ended.
    """
    family = [process, *process.children(recursive=True)]
    memory, handles, threads, alive = [], 0, 0, 0
    shared: set[str] = set()
    for member in family:
        try:
            with member.oneshot():
                memory.append(member.memory_full_info().uss)
                handles += member.num_fds()
                threads += member.num_threads()
                shared |= {m.path for m in member.memory_maps() if m.path.startswith("/dev/shm/")}
                alive += 1
        except psutil.NoSuchProcess:
            if member is process:
                raise
    return Sample(
        time.monotonic() - started,
        memory[0] / MIB,
        max(memory[1:], default=0) / MIB,
        (sum(memory[1:]) - max(memory[1:], default=0)) / MIB,
        handles,
        threads,
        alive,
        sum(Path(path).stat().st_size for path in shared if Path(path).exists()) / MIB,
        folder_bytes(logs, "events.out.*") / MIB,
        int((logs / ROLLOUTS).read_text()) if (logs / ROLLOUTS).exists() else 0,
    )


def run(command: Sequence[str], logs: Path, seconds: float, interval: float) -> list[Sample]:
    """Runs the trainer for some time, ends it by SIGTERM, and gives what was counted.

    Raises:
        RuntimeError: if it ends before, or leaves a process behind.
    """
    samples: list[Sample] = []
    started = time.monotonic()
    with (logs / "output.log").open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as child:
        process = psutil.Process(child.pid)
        while time.monotonic() - started < seconds:
            time.sleep(interval)
            if child.poll() is not None:
                raise RuntimeError(f"the run ended with {child.returncode}; see {output.name}")
            samples.append(take(process, logs, started))
        family = process.children(recursive=True)
        child.send_signal(signal.SIGTERM)
        child.wait(timeout=300)
    if left := psutil.wait_procs(family, timeout=30)[1]:
        raise RuntimeError(f"left behind: {left}")
    return samples


def series(samples: Sequence[Sample]) -> dict[str, tuple[list[float], list[float]]]:
    """Minutes and values of everything in `TITLES`; what is per rollout is over a tenth of the time."""
    minutes = [sample.seconds / 60 for sample in samples]
    result = {
        name: (minutes, [float(getattr(sample, name)) for sample in samples])
        for name in TITLES
        if name in Sample._fields
    }
    span = max(1, len(samples) // 10)
    spans = [(a, b) for a, b in zip(samples, samples[span:], strict=False) if b.rollouts > a.rollouts]
    at = [b.seconds / 60 for _, b in spans]
    made = [b.rollouts - a.rollouts for a, b in spans]
    kib = [(b.events_mib - a.events_mib) * 1024 / n for (a, b), n in zip(spans, made, strict=True)]
    seconds = [(b.seconds - a.seconds) / n for (a, b), n in zip(spans, made, strict=True)]
    return result | {"events_kib_per_rollout": (at, kib), "seconds_per_rollout": (at, seconds)}


def sixth(minutes: Sequence[float], values: Sequence[float], number: int) -> float:
    """Median of a sixth of the time; NaN if nothing was counted in it."""
    end = max(minutes, default=0.0)
    chosen = [v for m, v in zip(minutes, values, strict=True) if number * end / 6 <= m <= (number + 1) * end / 6]
    return statistics.median(chosen or [math.nan])


def report(samples: Sequence[Sample]) -> bool:
    """Prints what grew, and says whether all that should stay has stayed."""
    print(f"{samples[-1].rollouts} rollouts in {samples[-1].seconds / 60:.0f} minutes")
    print(f"{'':38}{'2nd sixth':>12}{'last sixth':>12}{'growth':>9}")
    flat = True
    for name, (minutes, values) in series(samples).items():
        early, late = sixth(minutes, values, 1), sixth(minutes, values, 5)
        growth = late / early - 1 if early else float(late > 0)
        limit = MEMORY_GROWTH if name.endswith("mib") else 0.0
        is_flat = growth <= limit or name.endswith("per_rollout")
        flat &= is_flat
        print(f"{TITLES[name]:38}{early:12.2f}{late:12.2f}{growth:9.2%}{'' if is_flat else '  grows'}")
    return flat


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Everything counted against the minutes, as a PNG."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for panel, (name, (minutes, values)) in zip(
        figure.subplots(3, 3).flatten().tolist(), series(samples).items(), strict=True
    ):
        panel.plot(minutes, values, color="#0072B2", linewidth=1)
        panel.set_title(TITLES[name], fontsize=9)
        panel.set_ylim(0, max(values, default=0) * 1.15 or 1)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.supxlabel("minutes", fontsize=9)
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    Image.open(picture).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(path, optimize=True)


def command_of(logs: Path) -> list[str]:
    """The run, with its logs in a new folder."""
    logs.mkdir(parents=True)
    extra = logs / "soak.yaml"
    extra.write_text(EXTRA)
    count = {"class_path": "benchmarks.soak.CountRollouts", "init_args": {"path": str(logs / ROLLOUTS)}}
    return [
        *(sys.executable, "-m", "drpo_lightning", "fit", "--config=configs/quickstart.yaml", f"--config={extra}"),
        *(f"--trainer.logger.init_args.save_dir={logs}", f"--trainer.default_root_dir={logs}"),
        *(f"--trainer.callbacks+={json.dumps(callback)}" for callback in (REWARD, count)),
    ]


def main() -> int:
    """Runs, or reports on an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--interval", type=float, default=10.0, help="seconds")
    parser.add_argument("--logs", type=Path, default=Path("runs/soak"), help="the run's folder, which must be new")
    parser.add_argument("--samples", type=Path, default=Path("runs/soak.jsonl"), help="what was counted")
    parser.add_argument("--picture", type=Path, default=Path("runs/soak.png"))
    parser.add_argument("--report", action="store_true", help="of the samples that are there, without a run")
    arguments = parser.parse_args()
    if not arguments.report:
        samples = run(command_of(arguments.logs), arguments.logs, arguments.minutes * 60, arguments.interval)
        arguments.samples.parent.mkdir(parents=True, exist_ok=True)
        arguments.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    samples = [Sample(*json.loads(line)) for line in arguments.samples.read_text().splitlines()]
    flat = report(samples)
    draw(samples, arguments.picture)
    return 0 if flat else 1


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
