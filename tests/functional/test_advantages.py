"""Advantages of the samples of one prompt."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import ADVANTAGES, group_advantages


def test_advantages_worked_by_hand():
    rewards = torch.tensor([3.0, 0.0, 0.0, 1.0, 2.0, 3.0])
    mean = group_advantages(rewards, 3)
    torch.testing.assert_close(mean, torch.tensor([2.0, -1.0, -1.0, -1.0, 0.0, 1.0]))
    left_out = group_advantages(rewards, 3, kind="leave_one_out")
    torch.testing.assert_close(left_out, torch.tensor([3.0, -1.5, -1.5, -1.5, 0.0, 1.5]))
    scaled = group_advantages(rewards, 3, kind="group_mean_std")
    # the standard deviations with n - 1 are sqrt(3) and 1
    torch.testing.assert_close(scaled, torch.tensor([2 / 3**0.5, -(3**-0.5), -(3**-0.5), -1.0, 0.0, 1.0]))


def test_default_is_the_group_mean():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert torch.equal(group_advantages(rewards, 4), group_advantages(rewards, 4, kind="group_mean"))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 4), size=st.integers(2, 8))
def test_advantages_equal_a_python_reference(seed, groups, size):
    rewards = torch.randn(groups * size, generator=torch.Generator().manual_seed(seed))
    got = {kind: group_advantages(rewards, size, kind=kind).tolist() for kind in ADVANTAGES}
    for i, reward in enumerate(rewards.tolist()):
        start = i // size * size
        group = rewards.tolist()[start : start + size]
        others = [group[j] for j in range(size) if j != i - start]
        centred = reward - statistics.fmean(group)
        assert got["group_mean"][i] == pytest.approx(centred, abs=1e-5)
        assert got["leave_one_out"][i] == pytest.approx(reward - statistics.fmean(others), abs=1e-5)
        assert got["group_mean_std"][i] == pytest.approx(centred / (statistics.stdev(group) + 1e-6), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 1 / 3, -0.7, 1e-3, 1e6 + 0.1])
def test_equal_rewards_have_advantage_zero_exactly(kind, reward):
    for size in range(2, 17):
        assert (group_advantages(torch.full((3 * size,), reward), size, kind=kind) == 0).all()


def test_the_mean_of_equal_rewards_does_round():
    # Without this the test above would say nothing of the guard in `group_advantages`.
    raw = [ADVANTAGES["group_mean_std"](torch.full((1, size), 0.1)).abs().max().item() for size in range(2, 17)]
    assert max(raw) > 1e-3


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_an_equal_group_leaves_its_neighbours_alone(kind):
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.1, 0.1, 0.1, 2.0, 4.0, 3.0])
    got = group_advantages(rewards, 3, kind=kind)
    alone = [group_advantages(rewards[i : i + 3], 3, kind=kind) for i in (0, 3, 6)]
    assert torch.equal(got, torch.cat(alone))
    assert got[3:6].eq(0).all()
    assert got[:3].ne(0).sum() == 2


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_constant(kind):
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    got = group_advantages(rewards, 4, kind=kind)
    torch.testing.assert_close(got.view(-1, 4).sum(dim=1), torch.zeros(6), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(group_advantages(rewards + 8, 4, kind=kind), got, rtol=1e-4, atol=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 4), size=st.integers(2, 6))
def test_a_dropped_sample_is_left_out_of_its_group(seed, groups, size):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (groups * size,), generator=generator).float()
    rewards[torch.rand(groups * size, generator=generator) < 0.4] = math.nan
    for kind in ADVANTAGES:
        got = group_advantages(rewards, size, kind=kind).tolist()
        for start in range(0, groups * size, size):
            places = [i for i in range(start, start + size) if not math.isnan(rewards[i])]
            for i in set(range(start, start + size)) - set(places):
                assert math.isnan(got[i])
            kept = rewards[places]
            alone = group_advantages(kept, len(places), kind=kind).tolist() if len(places) > 1 else [0.0] * len(places)
            assert [got[i] for i in places] == alone


def test_bad_settings_raise():
    with pytest.raises(ValueError, match=r"`kind` must be one of \['group_mean', .*\], got 'mean'"):
        group_advantages(torch.ones(4), 2, kind="mean")
    with pytest.raises(ValueError, match=r"`group_size` must be at least 2 for group advantages, got 1"):
        group_advantages(torch.ones(4), 1)
    with pytest.raises(ValueError, match=r"`rewards` must hold whole groups of 3, got 4 rewards"):
        group_advantages(torch.ones(4), 3)
