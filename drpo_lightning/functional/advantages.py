"""Advantages of the samples of one prompt, from their rewards."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

STD_EPSILON = 1e-6
"""Added to the standard deviation, in units of reward, so that a group of equal rewards has advantage 0."""


def group_mean(rewards: Float[Tensor, "groups samples"]) -> Float[Tensor, "groups samples"]:
    """`A = R - mean(R)` over the samples of a prompt. Source: Dr.GRPO, arXiv 2503.20783; DRPO's setting."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def group_mean_std(rewards: Float[Tensor, "groups samples"]) -> Float[Tensor, "groups samples"]:
    """`A = (R - mean(R)) / (std(R) + 1e-6)`, std with n - 1. Source: GRPO, arXiv 2402.03300."""
    return group_mean(rewards) / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)


def leave_one_out(rewards: Float[Tensor, "groups samples"]) -> Float[Tensor, "groups samples"]:
    """`A_i = R_i - mean of the other R_j = n / (n - 1) (R_i - mean(R))`. Source: RLOO, arXiv 2402.14740."""
    samples = rewards.shape[1]
    return group_mean(rewards) * (samples / (samples - 1))


ADVANTAGES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"group_mean": group_mean, "group_mean_std": group_mean_std, "leave_one_out": leave_one_out}
)


def group_advantages(
    rewards: Float[Tensor, " samples"], group_size: int, *, kind: str = "group_mean"
) -> Float[Tensor, " samples"]:
    """Advantage of each sample against the other samples of its prompt.

    A sample whose reward is NaN has been dropped: its group is compared without it.

    Args:
        rewards: reward of each sample; the `group_size` samples of one prompt stand next to each other.
        group_size: samples per prompt, at least 2.
        kind: `group_mean`, `group_mean_std` or `leave_one_out`.

    Returns:
        Advantages in the order of `rewards`; NaN where the reward is, and exactly 0 in a group whose other rewards are
        all equal, or that has only one.

    Raises:
        ValueError: if `kind` is unknown, `group_size` is below 2, or the number of rewards is no multiple of it.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"`kind` must be one of {sorted(ADVANTAGES)}, got {kind!r}")
    if group_size < 2:
        raise ValueError(f"`group_size` must be at least 2 for group advantages, got {group_size}")
    if len(rewards) % group_size:
        raise ValueError(f"`rewards` must hold whole groups of {group_size}, got {len(rewards)} rewards")
    groups = rewards.view(-1, group_size)
    advantages = _whole_group_advantages(groups, kind)
    dropped = groups.isnan()
    for group in dropped.any(dim=1).nonzero().flatten().tolist():
        kept = ~dropped[group]
        advantages[group] = torch.where(kept, 0.0, torch.nan)
        if kept.sum() > 1:
            advantages[group, kept] = _whole_group_advantages(groups[group, kept][None], kind)[0]
    return advantages.flatten()


def _whole_group_advantages(rewards: Float[Tensor, "groups samples"], kind: str) -> Float[Tensor, "groups samples"]:
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    # The mean of equal rewards can differ from them by a rounding error, which a division by std would blow up.
    return torch.where(equal, torch.zeros_like(rewards), ADVANTAGES[kind](rewards))
