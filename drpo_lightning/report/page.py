"""The page of the report."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from drpo_lightning.charts import BEST_PREFIX, FIGURES, HELD_OUT, Layout, charts_with
from drpo_lightning.report.runs import Curve, Run, natural
from drpo_lightning.report.svg import DASHES, MAX_POINTS, Line, line_chart, number

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --faint: #6b7280; --rule: #e2e4e8; --card: #f7f8fa }
@media (prefers-color-scheme: dark) {
  :root { --back: #15171a; --text: #e6e7e9; --faint: #9aa0a9; --rule: #2f333a; --card: #1c1f24 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1500px; padding: 0 16px 48px; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.5em; margin: 20px 0 4px }
h2 { font-size: 1.15em; margin: 32px 0 8px }
.note, .empty { color: var(--faint); margin: 8px 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  white-space: nowrap }
th { font-weight: 600 }
th small { display: block; color: var(--faint); font-weight: 400 }
th:first-child, .text th, .text td { text-align: left }
.text tbody th, .text td { white-space: normal; overflow-wrap: anywhere; min-width: 9em }
.text tbody th { min-width: min(22em, 42vw) }
summary { cursor: pointer; color: var(--faint); margin: 10px 0 }
.runs { position: sticky; top: 0; z-index: 1; background: var(--back); border-bottom: 1px solid var(--rule);
  display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 8px 0; max-height: 30vh; overflow-y: auto }
.swatch { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; background: var(--colour) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 14px }
figure { margin: 0; padding: 10px 12px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px }
figcaption { font-size: .88em; font-weight: 600; margin-bottom: 4px; overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto }
svg text { font-size: 10.5px; fill: var(--faint) }
.grid { stroke: var(--rule); fill: none }
.line { stroke: var(--colour); fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round }
.hit { opacity: 0; stroke-width: 12 }
.band { fill: var(--colour); opacity: .11 }
circle { fill: var(--colour) }
.tags { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: .8em; color: var(--faint) }
.tags svg { display: inline-block; width: 26px; height: 6px; margin-right: 5px; vertical-align: middle }
.tags path { stroke: currentColor; stroke-width: 1.7; fill: none }
"""


MISSING = "&mdash;"


class ColouredRun(NamedTuple):
    """A run and the CSS colour of its lines."""

    run: Run
    colour: str

    @property
    def label(self) -> str:
        """Its name behind a swatch, as HTML."""
        return f'<span class="swatch" style="--colour:{self.colour}"></span>{escape(self.run.name)}'


def report_page(runs: Sequence[Run]) -> str:
    """The HTML page that compares some runs: figures, settings, and their curves in the sections of the dashboard."""
    coloured = [ColouredRun(run, colour_of(i)) for i, run in enumerate(runs)]
    title = f"drpo report: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{figures_table(coloured)}
{settings_tables(coloured)}
<nav class="runs">{"".join(f"<span>{run.label}</span>" for run in coloured)}</nav>
<p class="note">Over optimizer steps completed. A curve of more than {MAX_POINTS} points is drawn as means of neighbours
in a band from the lowest to the highest.</p>
{"".join(sections(coloured))}
</body>
</html>
"""


def colour_of(number: int) -> str:
    """The CSS colour of a run: its hue goes on by the golden angle, so that neighbours are far apart in any number."""
    return f"oklch({(0.66, 0.53)[number % 2]} .16 {(255 + 137.508 * number) % 360:.0f})"


# -------------------------------------------------------------------- tables


def figures_table(runs: Sequence[ColouredRun]) -> str:
    """What each run came to."""
    tags = [tag for tag in FIGURES if any(tag in run.curves for run, _ in runs)]
    head = ["run", "updates", "time"]
    for tag in tags:
        last = f"{escape(FIGURES[tag])}<small>last</small>"
        head += [last, f"{escape(FIGURES[tag])}<small>best, at update</small>"] if tag in HELD_OUT else [last]
    rows = []
    for coloured in runs:
        curves = coloured.run.curves
        updates = max((curve.steps[-1] for curve in curves.values()), default=0)
        cells = [coloured.label, str(updates), duration(coloured.run.seconds)]
        for tag in tags:
            cells.append(last_value(curves.get(tag)))
            if tag in HELD_OUT:
                cells.append(best_value(curves.get(tag)))
        rows.append(cells)
    return table(head, rows)


def last_value(curve: Curve | None) -> str:
    """The last value of a scalar, if it was logged."""
    return number(curve.values[-1]) if curve else MISSING


def best_value(curve: Curve | None) -> str:
    """The largest finite value of a scalar and where it was reached first, if there is one."""
    finite = [(value, -step) for step, value in zip(*curve, strict=True) if math.isfinite(value)] if curve else []
    if not finite:
        return MISSING
    value, step = max(finite)
    return f"{number(value)} at {-step}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def settings_tables(runs: Sequence[ColouredRun]) -> str:
    """The settings that differ, and those in common, folded away."""
    keys = list(dict.fromkeys(key for run, _ in runs for key in run.settings))
    differing = [key for key in keys if len({run.settings.get(key) for run, _ in runs}) > 1]
    common = [[dotted(key), escape(runs[0].run.settings[key])] for key in keys if key not in set(differing)]
    parts = []
    if differing:
        rows = [
            [dotted(key), *(escape(run.settings[key]) if key in run.settings else MISSING for run, _ in runs)]
            for key in differing
        ]
        parts.append("<h2>Settings that differ</h2>" + table(["", *(run.label for run in runs)], rows, "text"))
    if common:
        title = ("setting" if len(common) == 1 else "settings") + (" in common" if len(runs) > 1 else "")
        folded = table(["", ""], common, "text")
        parts.append(f"<details><summary>{len(common)} {title}</summary>{folded}</details>")
    return "".join(parts)


def dotted(key: str) -> str:
    """The key of a setting as HTML, which may break after its dots."""
    return escape(key).replace(".", ".<wbr>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """An HTML table, from cells in HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


