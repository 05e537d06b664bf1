"""The figures of the report. An objective has the same colour and marker in all of them."""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from study.grid import DELTAS, HARD_SETTINGS, LEARNING_RATES, SETTINGS
from study.intervals import Row, mean_interval
from study.selection import at_delta, groups, select

STYLES = {
    "DRPO 0.2": ("#0072B2", "o"),
    "DRPO 12.5": ("#56B4E9", "s"),
    "DPPO-TV": ("#D55E00", "^"),
    "clipped ratio": ("#E69F00", "v"),
    "SPO": ("#CC79A7", "D"),
    "Mask-DRPO 0.2": ("#009E73", "P"),
    "unregularised": ("#000000", "X"),
}
"""Colours of Okabe and Ito, told apart by colour-blind readers, and markers."""
SETTING_STYLES = {"stale": ("#000000", "o", "-"), "both": ("#777777", "s", "--")}
"""Colour, marker and line."""
NUM_COLORS = 64
"""Colours of a PNG, which make it a third of its size."""
FIELDS = {"final": "final accuracy", "area": "area under the curve (mean accuracy)"}


def new_figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Axes]]:  # noqa: ANN401
    """An empty figure of 8 x `height` inches, and its panels row by row."""
    figure = Figure(figsize=(8, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def add_legend(figure: Figure) -> None:
    """One legend for all panels, below them, with each label once."""
    labelled = [panel.get_legend_handles_labels() for panel in figure.axes]
    unique = {label: handle for handles, labels in labelled for handle, label in zip(handles, labels, strict=True)}
    names = [name for name in (*STYLES, *SETTING_STYLES) if name in unique]
    figure.legend([unique[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False)


def draw_curves(panel: Axes, rows: Sequence[Row], *, each: bool = False) -> None:
    """The mean accuracy of every objective against the rollouts, and with `each` every run as a thin line."""
    for name, (color, marker) in STYLES.items():
        curves = [row["curve"] for row in rows if row["objective"] == name]
        if not curves:
            continue
        rollouts = next(row["num_rollouts"] for row in rows if row["objective"] == name)
        x = [rollouts * i / (len(curves[0]) - 1) for i in range(len(curves[0]))]
        for curve in curves if each else ():
            panel.plot(x, curve, color=color, linewidth=0.5)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        panel.plot(x, mean, color=color, marker=marker, markersize=4, linewidth=1.5, label=name)
    panel.set_xlabel("rollouts")


def tuning(rows: Sequence[Row]) -> Figure:
    """Area against learning rate."""
    figure, panels = new_figure(1, 2, 4.2, sharey=True)
    for panel, setting in zip(panels, ("near on-policy", "stale"), strict=True):
        for name, (color, marker) in STYLES.items():
            runs = sorted(select(rows, "tuning", setting, name), key=lambda row: row["learning_rate"])
            panel.plot(
                [row["learning_rate"] for row in runs],
                [row["area"] for row in runs],
                color=color,
                marker=marker,
                markersize=5,
                label=name,
            )
        panel.set_xscale("log")
        panel.set_xticks(LEARNING_RATES, [f"{rate:g}" for rate in LEARNING_RATES])
        panel.minorticks_off()
        panel.set(title=f"{setting}: {SETTINGS[setting].num_updates} updates per rollout", xlabel="learning rate")
    panels[0].set_ylabel(FIELDS["area"])
    add_legend(figure)
    return figure


def main(rows: Sequence[Row]) -> Figure:
    """Final accuracy and area by setting, with intervals from 3 runs on."""
    figure, panels = new_figure(2, 1, 7.2, sharex=True)
    for panel, (field, label) in zip(panels, FIELDS.items(), strict=True):
        for place, (name, (color, marker)) in enumerate(STYLES.items()):
            for x, setting in enumerate(SETTINGS):
                if runs := select(rows, "main", setting, name):
                    interval = mean_interval([row[field] for row in runs])
                    panel.errorbar(
                        x + 0.11 * (place - 3),
                        interval.mean,
                        interval.half_width if interval.count > 2 else None,
                        color=color,
                        marker=marker,
                        markersize=5,
                        capsize=2,
                        linestyle="none",
                        label=name,
                    )
        panel.set_xticks(range(len(SETTINGS)), SETTINGS)
        panel.set_ylabel(label)
        panel.grid(visible=False, axis="x")
        for x in range(1, len(SETTINGS)):
            panel.axvline(x - 0.5, color="#dddddd", linewidth=0.6)
    add_legend(figure)
    return figure


def curves(rows: Sequence[Row]) -> Figure:
    """Accuracy during training, by setting."""
    figure, panels = new_figure(3, 2, 9, sharey=True)
    for panel, setting in zip(panels, SETTINGS, strict=False):
        draw_curves(panel, select(rows, "main", setting))
        panel.set_title(setting)
        panel.set_ylim(0.55, 0.9)
    for panel in panels[::2]:
        panel.set_ylabel("held-out accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].axis("off")
    panels[-1].legend(handles, labels, loc="center", frameon=False)
    return figure


def fast(rows: Sequence[Row]) -> Figure:
    """Accuracy during training at a learning rate that is too large."""
    figure, panels = new_figure(1, 2, 4.6, sharey=True)
    for panel, setting in zip(panels, HARD_SETTINGS, strict=True):
        draw_curves(panel, select(rows, "fast", setting), each=True)
        panel.set_title(setting)
    panels[0].set_ylabel("held-out accuracy")
    add_legend(figure)
    return figure


def delta(rows: Sequence[Row]) -> Figure:
    """Final accuracy and area against delta, with intervals from 3 runs on."""
    figure, panels = new_figure(1, 2, 4)
    for panel, (field, label) in zip(panels, FIELDS.items(), strict=True):
        for setting, (color, marker, line) in SETTING_STYLES.items():
            points = [(d, [row[field] for row in runs]) for d in DELTAS if (runs := at_delta(rows, d, setting))]
            intervals = [mean_interval(values) for _, values in points]
            panel.errorbar(
                [d * (1.03 if setting == "both" else 0.97) for d, _ in points],
                [interval.mean for interval in intervals],
                [interval.half_width if interval.count > 2 else 0.0 for interval in intervals],
                capsize=2,
                markersize=5,
                label=setting,
                color=color,
                marker=marker,
                linestyle=line,
            )
        panel.axvline(1, color="#D55E00", linewidth=1, linestyle=":")
        panel.annotate(
            " boundary out of reach →", (1, 0.02), xycoords=("data", "axes fraction"), color="#D55E00", fontsize=8
        )
        panel.set_xscale("log")
        panel.set_xticks(DELTAS, [f"{d:g}" for d in DELTAS], fontsize=8, rotation=60)
        panel.minorticks_off()
        panel.set(xlabel="delta (probability)", ylabel=label)
    add_legend(figure)
    return figure


def smollm2(rows: Sequence[Row]) -> Figure:
    """Accuracy during training of SmolLM2-135M-Instruct, by engine and learning rate."""
    runs = groups(rows, "setting", "learning_rate", "num_rollouts")
    height = 4.6 * ((len(runs) + 1) // 2)
    figure, panels = new_figure(max(1, (len(runs) + 1) // 2), 2, max(4.6, height), sharey=True)
    for panel, ((setting, rate, _), group) in zip(panels, runs.items(), strict=False):
        draw_curves(panel, group)
        panel.set_title(f"{setting}, learning rate {rate:g}")
    panels[0].set_ylabel("held-out accuracy")
    add_legend(figure)
    return figure


FIGURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "tuning": tuning,
    "main": main,
    "curves": curves,
    "fast": fast,
    "delta": delta,
}


def save(figure: Figure, file: Path) -> None:
    """Writes a PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=140)
    Image.open(buffer).convert("RGB").quantize(NUM_COLORS).save(file, optimize=True)


def save_figures(rows: Sequence[Row], smollm2_rows: Sequence[Row], folder: Path) -> None:
    """Writes a PNG per figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        save(draw(rows), folder / f"{name}.png")
    save(smollm2(smollm2_rows), folder / "smollm2.png")
