"""A step of ours against a step of TRL's GRPOTrainer, in turn, on the same machine and work.

    python -m venv .venv-trl && .venv-trl/bin/pip install "trl>=1.16,<1.17"   # once; with vLLM: "trl[vllm]>=1.16,<1.17"
    python benchmarks/step.py --preset quickstart --trl-python .venv-trl/bin/python

Each side is a process of its own, in its own environment, which does nothing until it is asked for a step; they are
asked in turn. Where both do not fit on the device together, `--alternate runs` starts each anew for every turn, in
which it runs `--steps-per-turn` steps. A step is one rollout and its updates. Its phases: `sync`, bringing the weights
to the engine; `logprobs`, forward passes of the trainer before the updates; `generate`, all else until the first
update, with waking the engine, decoding and the reward; `update`, the rest. Without `--trl-python` our side runs alone.

    python benchmarks/step.py --preset quickstart-overlapped
    python benchmarks/step.py --preset quickstart --engine vllm --seeded-requests both

With `--max-staleness` our engine has a process of its own and samples rollouts ahead while the policy trains. Our side
then runs one after the other, too, and a second table shows how much each phase is slowed down.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from step_clock import Workload
from step_presets import DEFAULTS, PRESETS, make_prompts, make_random_llama, measured_limits
from step_tables import Step, check_equal_work, contention_table, table, uncontended_seconds, with_phases

HERE = Path(__file__).parent
OURS, ALONE, THEIRS = "drpo-lightning", "one after the other", "TRL"
"""Titles of the sides: ours as it is set, ours without sampling ahead, and TRL's."""
UNSEEDED = "not seeded"


class Side:
    """A process that runs a step each time that it is asked.

    Args:
        name: title of its column.
        python: interpreter of its environment.
        script: what it runs.
        workload: file of the `Workload`.
        log: file for what it prints.
        environment: environment variables.
        warmup: steps that it runs when it starts.
    """

    def __init__(
        self,
        name: str,
        python: str,
        script: str,
        *,
        workload: Path,
        log: Path,
        environment: dict[str, str],
        warmup: int,
    ) -> None:
        self.name = name
        self.versions: dict[str, str] = {}
        self._command = [python, str(HERE / script), str(workload)]
        self._log = log
        self._environment = environment
        self._warmup = warmup

    def __enter__(self) -> "Side":
        """Starts it, and lets it warm up."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
            )
        self.versions = self._answer()
        for _ in range(self._warmup):
            self.step()
        return self

    def step(self) -> Step:
        """Lets it run a step."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and so has no answer
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        return with_phases(self._answer())

    def _answer(self) -> Any:  # noqa: ANN401
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended:\n{self._log.read_text()[-5000:]}")
        return json.loads(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it; after its last step it ends by itself."""
        self._process.communicate()


def measure(sides: Sequence[Side], *, turns: int, steps_per_turn: int, keep_alive: bool) -> dict[str, list[Step]]:
    """Steps of each side, one side at a time and in turn.

    Args:
        sides: which sides.
        turns: of each side.
        steps_per_turn: steps that a side runs one after the other.
        keep_alive: True starts each side once, and False for every turn anew.
    """
    steps: dict[str, list[Step]] = {side.name: [] for side in sides}
    with ExitStack() as stack:
        if keep_alive:
            for side in sides:
                stack.enter_context(side)
        for side in [*sides] * turns:
            with nullcontext() if keep_alive else side:
                steps[side.name] += [side.step() for _ in range(steps_per_turn)]
    return steps


def machine_name(device: str) -> str:
    """The processor, or the GPU."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings; those that are not given come from the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quickstart")
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL 1.16")
    parser.add_argument("--turns", type=int, help="turns of each side")
    parser.add_argument("--steps-per-turn", type=int)
    parser.add_argument("--warmup", type=int, help="steps that are left out after each start")
    parser.add_argument("--alternate", choices=["steps", "runs"], help="whether each turn is a step or a new process")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on a CPU")
    parser.add_argument("--out", type=Path, help="file for all seconds, counts and versions as JSON")
    parser.add_argument("--model", help="folder of the model")
    parser.add_argument("--template", help="text of a prompt with {a} and {b}")
    parser.add_argument("--num-prompts", type=int)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--num-updates", type=int, help="per step")
    parser.add_argument("--num-micro-batches", type=int, help="per update")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--engine", choices=["transformers", "vllm"])
    parser.add_argument("--max-staleness", type=int, help="rollouts that our engine samples ahead; 0 is none")
    parser.add_argument(
        "--seeded-requests", choices=["on", "off", "both"], help="our `data.seeded_requests`; `both` compares them"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--recompute-logprobs", action="store_true", help="TRL's default with vLLM: a forward pass more"
    )
    parser.add_argument("--gpu-memory-utilization", type=float, help="vLLM's share of the GPU")
    parser.add_argument("--max-model-len", type=int, default=512, help="most tokens of a sequence in vLLM")
    values = parser.parse_args(arguments)
    if values.max_staleness and values.alternate is None:
        values.alternate = "runs"
    for name, value in (DEFAULTS | PRESETS[values.preset]).items():
        if getattr(values, name) is None:
            setattr(values, name, value)
    check_comparison(values, parser)
    return values


