"""`python -m study.report`: fills docs/study.md with tables and figures of the rows; its prose is in study.md.in."""

import argparse
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from study.figures import save_figures
from study.grid import (
    DELTAS,
    HARD_SETTINGS,
    LEARNING_RATES,
    MAIN,
    OTHERS,
    SETTINGS,
    Run,
    evaluation_runs,
    tuned_rates,
    tuning_runs,
)
from study.intervals import Interval, Row, has_collapsed, mean_interval, paired_difference, verdict
from study.pool import read_rows
from study.selection import NUM_DELTA_SEEDS, at_delta, groups, place, select

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs"
MARKER = re.compile(r"<!-- fill: (\w+) -->")
NOTHING = "-"
REFERENCES = ("DRPO 0.2", "DPPO-TV")
CELL_FIELDS = ("setting", "objective", "learning_rate")
CELL_HEADER = ("runs", "final", "area", "collapsed", "beyond 0.2", "corrective", "seconds")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned as text too."""
    cells = [[cell.replace("|", r"\|") for cell in line] for line in (header, *lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def number(interval: Interval, sign: str = "") -> str:
    """`mean ± half width`; a single value stands alone."""
    mean = f"{interval.mean:{sign}.3f}"
    return mean if math.isnan(interval.half_width) else f"{mean} ± {interval.half_width:.3f}"


def mean_of(rows: Sequence[Row], field: str) -> float:
    """The mean of a field."""
    return fmean(row[field] for row in rows)


def rates_of(rows: Sequence[Row]) -> str:
    """The learning rates, of which there should be one."""
    return NOTHING if not rows else ", ".join(f"{rate:g}" for rate in sorted({row["learning_rate"] for row in rows}))


def cell(rows: Sequence[Row], planned: int) -> list[str]:
    """What `CELL_HEADER` says of runs that differ in the seed only."""
    if not rows:
        return [f"0 of {planned}", *[NOTHING] * (len(CELL_HEADER) - 1)]
    return [
        f"{len(rows)} of {planned}" if len(rows) < planned else str(len(rows)),
        number(mean_interval([row["final"] for row in rows])),
        number(mean_interval([row["area"] for row in rows])),
        f"{sum(map(has_collapsed, rows))} of {len(rows)}",
        f"{mean_of(rows, 'beyond_0.2_fraction'):.2%}",
        f"{mean_of(rows, 'corrective_fraction'):.2%}",
        f"{mean_of(rows, 'seconds'):.0f}",
    ]


def planned_runs(rows: Sequence[Row]) -> list[Run]:
    """What the grid wants besides the tuning; a rate is NaN until it is tuned."""
    rates = {(name, stale): math.nan for name in {**MAIN, **OTHERS} for stale in (False, True)}
    return evaluation_runs(rates | tuned_rates(rows))


def phase_table(rows: Sequence[Row], phase: str) -> str:
    """One line for each setting, objective and rate of a phase; those without a run yet are listed too."""
    made = groups(select(rows, phase), *CELL_FIELDS)
    planned = Counter(
        (run.setting, run.objective, run.learning_rate) for run in planned_runs(rows) if run.phase == phase
    )
    lines = [
        [setting, name, f"{rate:g}", *cell(made.get((setting, name, rate), []), planned[setting, name, rate])]
        for setting, name, rate in sorted({*made, *planned}, key=lambda key: (place(*key[:2]), key[2]))
    ]
    return table(["setting", "objective", "learning rate", *CELL_HEADER], lines)


def difference(rows: Sequence[Row], reference: Sequence[Row], field: str) -> str:
    """A paired difference and what it says."""
    interval = paired_difference(rows, reference, field)
    return NOTHING if interval is None else f"{number(interval, '+')} {verdict(interval)}"


def paired_table(rows: Sequence[Row], references: Sequence[Row]) -> str:
    """Every objective less each of `REFERENCES`, over equal seeds."""
    lines = []
    for (setting, name), runs in groups(rows, "setting", "objective").items():
        line = [setting, name]
        for reference in REFERENCES:
            others = [] if reference == name else select(references, None, setting, reference)
            line += [difference(runs, others, field) for field in ("final", "area")]
        lines.append(line)
    header = [f"{field} less {reference}" for reference in REFERENCES for field in ("final", "area")]
    return table(["setting", "objective", *header], lines)


def settings_table(rows: Sequence[Row]) -> str:
    """How far apart pi and mu are, by setting, over the runs of the main comparison."""
    lines = []
    for name, setting in SETTINGS.items():
        runs = select(rows, "main", name)
        fields = ("mismatch_log_ratio_abs_mean", "shift_abs_mean")
        distances = [f"{mean_of(runs, field):.4f}" if runs else NOTHING for field in fields]
        lines.append(
            [name, str(setting.num_updates), str(512 // setting.num_updates), setting.engine_dtype, *distances]
        )
    header = ["setting", "updates per rollout", "completions per update", "engine", "mismatch", "shift"]
    return table(header, lines)


def tuning_table(rows: Sequence[Row]) -> str:
    """The area at every learning rate, the chosen rate in bold."""
    chosen = tuned_rates(rows)
    lines = []
    for (setting, name), runs in groups(select(rows, "tuning"), "setting", "objective").items():
        areas = {row["learning_rate"]: f"{row['area']:.3f}" for row in runs}
        rate = chosen[name, SETTINGS[setting].is_stale]
        areas[rate] = f"**{areas[rate]}**"
        lines.append([setting, name, *(areas.get(rate, NOTHING) for rate in LEARNING_RATES)])
    return table(["setting", "objective", *(f"{rate:g}" for rate in LEARNING_RATES)], lines)


def delta_table(rows: Sequence[Row]) -> str:
    """One line for each setting and delta."""
    lines = []
    for setting in HARD_SETTINGS:
        for delta in DELTAS:
            runs = at_delta(rows, delta, setting)
            regime = "reached" if delta < 1 else "out of reach"
            lines.append([setting, f"{delta:g}", regime, rates_of(runs), *cell(runs, NUM_DELTA_SEEDS)])
    return table(["setting", "delta", "boundary", "learning rate", *CELL_HEADER], lines)


def smollm2_table(rows: Sequence[Row]) -> str:
    """One line for each engine and main objective, whether it was run or not."""
    lines = []
    for (setting, rate, rollouts), of_engine in groups(rows, "setting", "learning_rate", "num_rollouts").items():
        for name in MAIN:
            runs = [row for row in of_engine if row["objective"] == name]
            mismatch = f"{mean_of(runs, 'mismatch_log_ratio_abs_mean'):.3f}" if runs else "missing"
            lines.append([setting, name, f"{rate:g}", str(rollouts), *cell(runs, 1), mismatch])
    return table(["engine", "objective", "learning rate", "rollouts", *CELL_HEADER, "mismatch"], lines)


def adaptive_section(rows: Sequence[Row]) -> str:
    """The section on DRPO with an adaptive delta; empty without rows."""
    adaptive = select(rows, "adaptive")
    if not adaptive:
        return ""
    tuned = tuned_rates(rows)["DRPO 0.2", True]
    at_tuned = [row for row in adaptive if row["learning_rate"] == tuned]
    too_fast = [row for row in adaptive if row["learning_rate"] != tuned]
    return "\n\n".join(
        [
            "## Adaptive delta",
            phase_table(rows, "adaptive"),
            "At the tuned rate, against the main comparison:",
            paired_table(at_tuned, select(rows, "main")),
            "At three times the tuned rate, against the runs of that rate:",
            paired_table(too_fast, select(rows, "fast")),
        ]
    )


def count_text(rows: Sequence[Row], smollm2_rows: Sequence[Row]) -> str:
    """How much of the study is there."""
    planned = len(tuning_runs()) + len(planned_runs(rows))
    diverged = sum(row["diverged"] for row in rows)
    versions = "; ".join(sorted({row["versions"] for row in [*rows, *smollm2_rows]}))
    return (
        f"Made from {len(rows)} of {planned} runs of the small model, of which {diverged} ended in NaN, and from "
        f"{len(smollm2_rows)} runs of SmolLM2-135M-Instruct ({versions})."
    )


def contents_of(rows: Sequence[Row], smollm2_rows: Sequence[Row]) -> dict[str, str]:
    """What stands at each marker of the template."""
    main_rows, fast_rows = select(rows, "main"), select(rows, "fast")
    return {
        "count": count_text(rows, smollm2_rows),
        "settings": settings_table(rows),
        "tuning": tuning_table(rows),
        "main": phase_table(rows, "main"),
        "main_paired": paired_table(main_rows, main_rows),
        "fast": phase_table(rows, "fast"),
        "fast_paired": paired_table(fast_rows, fast_rows),
        "others": phase_table(rows, "others"),
        "others_paired": paired_table(select(rows, "others"), main_rows),
        "delta": delta_table(rows),
        "adaptive": adaptive_section(rows),
        "smollm2": smollm2_table(smollm2_rows),
    }


def fill(template: str, contents: Mapping[str, str]) -> str:
    """Puts the contents in the place of the markers `<!-- fill: name -->`, each of which must be used.

    Raises:
        ValueError: if markers and contents are not the same.
    """
    markers = set(MARKER.findall(template))
    if markers != contents.keys():
        raise ValueError(f"markers of the template must be {sorted(contents)}, got {sorted(markers)}")
    replacement: Callable[[re.Match[str]], str] = lambda match: contents[match[1]]  # noqa: E731
    return re.sub(r"\n{3,}", "\n\n", MARKER.sub(replacement, template))


def write_report(results: Path, smollm2_results: Path, template: Path, report: Path) -> dict[str, str]:
    """Writes the report, and its figures into a folder of the same name.

    Returns:
        The generated parts by marker.
    """
    rows, smollm2_rows = read_rows(results), read_rows(smollm2_results)
    contents = contents_of(rows, smollm2_rows)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(fill(template.read_text(), contents))
    save_figures(rows, smollm2_rows, report.with_suffix(""))
    return contents


def main() -> None:
    """Writes docs/study.md and prints its tables."""
    parser = argparse.ArgumentParser(prog="python -m study.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER / "results.jsonl")
    parser.add_argument("--smollm2-results", type=Path, default=FOLDER / "results_smollm2.jsonl")
    parser.add_argument("--template", type=Path, default=FOLDER / "study.md.in")
    parser.add_argument("--report", type=Path, default=DOCS / "study.md")
    arguments = parser.parse_args()
    contents = write_report(arguments.results, arguments.smollm2_results, arguments.template, arguments.report)
    for name, text in contents.items():
        print(f"[{name}]\n{text}\n")


if __name__ == "__main__":
    main()
