"""What every objective is: called on tensors, answers with per-token tensors."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from drpo_lightning.functional.divergences import TopKLogprobs
from drpo_lightning.functional.ratios import importance_ratio, within_log_ratio_clamp


class ObjectiveOutput(NamedTuple):
    """Per-token results; all but `loss` are without a gradient.

    Attributes:
        loss: minus the objective, to be minimised; exactly 0 outside the completions.
        grad_coefficient: d objective / d log pi, before aggregation; 0 outside the completions and beyond the
            log-ratio clamp.
        grad_weight: w = grad_coefficient / (r A), the factor on the importance-weighted policy gradient; 0 beyond
            the log-ratio clamp; NaN where A = 0 and outside the completions, to be left out of statistics.
        beyond_clamp: True on completion tokens with |log pi - log mu| > 20, which have no gradient.
        keep: True on completion tokens that a mask keeps; None for an objective without a mask.
    """

    loss: Float[Tensor, "*tokens"]
    grad_coefficient: Float[Tensor, "*tokens"]
    grad_weight: Float[Tensor, "*tokens"]
    beyond_clamp: Bool[Tensor, "*tokens"]
    keep: Bool[Tensor, "*tokens"] | None


class TokenTerms(NamedTuple):
    """What an objective's pure function gives for each token.

    Attributes:
        objective: the per-token objective, to be maximised, differentiable in log pi.
        grad_coefficient: its derivative d objective / d log pi, in closed form, valid inside the log-ratio clamp.
        keep: True where a mask keeps the token; None for an objective without a mask.
    """

    objective: Float[Tensor, "*tokens"]
    grad_coefficient: Float[Tensor, "*tokens"]
    keep: Bool[Tensor, "*tokens"] | None = None


class TokenInputs(NamedTuple):
    """The masked inputs of an objective: neutral values (log 1, A = 0) stand outside the completions."""

    policy_logprobs: Float[Tensor, "*tokens"]
    rollout_logprobs: Float[Tensor, "*tokens"]
    advantages: Float[Tensor, "*tokens"]
    completion_mask: Bool[Tensor, "*tokens"]
    sequence_ids: Int[Tensor, "*tokens"] | None
    proximal_logprobs: Float[Tensor, "*tokens"] | None
    topk: TopKLogprobs | None


class Objective(ABC):
    """A policy objective over sampled tokens.

    A subclass is a frozen dataclass of settings whose `terms` calls a pure function. Tokens are independent of each
    other unless the objective declares `sequence_ids`; any layout of tokens, padded or packed, gives equal results.
    """

    @property
    def required_inputs(self) -> frozenset[str]:
        """Names of the optional inputs that the objective cannot do without."""
        return frozenset()

    @property
    def num_topk(self) -> int:
        """How many of mu's most likely tokens the objective needs the logprobs of."""
        return 0

    @property
    def uses_importance_ratio(self) -> bool:
        """True if r = pi / mu enters, so that pi and mu must have the same support."""
        return True

    @property
    def has_mask(self) -> bool:
        """True if the objective drops tokens and returns `keep`."""
        return False

    @abstractmethod
    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """Per-token objective and its derivative, from masked inputs."""

    @abstractmethod
    def describe(self) -> str:
        """One line for the start of a run: the settings and what they mean."""

    def __call__(
        self,
        policy_logprobs: Float[Tensor, "*tokens"],
        rollout_logprobs: Float[Tensor, "*tokens"],
        advantages: Float[Tensor, "*tokens"],
        completion_mask: Bool[Tensor, "*tokens"],
        *,
        sequence_ids: Int[Tensor, "*tokens"] | None = None,
        proximal_logprobs: Float[Tensor, "*tokens"] | None = None,
        topk: TopKLogprobs | None = None,
    ) -> ObjectiveOutput:
        """Evaluates the objective on sampled tokens.

        Args:
            policy_logprobs: log pi, in nats, at the sampling temperature; the only tensor with a gradient.
            rollout_logprobs: log mu, in nats, of the distribution that was sampled from.
            advantages: A, in units of reward.
            completion_mask: True on sampled tokens; elsewhere the inputs may hold anything, NaN included.
            sequence_ids: number of the sequence that a token belongs to.
            proximal_logprobs: log pi_prox, the trainer's policy at the weights of the rollout.
            topk: logprobs of mu's K most likely tokens under pi and mu.

        Returns:
            Per-token loss, gradient coefficient, gradient weight and mask.

        Raises:
            ValueError: if shapes differ or a required input is missing.
        """
        for name, tensor in (
            ("rollout_logprobs", rollout_logprobs),
            ("advantages", advantages),
            ("completion_mask", completion_mask),
            ("sequence_ids", sequence_ids),
            ("proximal_logprobs", proximal_logprobs),
        ):
            if tensor is not None and tensor.shape != policy_logprobs.shape:
                raise ValueError(
                    f"`{name}` must have the shape of `policy_logprobs` {list(policy_logprobs.shape)}, "
                    f"got {list(tensor.shape)}"
                )
        given = {"sequence_ids": sequence_ids, "proximal_logprobs": proximal_logprobs, "topk": topk}
        self.check_inputs({name for name, value in given.items() if value is not None})

        def masked(values: Tensor) -> Tensor:
            # The inputs are masked, not the output: 0 * exp(inf) and where(mask, exp(inf), 0) have a NaN gradient.
            return torch.where(completion_mask, values, 0.0)

        tokens = TokenInputs(
            policy_logprobs=masked(policy_logprobs.float()),
            rollout_logprobs=masked(rollout_logprobs.detach().float()),
            advantages=masked(advantages.detach().float()),
            completion_mask=completion_mask,
            sequence_ids=None if sequence_ids is None else sequence_ids.masked_fill(~completion_mask, 0),
            proximal_logprobs=None if proximal_logprobs is None else masked(proximal_logprobs.detach().float()),
            topk=None if topk is None else topk.masked(completion_mask),
        )
        terms = self.terms(tokens)
        with torch.no_grad():
            in_clamp = within_log_ratio_clamp(tokens.policy_logprobs, tokens.rollout_logprobs)
            coefficient = masked(torch.where(in_clamp, terms.grad_coefficient, 0.0))
            ratio = importance_ratio(tokens.policy_logprobs, tokens.rollout_logprobs)
            # A = 0 gives 0 / 0 = NaN, also outside the completions, where A was set to 0.
            weight = torch.where(tokens.advantages == 0, torch.nan, coefficient / (ratio * tokens.advantages))
        return ObjectiveOutput(
            loss=masked(-terms.objective),
            grad_coefficient=coefficient,
            grad_weight=weight,
            beyond_clamp=completion_mask & ~in_clamp,
            keep=None if terms.keep is None else terms.keep & completion_mask,
        )

    def check_inputs(self, available: set[str]) -> None:
        """Raises `ValueError` if a required optional input is not among the available ones."""
        if missing := self.required_inputs - available:
            raise ValueError(f"{type(self).__name__} needs {sorted(missing)}, which the caller does not provide")
