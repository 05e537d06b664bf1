"""Rollouts put together and taken apart by samples."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, cat

from drpo_lightning.batch import Rollout


def joined(values: Sequence[Any]) -> Any:  # noqa: ANN401
    """Values of a field, or of all, in several rollouts as one: what has an entry per sample is put end to end."""
    first = values[0]
    if isinstance(first, Tensor):
        return cat(list(values))
    if isinstance(first, list):
        return [entry for value in values for entry in value]
    if isinstance(first, dict):
        return {name: joined([value[name] for value in values]) for name in first}
    return first


def selected(value: Any, samples: Sequence[int]) -> Any:  # noqa: ANN401
    """Some samples of a field's value, or of all fields'; a list that is empty is not filled yet, and stays so."""
    if isinstance(value, Tensor):
        return value[list(samples)]
    if isinstance(value, list):
        return [value[sample] for sample in samples] if value else []
    if isinstance(value, dict):
        return {name: selected(entry, samples) for name, entry in value.items()}
    return value


def with_groups(rollout: Rollout, groups: Sequence[int], fresh: Rollout) -> Rollout:
    """A rollout with other prompts, and their samples, in the place of some.

    Args:
        rollout: the rollout; is not changed.
        groups: numbers of its prompts that are replaced.
        fresh: as many prompts, with as many samples each.
    """
    size, first = rollout.group_size, len(rollout)
    samples = list(range(first))
    for i, group in enumerate(groups):
        samples[group * size : (group + 1) * size] = range(first + i * size, first + (i + 1) * size)
    return Rollout(**selected(joined([vars(rollout), vars(fresh)]), samples))
