"""The layout of TensorBoard's custom scalars: charts that belong together, side by side."""

from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.callbacks.tensorboard import tensorboard_writers

LAYOUT = {
    "Reward": {
        "reward": ["Multiline", [r"^reward/mean$", r"^reward/[^/]+/mean$"]],
        "validation": ["Multiline", [r"^val/reward/mean$", r"^val/pass@\d+$"]],
        "groups without a signal": ["Multiline", [r"^group/zero_std_fraction$"]],
    },
    "Trust region": {
        "shift |pi - mu|": ["Multiline", [r"^policy_shift/abs_mean$", r"^policy_shift/abs_max$"]],
        "tokens outside the region": ["Multiline", [r"^region/outside_fraction"]],
        "divergence": ["Multiline", [r"^divergence/(k1_kl|k3_kl|binary_tv|binary_kl)$"]],
        "masked tokens": ["Multiline", [r"^mask/fraction"]],
    },
    "Gradient weights": {
        "what w does": ["Multiline", [r"^grad_weight/(corrective|attenuated|amplified)_fraction$"]],
        "w": ["Margin", ["grad_weight/mean", "grad_weight/min", "grad_weight/max"]],
        "corrective by sign of A": ["Multiline", [r"^grad_weight/corrective_fraction_.*$"]],
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


class Dashboard(Callback):
    """Groups the scalars of a run into a dashboard: TensorBoard's tab "Custom Scalars"."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Writes the layout."""
        for writer in tensorboard_writers(trainer):
            writer.add_custom_scalars(LAYOUT)
