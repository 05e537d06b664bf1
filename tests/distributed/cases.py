"""What is trained, and in how many ways: a problem has one result, however it is laid out."""

from dataclasses import dataclass
from typing import Literal

from drpo_lightning.objectives import DPPO, DRPO, Objective

DELTA = 0.2
THRESHOLD = 0.2
HORIZON = 24


@dataclass(frozen=True)
class Problem:
    """What decides the result of a training.

    Args:
        objective: what is maximised.
        aggregation: how per-token losses become one number.
        clip: largest norm of the gradient; None does not clip.
        masked: quarters of each update's samples without a completion token. Of two ranks the second has the last
            two.
        learning_rate: of SGD.
    """

    objective: Objective
    aggregation: Literal["token_mean", "seq_mean_token_sum_norm"] = "token_mean"
    clip: float | None = None
    masked: tuple[int, ...] = ()
    learning_rate: float = 1e-3


PROBLEMS = {
    "drpo": Problem(DRPO(DELTA)),
    "dppo_clipped": Problem(DPPO("binary_tv", THRESHOLD), "seq_mean_token_sum_norm", clip=0.5, learning_rate=0.02),
    "masked_rank": Problem(DRPO(DELTA), clip=0.5, masked=(2, 3), learning_rate=0.02),
    "masked_micro_batch": Problem(DPPO("binary_tv", THRESHOLD), masked=(3,)),
    "small_steps": Problem(DPPO("binary_tv", THRESHOLD), clip=0.5, learning_rate=1e-6),
}


@dataclass(frozen=True)
class Case:
    """One training.

    Args:
        problem: key of `PROBLEMS`.
        strategy: `single` is one rank, the others are two.
        accumulate: micro-batches of an update, on each rank.
        precision: of the trainer.
        checkpointing: computes activations again in the backward pass.
    """

    problem: str
    strategy: Literal["single", "ddp", "fsdp2", "fsdp1"]
    accumulate: int = 1
    precision: Literal["32-true", "bf16-mixed", "bf16-true"] = "32-true"
    checkpointing: bool = False

    def __str__(self) -> str:
        layout = f"{self.problem}-{self.strategy}-{self.accumulate}-{self.precision}"
        return f"{layout}-checkpointing" if self.checkpointing else layout

    @property
    def num_ranks(self) -> int:
        """Processes that train together."""
        return 1 if self.strategy == "single" else 2

    @property
    def num_parts(self) -> int:
        """Micro-batches of an update over all ranks: where it is equal, micro-batches are equal."""
        return self.num_ranks * self.accumulate


LAYOUTS = [
    ("drpo", 1, False),
    ("drpo", 4, False),
    ("drpo", 9, False),  # of 8 samples on each rank: the last is empty
    ("dppo_clipped", 2, True),
    ("masked_rank", 1, False),
    ("masked_micro_batch", 2, False),
]
IN_FLOAT32 = [
    *(Case("drpo", "single", n) for n in (1, 2, 8)),
    Case("dppo_clipped", "single", 1),
    Case("dppo_clipped", "single", 4, checkpointing=True),
    Case("masked_rank", "single", 2),
    *(Case("masked_micro_batch", "single", n) for n in (1, 4)),
    *(
        Case(problem, strategy, n, checkpointing=checkpointing)
        for strategy in ("ddp", "fsdp2", "fsdp1")
        for problem, n, checkpointing in LAYOUTS
    ),
]
IN_BFLOAT16 = [
    case
    for strategy in ("single", "ddp", "fsdp2")
    for case in (
        Case("drpo", strategy, 2, "bf16-mixed"),
        Case("dppo_clipped", strategy, 1, "bf16-mixed", checkpointing=True),
        Case("small_steps", strategy, 2, "bf16-true"),
    )
]
CASES = [*IN_FLOAT32, *IN_BFLOAT16]
