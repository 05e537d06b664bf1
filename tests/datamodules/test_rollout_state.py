"""Rollouts in checkpoints: dealt out to other ranks whole, with every field that a rollout has."""

from dataclasses import fields

import pytest
import torch

from drpo_lightning.batch import Completion, Rollout
from drpo_lightning.datamodules.rollout_state import dealt_out, rollout_from_state, rollout_to_state

GROUP = 2
VALUES = {
    "list[str]": str,
    "list[str | None]": str,
    "list[int]": lambda sample: sample,
    "list[list[int]]": lambda sample: [sample, sample * 10],
    "list[list[float]]": lambda sample: [sample / 2, -1.0],
}
"""A sample's entry in a list of some type."""

OF_ALL_SAMPLES = {"group_size": GROUP, "weights_version": 7, "masks_truncated": True, "columns": {}}


def values_of(field, samples):
    """A value for any field of a rollout, which tells one sample from the other; an unknown kind of field fails."""
    kind = str(field.type).removesuffix(" | None").removeprefix("<class '").removesuffix("'>")
    if field.name == "completions":
        return [
            Completion([s, s + 1], [-0.5 * s, -1.0], "stop", torch.full((2, 3), s), torch.full((2, 3), -1.0 * s))
            for s in samples
        ]
    if field.name in OF_ALL_SAMPLES:
        return OF_ALL_SAMPLES[field.name]
    if kind.startswith("dict") and "Bool" in kind:
        return {"one": torch.tensor(samples) % 2 == 0, "two": torch.tensor(samples) % 3 == 0}
    if kind.startswith("dict"):
        return {"one": torch.tensor(samples) * 1.0, "two": torch.tensor(samples) * 2.0}
    if "Tensor" in kind or "Float" in kind:
        return torch.tensor(samples) * 0.5
    assert kind in VALUES, f"what kind of field is {field.name}: {kind}?"
    return [VALUES[kind](s) for s in samples]


def rollout_of(samples):
    return Rollout(**{field.name: values_of(field, samples) for field in fields(Rollout)})


def assert_equal(ours, theirs, path="rollout"):
    assert type(ours) is type(theirs), path
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, path
        assert torch.equal(ours, theirs), path
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        for name in ours:
            assert_equal(ours[name], theirs[name], f"{path}.{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), path
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{path}[{i}]")
    elif isinstance(ours, Rollout | Completion):
        assert_equal(vars(ours), vars(theirs), path)
    else:
        assert ours == theirs, path


@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("present", [1, 2, 4])
def test_whole_prompts_go_to_the_ranks_in_order_with_every_field(tmp_path, saved, present):
    samples = list(range(16))
    states = [rollout_to_state(rollout_of(samples[16 // saved * r : 16 // saved * (r + 1)])) for r in range(saved)]
    torch.save(states, tmp_path / "states.pt")
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    for rank in range(present):
        part = rollout_from_state(dealt_out(states, rank=rank, num_ranks=present))
        assert_equal(part, rollout_of(samples[16 // present * rank : 16 // present * (rank + 1)]))
        assert len(part) % GROUP == 0


def test_what_was_not_computed_is_none_on_the_other_ranks_too():
    rollout = rollout_of([0, 1])
    rollout.proximal_logprobs = None
    states = [rollout_to_state(rollout)] * 2
    assert rollout_from_state(dealt_out(states, rank=0, num_ranks=1)).proximal_logprobs is None
