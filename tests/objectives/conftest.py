"""The objectives and the tokens that their tests share."""

import math
from typing import NamedTuple

import jaxtyping
import pytest
import torch

from drpo_lightning.functional import TopKLogprobs
from drpo_lightning.objectives import (
    CISPO,
    DPPO,
    DRPO,
    GSPO,
    SAPO,
    SPO,
    ClippedRatio,
    Decoupled,
    DivergencePenalty,
    MaskDRPO,
    TopKDPPO,
    Unregularized,
)

OBJECTIVES = {
    "drpo_trust_region": DRPO(0.2),
    "drpo_reweighting": DRPO(12.5),
    "drpo_without_advantage": DRPO(0.2, scale_by_advantage=False),
    "mask_drpo": MaskDRPO(),
    "mask_drpo_corrective": MaskDRPO(delta=0.15, threshold=0.15),
    "spo": SPO(),
    "spo_tight": SPO(0.3),
    "dppo_tv": DPPO("binary_tv"),
    "dppo_kl": DPPO("binary_kl"),
    "topk_dppo_tv": TopKDPPO(4, "tv"),
    "topk_dppo_kl": TopKDPPO(4, "kl"),
    "clipped_ratio": ClippedRatio(),
    "cispo": CISPO(),
    "gspo": GSPO(0.3, 0.5),
    "sapo": SAPO(),
    "penalty_kl": DivergencePenalty("kl", 0.1),
    "penalty_k3": DivergencePenalty("k3", 0.1),
    "penalty_tv": DivergencePenalty("tv", 0.1),
    "penalty_kl_scaled": DivergencePenalty("kl", 0.1, scale_by_advantage=True),
    "penalty_k3_scaled": DivergencePenalty("k3", 0.1, scale_by_advantage=True),
    "penalty_tv_scaled": DivergencePenalty("tv", 0.1, scale_by_advantage=True),
    "decoupled_clipped_ratio": Decoupled(ClippedRatio()),
    "decoupled_drpo": Decoupled(DRPO(0.2)),
    "decoupled_gspo": Decoupled(GSPO(0.3, 0.5)),
    "decoupled_truncated": Decoupled(DRPO(0.2), max_ratio=1.5),
    "unregularized": Unregularized(),
}
NUM_TOPK = 4


class Tokens(NamedTuple):
    policy_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    completion_mask: torch.Tensor
    sequence_ids: torch.Tensor
    proximal_logprobs: torch.Tensor
    topk: TopKLogprobs

    def under(self, objective):
        """What an objective says of these tokens."""
        return objective(**self._asdict())

    def under_with_gradient(self, objective):
        """The same, and the gradient of the summed loss in log pi."""
        policy = self.policy_logprobs.clone().requires_grad_()
        output = self._replace(policy_logprobs=policy).under(objective)
        output.loss.sum().backward()
        return output, policy.grad

    def map(self, function):
        """The tokens with a function applied to every tensor; the top K have one more axis at the end."""
        return Tokens(*map(function, self[:-1]), TopKLogprobs(*map(function, self.topk)))

    def completion_tokens(self):
        """Index, log pi, log mu and A of each completion token, as Python numbers."""
        return [
            (tuple(i), *(tensor[tuple(i)].item() for tensor in self[:3]))
            for i in self.completion_mask.nonzero().tolist()
        ]


def random_tokens(seed, shape=(6, 9)):
    """On-policy, near, far and beyond-the-clamp tokens; probabilities up to 1; A of both signs and 0; a mask.

    Each row is a sequence. pi_prox is near mu, or on the other side of pi, or beyond the clamp. The sampled token is
    among the top K at every other place.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    def normal(*deviations):
        deviation = torch.tensor(deviations)[torch.randint(len(deviations), shape, generator=generator)]
        return deviation * torch.randn(shape, generator=generator)

    rollout = torch.where(uniform(0, 1) < 0.5, uniform(-1, 0), uniform(-12, 0))
    policy = (rollout + normal(0.0, 0.01, 0.3, 3.0, 15.0)).clamp(max=0.0)
    far = uniform(0, 1)
    policy = torch.where(far < 0.05, rollout - uniform(20.5, 90), policy)
    policy, rollout = torch.where(far > 0.95, rollout, policy), torch.where(far > 0.95, policy - 40, rollout)
    advantages = normal(0.0, 1e-3, 1.0, 1.0, 50.0)
    mask = uniform(0, 1) < 0.7
    rows = torch.arange(math.prod(shape)).view(shape) // max(1, math.prod(shape[1:]))
    proximal = (rollout + normal(0.0, 0.01, 0.1, 1.0)).clamp(max=0.0)
    proximal = torch.where(uniform(0, 1) < 0.05, rollout - uniform(15, 30), proximal)
    holds_sampled = uniform(0, 1) < 0.5
    shares = (2 * torch.randn(2, *shape, NUM_TOPK + 1, generator=generator)).softmax(-1)
    topk = TopKLogprobs(
        likely(policy, holds_sampled, shares[0]), likely(rollout, holds_sampled, shares[1]), holds_sampled
    )
    return Tokens(policy, rollout, advantages, mask, rows, proximal, topk)


def likely(logprobs, holds_sampled, shares):
    """Logprobs of K tokens, the sampled one first where it is held; what it leaves is split among the others."""
    left = -torch.expm1(logprobs.double())[..., None] * shares.double()
    others = left[..., :NUM_TOPK].log().float()
    first = torch.where(holds_sampled, logprobs, others[..., 0])
    return torch.cat([first[..., None], others[..., 1:]], -1)


@pytest.fixture(scope="session", params=OBJECTIVES)
def objective_name(request):
    return request.param


@pytest.fixture(scope="session")
def objective(objective_name):
    return OBJECTIVES[objective_name]


@pytest.fixture(scope="session")
def make_tokens():
    return random_tokens


@pytest.fixture(scope="session")
def evaluate():
    """The output on one token, a sequence of its own, as Python numbers, with the gradient of the objective as `grad`.

    pi_prox is mu, unless given; the top K are the sampled token alone.
    """

    def on_one_token(objective, policy, rollout, advantage, proximal=None):
        pi, mu = torch.tensor([policy]), torch.tensor([rollout])
        nothing = torch.full((1, NUM_TOPK - 1), -math.inf)
        topk = TopKLogprobs(
            torch.cat([pi[:, None], nothing], 1), torch.cat([mu[:, None], nothing], 1), torch.tensor([True])
        )
        prox = torch.tensor([rollout if proximal is None else proximal])
        tokens = Tokens(pi, mu, torch.tensor([advantage]), torch.tensor([True]), torch.tensor([0]), prox, topk)
        output, grad = tokens.under_with_gradient(objective)
        values = {name: value.item() for name, value in output._asdict().items() if value is not None}
        return values | {"grad": -grad.item()}

    return on_one_token


@pytest.fixture
def unchecked_hints(monkeypatch):
    """The package as a user runs it: types of arguments are not checked by the test runner."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
