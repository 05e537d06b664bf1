"""The layout of TensorBoard's custom scalars: charts that belong together, side by side."""

from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.callbacks.tensorboard import tensorboard_writers
from drpo_lightning.modules import PolicyModule

LAYOUT = {
    "Reward": {
        "reward": ["Multiline", [r"^reward/mean$", r"^reward/[^/]+/mean$"]],
        "validation": ["Multiline", [r"^val/reward/mean$", r"^val/pass@\d+$"]],
        "groups without a signal": ["Multiline", [r"^group/zero_std_fraction$"]],
    },
    "Trust region": {
        "mean shift |pi - mu|": ["Multiline", [r"^policy_shift/abs_mean$"]],
        "largest shift |pi - mu|": ["Multiline", [r"^policy_shift/abs_max$"]],
        "tokens outside the region": ["Multiline", [r"^region/outside_fraction$"]],
        "KL(mu || pi), k3": ["Multiline", [r"^divergence/k3_kl$"]],
        "binary KL": ["Multiline", [r"^divergence/binary_kl$"]],
        "importance ratio": ["Margin", ["importance_ratio/mean", "importance_ratio/mean", "importance_ratio/max"]],
    },
    "Gradient weights": {
        "attenuated tokens (0 <= w < 1)": ["Multiline", [r"^grad_weight/attenuated_fraction$"]],
        "corrective tokens (w < 0)": ["Multiline", [r"^grad_weight/corrective_fraction$"]],
        "amplified tokens (w > 1)": ["Multiline", [r"^grad_weight/amplified_fraction$"]],
        "w: mean, least, largest": ["Margin", ["grad_weight/mean", "grad_weight/min", "grad_weight/max"]],
    },
    "Optimization": {
        "loss": ["Multiline", [r"^optim/loss$"]],
        "gradient norm": ["Multiline", [r"^optim/grad_norm$"]],
        "engine against trainer": ["Multiline", [r"^sync/probe_logprob_diff$"]],
    },
    "Completions": {
        "length": ["Multiline", [r"^completions/mean_length$", r"^completions/max_length$"]],
        "truncated": ["Multiline", [r"^completions/truncated_fraction$"]],
    },
    "Speed": {
        "tokens per second": ["Multiline", [r"^perf/tokens_per_second$"]],
        "seconds": ["Multiline", [r"^perf/(generate|sync|reward|update|iteration)_seconds$"]],
    },
}
"""Charts by section: a chart's kind, and regular expressions of the scalars on it."""


MASKS = {
    "Masks": {
        "masked tokens": ["Multiline", [r"^mask/fraction$"]],
        "masked tokens with A > 0": ["Multiline", [r"^mask/fraction_positive_adv$"]],
        "masked tokens with A < 0": ["Multiline", [r"^mask/fraction_negative_adv$"]],
    }
}
"""Charts of an objective with a mask."""


class Dashboard(Callback):
    """Groups the scalars of a run into a dashboard: TensorBoard's tab "Custom Scalars"."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the layout."""
        has_mask = isinstance(pl_module, PolicyModule) and pl_module.objective.has_mask
        for writer in tensorboard_writers(trainer):
            writer.add_custom_scalars(LAYOUT | MASKS if has_mask else LAYOUT)
