"""What is run: objectives, settings, seeds and learning rates."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

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
    Objective,
    TopKDPPO,
    Unregularized,
)

MAIN: Mapping[str, Objective] = MappingProxyType(
    {
        "DRPO 0.2": DRPO(0.2),
        "DRPO 12.5": DRPO(12.5),
        "DPPO-TV": DPPO("binary_tv"),
        "clipped ratio": ClippedRatio(),
        "SPO": SPO(12.5),
        "Mask-DRPO 0.2": MaskDRPO(delta=0.2, threshold=0.15),
        "unregularised": Unregularized(),
    }
)
OTHERS: Mapping[str, Objective] = MappingProxyType(
    {
        "DRPO 0.2 without |A|": DRPO(0.2, scale_by_advantage=False),
        "Mask-DRPO 12.5": MaskDRPO(delta=12.5, threshold=0.15),
        "SPO 0.2": SPO(0.2),
        "KL penalty": DivergencePenalty("kl", beta=0.1),
        "K3 penalty": DivergencePenalty("k3", beta=0.1),
        "TV penalty": DivergencePenalty("tv", beta=0.1),
        "DPPO-KL": DPPO("binary_kl"),
        "DPPO top-20 TV": TopKDPPO(20, "tv"),
        "DPPO top-20 KL": TopKDPPO(20, "kl"),
        "CISPO": CISPO(),
        "GSPO": GSPO(),
        "SAPO": SAPO(),
        "decoupled clipped ratio": Decoupled(ClippedRatio()),
    }
)
DELTAS = (0.05, 0.1, 0.15, 0.2, 0.5, 1.0, 2.5, 12.5)
ADAPTIVE: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "DRPO adaptive, 99 % within 0.2": {"statistic": "quantile", "target": 0.2},
        "DRPO adaptive, 1 % corrective": {"statistic": "corrective_fraction", "target": 0.01},
    }
)
"""Settings of `AdaptiveDelta`, on DRPO that begins with 0.2."""
OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        **MAIN,
        **OTHERS,
        **{f"DRPO {delta:g}": DRPO(delta) for delta in DELTAS},
        **dict.fromkeys(ADAPTIVE, DRPO(0.2)),
    }
)


@dataclass(frozen=True)
class Setting:
    """How far pi and mu are apart.

    Args:
        num_updates: optimizer updates on one rollout of 512 completions.
        engine_dtype: precision of the engine; the trainer's is float32.
    """

    num_updates: int
    engine_dtype: str

    @property
    def is_stale(self) -> bool:
        """True if a rollout is used for so many updates that it needs a learning rate of its own."""
        return self.num_updates > 8


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "near on-policy": Setting(4, "float32"),
        "stale 8": Setting(8, "float32"),
        "stale": Setting(32, "float32"),
        "mismatch": Setting(4, "fp8"),
        "both": Setting(32, "fp8"),
    }
)
HARD_SETTINGS = ("stale", "both")
TOO_FAST = 3.0
"""How many times the tuned learning rate the runs of the phase `fast` take."""
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4)
TUNING_SEED = 100
NUM_ROLLOUTS = 60


@dataclass(frozen=True)
class Run:
    """One run, which gives one row of results.

    Args:
        phase: `tuning`, `main`, `others`, `delta`, `fast` or `adaptive`.
        objective: a key of `OBJECTIVES`.
        setting: a key of `SETTINGS`.
        seed: of prompts, samples and micro-batches.
        learning_rate: constant.
        num_rollouts: rollouts of 64 prompts x 8 completions.
    """

    phase: str
    objective: str
    setting: str
    seed: int
    learning_rate: float
    num_rollouts: int = NUM_ROLLOUTS

    @property
    def key(self) -> str:
        """Tells runs apart; equal runs of two phases are one."""
        return f"{self.objective}|{self.setting}|{self.seed}|{self.learning_rate:g}|{self.num_rollouts}"


def tuning_runs() -> list[Run]:
    """Every learning rate for every objective, on one seed: the main ones near on-policy too."""
    pairs = [(name, "stale") for name in {**MAIN, **OTHERS}] + [(name, "near on-policy") for name in MAIN]
    return [Run("tuning", name, setting, TUNING_SEED, rate) for rate in LEARNING_RATES for name, setting in pairs]


def tuned_rates(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, bool], float]:
    """The learning rate with the largest area under the accuracy curve, by objective and whether it is stale."""
    best: dict[tuple[str, bool], tuple[float, float]] = {}
    for row in rows:
        if row["phase"] == "tuning":
            place = (row["objective"], SETTINGS[row["setting"]].is_stale)
            best[place] = max(best.get(place, (-1.0, 0.0)), (row["area"], row["learning_rate"]))
    return {place: rate for place, (_, rate) in best.items()}


def evaluation_runs(rates: Mapping[tuple[str, bool], float]) -> list[Run]:
    """The runs at the tuned learning rates. A delta below 1 takes the rate of 0.2, another one that of 12.5."""

    def rate_of(name: str, setting: str) -> float:
        stale = SETTINGS[setting].is_stale
        if (name, stale) not in rates:
            reachable = name in ADAPTIVE or float(name.removeprefix("DRPO ")) < 1
            name = "DRPO 0.2" if reachable else "DRPO 12.5"
        return rates[name, stale]

    def runs(
        phase: str, names: Iterable[str], settings: Iterable[str], num_seeds: int, factor: float = 1.0
    ) -> list[Run]:
        return [
            Run(phase, name, setting, seed, factor * rate_of(name, setting))
            for seed in range(num_seeds)
            for setting in settings
            for name in names
        ]

    deltas = [f"DRPO {delta:g}" for delta in DELTAS]
    planned = runs("main", MAIN, SETTINGS, 5) + runs("delta", deltas, HARD_SETTINGS, 3)
    planned += runs("others", OTHERS, HARD_SETTINGS, 3) + runs("adaptive", ADAPTIVE, HARD_SETTINGS, 3)
    planned += runs("fast", MAIN, HARD_SETTINGS, 3, TOO_FAST) + runs("adaptive", ADAPTIVE, HARD_SETTINGS, 3, TOO_FAST)
    return list({run.key: run for run in reversed(planned)}.values())[::-1]


def row_of(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the results file."""
    return {"key": run.key, **asdict(run), **result}
