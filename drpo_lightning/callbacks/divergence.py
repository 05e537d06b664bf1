"""Estimates of the divergence between the sampling and the current policy."""

from drpo_lightning.callbacks.update_statistics import CompletionTokens, TokenValues, UpdateStatistics
from drpo_lightning.functional import binary_kl_divergence, binary_tv_divergence, k1_divergence, k3_divergence
from drpo_lightning.metrics import TokenStatistics

DIVERGENCES = {
    "divergence/k1_kl": k1_divergence,
    "divergence/k3_kl": k3_divergence,
    "divergence/binary_tv": binary_tv_divergence,
    "divergence/binary_kl": binary_kl_divergence,
}


class Divergence(UpdateStatistics):
    """Logs divergences of pi from mu, as means over completion tokens and the largest one.

    `divergence/k1_kl` and `divergence/k3_kl` estimate KL(mu || pi) in nats; `divergence/binary_tv` (units of
    probability) and `divergence/binary_kl` (nats) are lower bounds from the sampled token alone. A key with
    `_max` is the largest value of all tokens.

    Args:
        every_n_updates: see `UpdateStatistics`.
    """

    def __init__(self, every_n_updates: int | None = None) -> None:
        maxima = [f"{name}_max" for name in DIVERGENCES]
        super().__init__(TokenStatistics(means=list(DIVERGENCES), maxima=maxima), every_n_updates)

    def token_values(self, tokens: CompletionTokens) -> TokenValues:
        """See `UpdateStatistics`."""
        pi, mu = tokens.policy_logprobs, tokens.rollout_logprobs
        values = {name: divergence(pi, mu) for name, divergence in DIVERGENCES.items()}
        return TokenValues(values | {f"{name}_max": value for name, value in values.items()}, {})
