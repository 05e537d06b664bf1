"""How far the policy has gone from the frozen reference model."""

from lightning.pytorch import LightningModule, Trainer

from drpo_lightning.callbacks.update_statistics import CompletionTokens, TokenValues, UpdateStatistics
from drpo_lightning.errors import SettingError
from drpo_lightning.functional import has_reference_gradient, importance_ratio, reference_kl
from drpo_lightning.metrics import TokenStatistics
from drpo_lightning.rollout.policy import RolloutPolicy

MEANS = (
    "reference/k1_kl",
    "reference/k3_kl",
    "reference/log_ratio_abs_mean",
    "reference/beyond_clamp_fraction",
)


class ReferenceDivergence(UpdateStatistics):
    """Logs divergences of pi from the reference model, as means over completion tokens and the largest one.

    `reference/k1_kl` and `reference/k3_kl` estimate KL(pi || ref) in nats, weighted by r = pi / mu, as mu sampled the
    tokens; `reference/log_ratio_abs_mean` and `_max` are of |log pi - log ref| in nats;
    `reference/beyond_clamp_fraction` is the share of tokens with log ref - log pi > 20, where a penalty in the loss
    has no gradient. They do not depend on the penalty: with `model.reference.beta` 0 they are all there is.

    Args:
        every_n_updates: see `UpdateStatistics`.

    Raises:
        SettingError: at the start, if there is no reference.
    """

    def __init__(self, every_n_updates: int | None = None) -> None:
        super().__init__(TokenStatistics(means=MEANS, maxima=["reference/log_ratio_abs_max"]), every_n_updates)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Checks that there is a reference."""
        if not isinstance(pl_module, RolloutPolicy) or not pl_module.needs_reference_logprobs:
            raise SettingError(
                "`ReferenceDivergence` needs a reference model; set `model.reference`, with a beta of 0 to measure "
                "without a penalty"
            )

    def token_values(self, tokens: CompletionTokens) -> TokenValues:
        """See `UpdateStatistics`."""
        pi, mu, ref = tokens.policy_logprobs, tokens.rollout_logprobs, tokens.reference_logprobs
        assert ref is not None, "a rollout is scored by the reference before it is split"
        ratio, log_ratio = importance_ratio(pi, mu), (pi - ref).abs()
        values = {
            "reference/k1_kl": ratio * reference_kl(pi, ref, estimator="k1"),
            "reference/k3_kl": ratio * reference_kl(pi, ref, estimator="k3"),
            "reference/log_ratio_abs_mean": log_ratio,
            "reference/log_ratio_abs_max": log_ratio,
            "reference/beyond_clamp_fraction": (~has_reference_gradient(pi, ref)).double(),
        }
        return TokenValues(values, {})