def check_comparison(settings: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends with a message where what is asked for cannot be compared."""
    if settings.max_staleness and settings.engine != "vllm":
        parser.error(f"`--max-staleness` must be 0 with `--engine {settings.engine}`, got {settings.max_staleness}")
    if settings.max_staleness and settings.alternate != "runs":
        parser.error("`--alternate` must be `runs` with `--max-staleness`: the engine would sample in another's turn")
    if settings.seeded_requests == "both" and (settings.max_staleness or settings.trl_python):
        parser.error("`--seeded-requests both` must stand without `--max-staleness` and `--trl-python`")


def make_workload(settings: argparse.Namespace, folder: Path) -> Workload:
    """What a step is, with a model of random weights where the preset has none."""
    if settings.model is None:
        settings.model = str(folder / "model")
        make_random_llama(Path(settings.model))
    settings.prompts = make_prompts(settings.template, settings.num_prompts)
    turns = settings.turns if settings.alternate == "steps" else 1
    # The last rollouts of a run have none after them to sample ahead: they are not asked for.
    settings.num_steps = settings.warmup + turns * settings.steps_per_turn + settings.max_staleness
    settings.engine_process = "own" if settings.max_staleness else "in_process"
    values = {field.name: getattr(settings, field.name) for field in fields(Workload)}
    seeded = {"on": True, "both": True, "off": False, None: None}[settings.seeded_requests]
    return Workload(**values | {"seeded_requests": seeded})


def workloads(settings: argparse.Namespace, workload: Workload) -> dict[str, Workload]:
    """What each side of ours does: as it is set, and what that is compared with."""
    if settings.max_staleness:
        return {ALONE: replace(workload, max_staleness=0), OURS: workload}
    if settings.seeded_requests == "both":
        return {UNSEEDED: replace(workload, seeded_requests=False), "seeded": workload}
    return {OURS: workload}


def make_sides(settings: argparse.Namespace, ours: Mapping[str, Workload], folder: Path) -> list[Side]:
    """Those of ours, and TRL's if there is an environment for it."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(settings.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # or the side that waits would take a core
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    of_ours = environment | {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.getenv("PYTHONPATH")]))}
    of_theirs = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    sides = [(name, sys.executable, "step_drpo.py", of_ours, workload) for name, workload in ours.items()]
    if settings.trl_python:
        sides.append((THEIRS, settings.trl_python, "step_trl.py", of_theirs, [*ours.values()][-1]))
    return [
        Side(
            name,
            python,
            script,
            workload=write_workload(workload, folder / f"{number}.json"),
            log=folder / f"{number}.log",
            environment=variables,
            warmup=settings.warmup,
        )
        for number, (name, python, script, variables, workload) in enumerate(sides)
    ]


def write_workload(workload: Workload, path: Path) -> Path:
    """Writes it for a side, and gives the path."""
    path.write_text(json.dumps(asdict(workload)))
    return path


def order(sides: Sequence[Side], settings: argparse.Namespace) -> str:
    """In which order the steps were taken, in words."""
    names = ", ".join(side.name for side in sides)
    if settings.alternate == "steps":
        return f"each turn {settings.steps_per_turn} step(s) of: {names}; {settings.turns} turns"
    return (
        f"each turn a process of: {names}, one after the other, each with {settings.warmup} + "
        f"{settings.steps_per_turn} steps; {settings.turns} turn(s)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints the tables."""
    settings = parse_arguments(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workload = make_workload(settings, folder)
        ours = workloads(settings, workload)
        sides = make_sides(settings, ours, folder)
        steps = measure(
            sides,
            turns=settings.turns,
            steps_per_turn=settings.steps_per_turn,
            keep_alive=settings.alternate == "steps",
        )
        counts = check_equal_work(steps)
        limits = measured_limits(workload, int(counts["prompt_tokens"]))
    print(f"{machine_name(settings.device)}, {settings.threads} thread(s), {settings.precision}, {settings.engine}")
    print(f"{settings.num_prompts} prompts x {settings.group_size} samples x {settings.max_tokens} tokens; every step:")
    print(", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items()))
    for side in sides:
        print(f"{side.name}: {', '.join(f'{name} {number}' for name, number in side.versions.items())}")
    print(order(sides, settings))
    print(
        f"large products {limits.machine['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, "
        f"large copies {limits.machine['copied_bytes_per_second'] / 1e9:.1f} GB/s; "
        f"median (least to largest) of {settings.turns * settings.steps_per_turn} steps\n"
    )
    print(table({name: of_side for name, of_side in steps.items() if name != ALONE}, limits))
    if ALONE in steps:
        print(f"\n{contention_table(steps[ALONE], steps[OURS])}\n")
        print(f"a step would take {uncontended_seconds(steps[ALONE]):.3g} s if neither slowed the other down")
    if settings.out:
        versions = {side.name: side.versions for side in sides}
        report = {"workload": asdict(workload), "versions": versions, "machine": machine_name(settings.device)}
        settings.out.write_text(json.dumps(report | {"limits": limits._asdict(), "steps": steps}, indent=1))


if __name__ == "__main__":
    main()
