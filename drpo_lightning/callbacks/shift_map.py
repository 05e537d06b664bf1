"""A picture of the trust region: the tokens of an update in the plane of mu and pi."""

import importlib.util
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from drpo_lightning.batch import RolloutBatch
from drpo_lightning.callbacks.mask_statistics import WEIGHT_TOLERANCE
from drpo_lightning.callbacks.tensorboard import tensorboard_writers
from drpo_lightning.errors import SettingError
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import Objective, Unregularized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

SMALLEST_PROBABILITY = 1e-6
"""Lower end of the logarithmic axes; what is below is drawn on the edge."""
GRID_SIZE = 500
"""Points per axis on which a boundary is sought."""
MIN_REACH, MAX_REACH = 0.05, 4.0
"""Least and largest |w - 1| at which the colours end."""
INK, PALE_INK, REGION = "#1b1b1b", "#6b6b6b", "#eef2ea"


class WeightClass(NamedTuple):
    """Tokens that the objective treats alike, and how they are drawn.

    Attributes:
        label: in the legend.
        pale: colour at the end of the class that is nearer to w = 1.
        strong: colour at the other end.
        marker: matplotlib's.
        size: of the marker, in points.
    """

    label: str
    pale: str
    strong: str
    marker: str
    size: float


CLASSES = {
    "kept": WeightClass("kept, w = 1", "#8f8f8f", "#8f8f8f", "o", 3.0),
    "attenuated": WeightClass("attenuated, 0 ≤ w < 1", "#f7dc9c", "#e69f00", "o", 4.0),
    "amplified": WeightClass("amplified, w > 1", "#a9d8f2", "#00568f", "o", 4.0),
    "corrective": WeightClass("corrective, w < 0", "#d1420f", "#6d0a1e", "v", 5.5),
}
"""With any colour vision, warm is below w = 1 and cool above it; corrective tokens have a shape of their own."""


