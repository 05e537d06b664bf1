"""What `step.py` prints: the phases of a step side by side."""

import statistics
from collections.abc import Sequence

from step_presets import Limits

from drpo_lightning.callbacks.tensorboard import markdown_table

PHASES = ("generate", "sync", "logprobs", "update", "step")
CONTENTION = {
    "engine": "the engine samples",
    "waiting": "the trainer waits for samples",
    "sync": "sync",
    "update": "update",
    "step": "step",
}
Step = dict[str, dict[str, float]]
"""What a side answers: `seconds` of phases, and `counts`."""


def with_phases(step: Step) -> Step:
    """Splits the rollout and what is left of the step."""
    seconds = {"sync": 0.0, "logprobs": 0.0} | step["seconds"]
    rollout = seconds.pop("rollout")
    seconds["generate"] = rollout - seconds["sync"] - seconds["logprobs"]
    seconds["update"] = seconds["step"] - rollout
    return {"seconds": seconds, "counts": step["counts"]}


def check_equal_work(steps: dict[str, list[Step]]) -> dict[str, float]:
    """What every step of every side counts; raises `ValueError` if they differ."""
    counts = [step["counts"] for of_side in steps.values() for step in of_side]
    if any(other != counts[0] for other in counts):
        raise ValueError(f"the sides did different work: { ({n: s[0]['counts'] for n, s in steps.items()}) }")
    return counts[0]


def table(steps: dict[str, list[Step]], limits: Limits) -> str:
    """Median, least and largest seconds of each phase, the ratio of the medians, and the limit's share of them."""
    names = [*steps]
    ratio = [f"{names[1]} / {names[0]}"] if len(names) > 1 else []
    header = ["seconds", *names, *ratio, "limit", *(f"limit / {name}" for name in names)]
    rows = []
    for phase in PHASES:
        seconds = [[step["seconds"][phase] for step in of_side] for of_side in steps.values()]
        if any(map(any, seconds)):
            rows.append([phase, *phase_cells(seconds, limits.seconds.get(phase))])
    return markdown_table(header, rows)


def phase_cells(seconds: Sequence[Sequence[float]], limit: float | None) -> list[str]:
    """A row of the table, from the seconds of each side."""
    medians = [statistics.median(values) for values in seconds]
    cells = [with_spread(values) for values in seconds]
    if len(medians) > 1:
        cells.append(f"{medians[1] / medians[0]:.2f}" if all(medians) else "")
    shares = [f"{limit / median:.0%}" if limit and median else "" for median in medians]
    return [*cells, f"{limit:.3g}" if limit else "", *shares]


def with_spread(values: Sequence[float]) -> str:
    """Median, least and largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def contention_table(alone: Sequence[Step], overlapped: Sequence[Step]) -> str:
    """Each phase where it has the machine to itself, beside the same while engine and trainer work at once.

    What the engine takes it measures itself: the seconds in which it computes, of the samples of any rollout. One after
    the other, the trainer waits as long.

    Args:
        alone: steps one after the other.
        overlapped: steps of the same work, with rollouts sampled ahead.
    """
    rows = []
    for phase, title in CONTENTION.items():
        seconds = [[step["seconds"][phase] for step in steps] for steps in (alone, overlapped)]
        before, after = map(statistics.median, seconds)
        rows.append([title, *map(with_spread, seconds), f"{after / before:.2f}" if before else ""])
    return markdown_table(["seconds", "one after the other", "overlapped", "overlapped / alone"], rows)


def uncontended_seconds(alone: Sequence[Step]) -> float:
    """What an overlapped step would take if neither slowed the other: the longer of the trainer's and the engine's.

    Args:
        alone: steps one after the other.
    """
    medians = {name: statistics.median(step["seconds"][name] for step in alone) for name in CONTENTION}
    return max(medians["step"] - medians["waiting"], medians["engine"] + medians["sync"])
