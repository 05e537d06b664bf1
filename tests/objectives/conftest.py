"""The objectives and the tokens that their tests share."""

from typing import NamedTuple

import jaxtyping
import pytest
import torch

from drpo_lightning.objectives import DPPO, DRPO, ClippedRatio, Unregularized

OBJECTIVES = {
    "drpo_trust_region": DRPO(0.2),
    "drpo_reweighting": DRPO(12.5),
    "dppo_tv": DPPO("binary_tv"),
    "dppo_kl": DPPO("binary_kl"),
    "clipped_ratio": ClippedRatio(),
    "unregularized": Unregularized(),
}


class Tokens(NamedTuple):
    policy_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    completion_mask: torch.Tensor


def random_tokens(seed, shape=(6, 9)):
    """On-policy, near, far and beyond-the-clamp tokens; probabilities up to 1; A of both signs and 0; a mask."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    rollout = torch.where(uniform(0, 1) < 0.5, uniform(-1, 0), uniform(-12, 0))
    spread = torch.tensor([0.0, 0.01, 0.3, 3.0, 15.0])[torch.randint(5, shape, generator=generator)]
    policy = (rollout + spread * torch.randn(shape, generator=generator)).clamp(max=0.0)
    far = uniform(0, 1)
    policy = torch.where(far < 0.05, rollout - uniform(20.5, 90), policy)
    policy, rollout = torch.where(far > 0.95, rollout, policy), torch.where(far > 0.95, policy - 40, rollout)
    advantages = (
        torch.randn(shape, generator=generator)
        * torch.tensor([0.0, 1e-3, 1.0, 1.0, 50.0])[torch.randint(5, shape, generator=generator)]
    )
    return Tokens(policy, rollout, advantages, uniform(0, 1) < 0.7)


@pytest.fixture(scope="session", params=OBJECTIVES.values(), ids=OBJECTIVES.keys())
def objective(request):
    return request.param


@pytest.fixture(scope="session")
def make_tokens():
    return random_tokens


@pytest.fixture(scope="session")
def evaluate():
    """The output on one token as Python numbers, with the gradient of the objective as `grad`."""

    def on_one_token(objective, policy, rollout, advantage):
        logprobs = torch.tensor([policy], requires_grad=True)
        output = objective(logprobs, torch.tensor([rollout]), torch.tensor([advantage]), torch.tensor([True]))
        output.loss.sum().backward()
        values = {name: value.item() for name, value in output._asdict().items() if value is not None}
        return values | {"grad": -logprobs.grad.item()}

    return on_one_token


@pytest.fixture
def unchecked_hints(monkeypatch):
    """The package as a user runs it: types of arguments are not checked by the test runner."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