# -------------------------------------------------------------------- charts


def sections(runs: Sequence[ColouredRun]) -> Iterator[str]:
    """The charts of the dashboard, and one of every other scalar."""
    tags = sorted({tag for run, _ in runs for tag in run.curves if not tag.startswith(BEST_PREFIX)}, key=natural)
    count = 0
    for section, charts in with_others(charts_with(tags), tags).items():
        figures = []
        for title, pattern in charts.items():
            shown = [tag for tag in tags if re.fullmatch(pattern, tag)]
            figures.append(figure(title, shown, runs, f"chart{count}"))
            count += 1
        yield f'<section><h2>{escape(section)}</h2><div class="charts">{"".join(figures)}</div></section>'


def with_others(layout: Layout, tags: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
    """A layout with a chart for each scalar that is on none."""
    patterns = [pattern for charts in layout.values() for pattern in charts.values()]
    others = {tag: re.escape(tag) for tag in tags if not any(re.fullmatch(pattern, tag) for pattern in patterns)}
    return {**layout, "Other": others} if others else layout


def figure(title: str, tags: Sequence[str], runs: Sequence[ColouredRun], identity: str) -> str:
    """A chart of some scalars: a colour per run, a pattern per scalar."""
    dashes = {tag: DASHES[i % len(DASHES)] for i, tag in enumerate(tags)}
    lines = [
        Line(run.curves[tag], f"{run.name}\n{tag}\n{described(run.curves[tag])}", colour, dashes[tag])
        for run, colour in runs
        for tag in tags
        if tag in run.curves
    ]
    legend = ""
    if len(tags) > 1:
        legend = f'<div class="tags">{"".join(dash_sample(dash, tag) for tag, dash in dashes.items())}</div>'
    lost = sum(not math.isfinite(value) for line in lines for value in line.curve.values)
    warning = f'<p class="empty">{lost} {"value is" if lost == 1 else "values are"} NaN or infinite</p>' if lost else ""
    chart = line_chart(lines, identity)
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}{legend}{warning}</figure>"


def dash_sample(dash: str, tag: str) -> str:
    """A piece of line and what it stands for."""
    sample = f'<svg viewBox="0 0 26 6"><path d="M0 3H26" stroke-dasharray="{dash}"/></svg>'
    return f"<span>{sample}{escape(tag)}</span>"


def described(curve: Curve) -> str:
    """A curve in words: where it ended and its range."""
    finite = [value for value in curve.values if math.isfinite(value)]
    span = f", from {number(min(finite))} to {number(max(finite))}" if finite else ""
    return f"last {number(curve.values[-1])} at {curve.steps[-1]}{span}"
