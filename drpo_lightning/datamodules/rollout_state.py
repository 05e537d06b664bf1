"""The state of a rollout in a checkpoint: saved by each rank, and dealt out to however many there are later."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from drpo_lightning.batch import Completion, Rollout
from drpo_lightning.datamodules.rollout_parts import joined, selected
from drpo_lightning.errors import SettingError

RolloutState = dict[str, Any]
"""The fields of a `Rollout` by name."""


def rollout_to_state(rollout: Rollout) -> RolloutState:
    """A rollout as plain values, but for its columns: rewards are taken by now, and those may hold anything."""
    return {**asdict(rollout), "columns": {}}


def rollout_from_state(state: RolloutState) -> Rollout:
    """The rollout of `rollout_to_state`."""
    completions = [Completion(**completion) for completion in state["completions"]]
    return Rollout(**{**state, "completions": completions})


def dealt_out(states: Sequence[RolloutState], *, rank: int, num_ranks: int) -> RolloutState:
    """A rank's part of the rollouts of all ranks: the prompts of the whole are dealt out in the order of positions.

    Args:
        states: the rollout of each rank that was saved, in the order of ranks.
        rank: the rank that gets the part.
        num_ranks: how many get one; it divides the number of prompts.
    """
    if len(states) == num_ranks:
        return states[rank]
    whole = joined(states)
    in_order = sorted(range(len(whole["positions"])), key=whole["positions"].__getitem__)
    samples = len(in_order) // num_ranks
    return dict(selected(whole, in_order[rank * samples : (rank + 1) * samples]))


def check_same_split(saved: Mapping[str, int], present: Mapping[str, int]) -> None:
    """Raises `SettingError` if a rollout that is partly trained on would be split in another way now."""
    for name, value in saved.items():
        if present[name] != value:
            raise SettingError(
                f"`data.{name}` must be {value}, got {present[name]}: the checkpoint is in the middle of a rollout, "
                "which was split by it. Resume with that, or from a checkpoint between two rollouts"
            )