class ShiftMap(Callback):
    """Draws the sampled tokens of an update in TensorBoard's images, under the tag `shift_map`.

    mu is the probability that a token was sampled with, pi the policy's before the update; the colour is the gradient
    weight w. The boundary of the objective's region is where w = 0 begins: a band around pi = mu for DRPO and DPPO, a
    wedge for a clipped ratio. On the left on linear axes, on the right on logarithmic ones, where rare tokens show.

    Args:
        every_n_updates: draws every n-th optimizer step.
        max_tokens: most tokens drawn, over all ranks; a random part of a larger update.

    Raises:
        ValueError: if a number is not positive.
        SettingError: at the start, if matplotlib is not installed.
    """

    def __init__(self, every_n_updates: int = 20, max_tokens: int = 5000) -> None:
        for name, value in (("every_n_updates", every_n_updates), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.every_n_updates = every_n_updates
        self.max_tokens = max_tokens
        self._parts: list[Tensor] = []
        self._update = 0
        self._objective: Objective = Unregularized()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Checks that matplotlib is there."""
        if importlib.util.find_spec("matplotlib") is None:
            raise SettingError("`ShiftMap` draws with matplotlib: pip install 'drpo-lightning[figures]'")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Notes the update, and its objective: a callback may change that before the picture is drawn."""
        assert isinstance(pl_module, PolicyModule)
        self._objective = pl_module.objective
        if self._update != trainer.global_step + 1:
            self._parts = []
        self._update = trainer.global_step + 1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401 - Lightning's signature; a StepOutput
        batch: RolloutBatch,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Keeps the tokens of the micro-batch; draws if it completed the update."""
        if self._update % self.every_n_updates:
            return
        columns = (batch.rollout_logprobs, outputs["policy_logprobs"], outputs["objective"].grad_weight)
        self._parts.append(torch.stack([column[batch.completion_mask].float() for column in columns]))
        if trainer.global_step == self._update:
            self._draw(trainer, batch.num_update_tokens)

    def _draw(self, trainer: Trainer, num_tokens: int) -> None:
        """Gathers the tokens of all ranks and writes the figure on rank 0. Collective."""
        quota = max(self.max_tokens // trainer.world_size, 1)
        mine = random_tokens(torch.cat(self._parts, 1), quota, self._update)
        # Equal sizes for the collective; what was padded has no mu.
        padded = torch.nn.functional.pad(mine, (0, quota - mine.shape[1]), value=torch.nan)
        gathered: Tensor = trainer.strategy.all_gather(padded)
        mu, pi, weight = gathered.reshape(-1, 3, quota).transpose(0, 1).reshape(3, -1).cpu()
        drawn = ~(mu + pi).isnan()
        if not drawn.any():
            return
        for writer in tensorboard_writers(trainer):
            figure = figure_of(
                mu[drawn],
                pi[drawn],
                weight[drawn],
                self._objective,
                title=f"Update {self._update}: {int(drawn.sum()):,} of {num_tokens:,} tokens",
            )
            writer.add_image("shift_map", image_of(figure), self._update, dataformats="HWC")


def random_tokens(tokens: Tensor, num_tokens: int, seed: int) -> Tensor:
    """At most `num_tokens` columns, always the same ones for a seed."""
    order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(seed))
    return tokens[:, order[:num_tokens].to(tokens.device)]


def beyond_boundary(objective: Objective, probabilities: Tensor) -> Tensor | None:
    """Where an update that leads away from mu is held back, w <= 0, by evaluating the objective on a grid.

    Every point is a sequence of its own, with pi_prox = mu, and A = 1 above pi = mu and -1 below.

    Args:
        objective: any objective.
        probabilities: values of mu and pi, in (0, 1].

    Returns:
        True beyond the boundary `[mu, pi]`; None for an objective that needs more than the sampled token.
    """
    if "topk" in objective.required_inputs:
        return None
    mu, pi = torch.meshgrid(probabilities, probabilities, indexing="ij")
    output = objective(
        pi.log(),
        mu.log(),
        (pi - mu).sign(),
        torch.ones_like(mu, dtype=torch.bool),
        sequence_ids=torch.arange(mu.numel()).view_as(mu),
        proximal_logprobs=mu.log(),
    )
    return output.grad_weight <= 0


def classes_of(grad_weight: Tensor) -> dict[str, Tensor]:
    """Which tokens are in which of `CLASSES`; those whose weight is NaN, where A = 0, are in none."""
    w = grad_weight
    return {
        "kept": (w - 1).abs() <= WEIGHT_TOLERANCE,
        "attenuated": (w >= 0) & (w < 1 - WEIGHT_TOLERANCE),
        "amplified": w > 1 + WEIGHT_TOLERANCE,
        "corrective": w < 0,
    }


def figure_of(
    rollout_logprobs: Tensor, policy_logprobs: Tensor, grad_weight: Tensor, objective: Objective, *, title: str = ""
) -> "Figure":
    """The figure of some tokens.

    Args:
        rollout_logprobs: log mu `[tokens]`, in nats.
        policy_logprobs: log pi `[tokens]`, in nats.
        grad_weight: w `[tokens]`; NaN where A = 0.
        objective: what the weights come from, for the boundary.
        title: stands above the objective's settings.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.3), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2)
    points = torch.stack([rollout_logprobs, policy_logprobs]).float().exp().clamp(min=SMALLEST_PROBABILITY)
    reach = weight_reach(grad_weight)
    colours = ScalarMappable(Normalize(1 - reach, 1 + reach), weight_colour_map(reach))
    for panel, scale in zip(panels, ("linear", "log"), strict=True):
        finish_axes(panel, scale, float(points.min()))
        draw_boundary(panel, objective, grid_of(scale))
        draw_tokens(panel, points, grad_weight, colours)
    bar = figure.colorbar(
        colours, ax=panels, shrink=0.82, pad=0.015, extend="both" if reach == MAX_REACH else "neither"
    )
    bar.set_label("w: factor on the importance-weighted policy gradient", color=INK)
    bar.outline.set_visible(False)
    figure.suptitle(f"{title}\n{objective}".strip(), x=0.02, ha="left", fontsize=12, color=INK)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, markerscale=2
    )
    return figure


def grid_of(scale: str) -> Tensor:
    """Probabilities that are evenly spaced on an axis."""
    if scale == "linear":
        return torch.linspace(1 / GRID_SIZE, 1, GRID_SIZE)
    return torch.logspace(math.log10(SMALLEST_PROBABILITY), 0, GRID_SIZE)


def weight_reach(grad_weight: Tensor) -> float:
    """How far the colours go to both sides of w = 1."""
    distances = (grad_weight[~grad_weight.isnan()] - 1).abs()
    return min(max(float(distances.max()) if len(distances) else 0.0, MIN_REACH), MAX_REACH)


def weight_colour_map(reach: float) -> "Colormap":
    """Colours of w from 1 - reach to 1 + reach, which change abruptly at w = 0, from attenuated to corrective."""
    from matplotlib.colors import LinearSegmentedColormap

    kept, attenuated, amplified, corrective = CLASSES.values()

    def place(weight: float) -> float:
        return (weight - 1 + reach) / (2 * reach)

    below = [(0.0, attenuated.strong)]
    if reach > 1:
        below = [(0.0, corrective.strong), (place(0), corrective.pale), (place(0), attenuated.strong)]
    near = [
        (place(1 - WEIGHT_TOLERANCE), attenuated.pale),
        (place(1 - WEIGHT_TOLERANCE), kept.pale),
        (place(1 + WEIGHT_TOLERANCE), kept.pale),
        (place(1 + WEIGHT_TOLERANCE), amplified.pale),
    ]
    # Fine enough for w = 1 to be a colour of its own.
    num_colours = math.ceil(4 * reach / WEIGHT_TOLERANCE)
    return LinearSegmentedColormap.from_list("grad_weight", [*below, *near, (1.0, amplified.strong)], N=num_colours)


def finish_axes(panel: "Axes", scale: str, smallest: float) -> None:
    """Scales, labels and the line pi = mu."""
    if scale == "log":
        low = 10 ** math.floor(math.log10(smallest) - 0.05)
        panel.set(xscale="log", yscale="log", xlim=(low, 1.25), ylim=(low, 1.25))
    else:
        panel.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    panel.set_aspect("equal")
    panel.set_title("logarithmic: rare tokens" if scale == "log" else "linear", fontsize=11, color=PALE_INK)
    panel.set_xlabel("μ: probability in the rollout", color=INK)
    panel.set_ylabel("π: probability under the policy", color=INK)
    panel.tick_params(colors=PALE_INK, which="both", length=3)
    panel.spines[:].set_visible(False)
    panel.grid(color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.axline((0.5, 0.5), (0.9, 0.9), color=PALE_INK, linewidth=0.9, linestyle=(0, (2, 3)), label="π = μ")


def draw_boundary(panel: "Axes", objective: Objective, grid: Tensor) -> None:
    """The boundary and the region inside it; if there is none to draw, the legend says why."""
    beyond = beyond_boundary(objective, grid)
    if beyond is None:
        panel.plot([], [], " ", label="boundary not drawn: it depends on the top K tokens")
    elif not beyond.any():
        panel.plot([], [], " ", label="boundary cannot be reached")
    else:
        field = (grid.numpy(), grid.numpy(), beyond.T.float().numpy())
        panel.contourf(*field, levels=[-0.5, 0.5], colors=[REGION], zorder=0.2)
        panel.contour(*field, levels=[0.5], colors=[INK], linewidths=1.4, zorder=1.9)
        panel.plot([], [], color=INK, linewidth=1.4, label="boundary: w ≤ 0 beyond it")


def draw_tokens(panel: "Axes", points: Tensor, grad_weight: Tensor, colours: "ScalarMappable") -> None:
    """The tokens; the rarer a class, the later it is drawn."""
    mu, pi = points.numpy()
    without = grad_weight.isnan().numpy()
    if without.any():
        label = f"no gradient, A = 0: {without.mean():.1%}"
        panel.plot(mu[without], pi[without], "x", color="#bdbdbd", markersize=3, linestyle="", label=label)
    classes = {name: members.numpy() for name, members in classes_of(grad_weight).items()}
    for name, members in classes.items():
        style = CLASSES[name]
        label = f"{style.label}: {members.mean():.1%}"
        panel.plot([], [], style.marker, color=style.strong, markersize=style.size, linestyle="", label=label)
    # Attenuated and amplified tokens lie in the same places: together, so that none covers the other.
    moved = classes["attenuated"] | classes["amplified"]
    for name, chosen in (("kept", classes["kept"]), ("attenuated", moved), ("corrective", classes["corrective"])):
        style, colour = CLASSES[name], colours.to_rgba(grad_weight.numpy()[chosen])
        panel.scatter(
            mu[chosen], pi[chosen], s=style.size**2, c=colour, marker=style.marker, linewidths=0, alpha=0.85, zorder=2
        )


def image_of(figure: "Figure") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """A figure's pixels, `[height, width, 3]`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
