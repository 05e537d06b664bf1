"""Updates with a number in them that is NaN or infinite: noticed by all ranks, written down, and never applied."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from drpo_lightning.batch import Rollout, RolloutBatch
from drpo_lightning.errors import NonFiniteError
from drpo_lightning.rollout.weights import WeightSource

PER_TOKEN = (
    "rollout_logprobs",
    "advantages",
    "proximal_logprobs",
    "reference_logprobs",
    "policy_logprobs",
    "objective_loss",
    "reference_penalty",
)
"""Numbers of every token, those that the others are computed from first."""
MAX_FILES = 10
"""Most files that a rank writes in a run."""
MAX_SAMPLES = 16
"""Most samples of a file, and of one rank in a message."""


class Suspects(NamedTuple):
    """The numbers of a micro-batch.

    Attributes:
        batch: the micro-batch without its most likely tokens, which may be many.
        values: those of `PER_TOKEN` that it has.
    """

    batch: RolloutBatch
    values: dict[str, Float[Tensor, "batch seq"]]

    def broken(self, name: str) -> Bool[Tensor, "batch seq"]:
        """True on the completion tokens whose number is NaN or infinite; nowhere if the micro-batch has none."""
        if name not in self.values:
            return torch.zeros_like(self.batch.completion_mask)
        return self.batch.completion_mask & ~self.values[name].isfinite()

    def all_rows(self) -> Bool[Tensor, " batch"]:
        """True for every sample."""
        return self.batch.sample_ids >= 0

    def broken_rows(self) -> Bool[Tensor, " batch"]:
        """True for the samples with such a number."""
        return torch.stack([self.broken(name) for name in self.values]).any(0).any(-1)


class NonFiniteWatch:
    """Watches the tokens, the loss and the gradient of every update, and decides which updates are left out.

    Args:
        max_skipped: updates in succession that are left out; the next one stops the run.
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.num_skipped = 0
        """Updates left out so far, those of the loss scaler included."""
        self._num_in_succession = 0
        self._num_files = 0
        self._micro_batches: list[Suspects] = []

    def start(self) -> None:
        """Forgets an update that was never completed."""
        self._micro_batches = []

    def add(self, batch: RolloutBatch, **values: Float[Tensor, "batch seq"] | None) -> None:
        """Keeps the numbers of a micro-batch until its update is judged.

        Args:
            batch: the micro-batch.
            values: those of `PER_TOKEN` that the batch does not hold.
        """
        given = {name: values.get(name, getattr(batch, name, None)) for name in PER_TOKEN}
        present = {name: value.detach() for name, value in given.items() if value is not None}
        self._micro_batches.append(Suspects(without_topk(batch), present))

    def must_skip(self, trainer: Trainer, source: WeightSource, *, loss: float | Tensor, grad_norm: float) -> bool:
        """Judges the update whose gradient is complete. Collective: every rank gets the same answer.

        Args:
            trainer: the trainer, before its optimizer's step.
            source: what has the weights.
            loss: this rank's part of the update's loss.
            grad_norm: of the whole gradient.

        Returns:
            True if the update has to be left out.

        Raises:
            NonFiniteError: on every rank, if that would be more than `max_skipped` in succession, or if the weights
                themselves are not finite.
        """
        micro_batches, self._micro_batches = self._micro_batches, []
        found = self._broken_numbers(trainer, micro_batches, loss=loss, grad_norm=grad_norm)
        if not found:
            self._num_in_succession = 0
            return False
        if found.keys() != {"gradient"} or not is_left_to_scaler(trainer):
            self._report(trainer, source, found, micro_batches)
            self._num_in_succession += 1
        self.num_skipped += 1
        return True

    def _broken_numbers(
        self, trainer: Trainer, micro_batches: Sequence[Suspects], *, loss: float | Tensor, grad_norm: float
    ) -> dict[str, int]:
        """What is NaN or infinite on any rank, causes first, and in how many tokens or ranks. Collective."""
        counts = [torch.stack([suspects.broken(name).sum() for suspects in micro_batches]).sum() for name in PER_TOKEN]
        totals = [torch.as_tensor(total, device=counts[0].device) for total in (loss, grad_norm)]
        counts += [~total.isfinite() for total in totals]
        sums = trainer.strategy.reduce(torch.stack([count.float() for count in counts]), reduce_op="sum").tolist()
        return {name: int(count) for name, count in zip((*PER_TOKEN, "loss", "gradient"), sums, strict=True) if count}

    def _report(
        self, trainer: Trainer, source: WeightSource, found: dict[str, int], micro_batches: Sequence[Suspects]
    ) -> None:
        """Writes the samples down, and says so in a warning, or in the error that stops the run. Collective."""
        is_localized = any(name in found for name in PER_TOKEN)
        chosen = [suspects.broken_rows() if is_localized else suspects.all_rows() for suspects in micro_batches]
        numbers = torch.cat([s.batch.sample_ids[rows] for s, rows in zip(micro_batches, chosen, strict=True)])
        where = samples_by_rank(trainer, numbers) if is_localized else "no sample of its own"
        weights_are_finite = source.weights_are_finite()
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "non_finite"
        update = trainer.global_step + 1
        if len(numbers) and self._num_files < MAX_FILES:
            self._num_files += 1
            rollout = getattr(trainer.datamodule, "rollout", None)  # type: ignore[attr-defined]
            records = sample_records(micro_batches, chosen, rollout)
            write_lines(islice(records, MAX_SAMPLES), folder / f"update_{update:06d}.rank{trainer.global_rank}.jsonl")
        names = [f"{name} ({found[name]} tokens)" if name in PER_TOKEN else name for name in found]
        reason = f"update {update} has NaN or infinite {', '.join(names)}, in {where}; see {folder}"
        if not weights_are_finite:
            raise NonFiniteError(
                f"{reason}. The weights are NaN or infinite themselves: the update before has spoilt them. Go on from "
                "an earlier checkpoint with a lower learning rate"
            )
        if self._num_in_succession >= self.max_skipped:
            raise NonFiniteError(
                f"{reason}. The weights are those before the update. If an engine, a reward or the reference is to "
                "blame, it is the samples that show it; else lower the learning rate or `trainer.gradient_clip_val`. "
                f"`model.max_skipped_updates` {self.max_skipped} is how many in succession are left out instead"
            )
        rank_zero_warn(f"{reason}. The update is left out; updates left out before it: {self.num_skipped}")

    def state_dict(self) -> dict[str, int]:
        """Counts of updates left out."""
        return {"num_skipped": self.num_skipped, "num_in_succession": self._num_in_succession}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on counting."""
        self.num_skipped, self._num_in_succession = state["num_skipped"], state["num_in_succession"]


def is_left_to_scaler(trainer: Trainer) -> bool:
    """True if an infinite gradient is float16's overflow, after which the loss scaler lowers its scale.

    At a scale of 1 or less there is nothing to scale down: the gradient itself is too large.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1


def without_topk(batch: RolloutBatch) -> RolloutBatch:
    """The same micro-batch without its most likely tokens."""
    fields = {name: value for name, value in vars(batch).items() if not name.startswith("topk_")}
    return RolloutBatch(**fields)


def samples_by_rank(trainer: Trainer, numbers: Tensor) -> str:
    """The first few samples of each rank, in words. Collective.

    Args:
        trainer: the trainer.
        numbers: of this rank's samples.
    """
    first = torch.full((MAX_SAMPLES,), -1, dtype=torch.long, device=numbers.device)
    first[: len(numbers)] = numbers[:MAX_SAMPLES]
    rows = trainer.strategy.all_gather(first).view(trainer.world_size, -1).tolist()
    named = {rank: sorted(number for number in row if number >= 0) for rank, row in enumerate(rows)}
    return " and ".join(f"samples {samples} of rank {rank}" for rank, samples in named.items() if samples)


def sample_records(
    micro_batches: Sequence[Suspects], chosen: Sequence[Bool[Tensor, " batch"]], rollout: Rollout | None
) -> Iterator[dict[str, Any]]:
    """Yields what is known of some samples, as JSON holds it.

    Args:
        micro_batches: of an update.
        chosen: True for the samples of each.
        rollout: what they are samples of, for texts and rewards; None leaves these out.
    """
    for suspects, rows in zip(micro_batches, chosen, strict=True):
        for row in rows.nonzero()[:, 0].tolist():
            number = int(suspects.batch.sample_ids[row])
            texts = {} if rollout is None else sample_texts(rollout, number)
            yield {"sample_id": number, **texts, **token_record(suspects, row)}


def sample_texts(rollout: Rollout, number: int) -> dict[str, Any]:
    """Prompt, completion and reward of a sample."""
    reward = json_number(float(rollout.rewards[number]))
    return {"prompt": rollout.prompts[number], "completion": rollout.texts[number], "reward": reward}


def token_record(suspects: Suspects, row: int) -> dict[str, Any]:
    """The tokens of a sample and their numbers."""
    batch = suspects.batch
    completion = batch.completion_mask[row]
    broken = {name: suspects.broken(name)[row][completion].nonzero()[:, 0].tolist() for name in suspects.values}
    return {
        "not_finite_at": {name: places for name, places in broken.items() if places},
        "prompt_ids": batch.input_ids[row][batch.attention_mask[row] & ~completion].tolist(),
        "token_ids": batch.input_ids[row][completion].tolist(),
        **{
            name: [json_number(value) for value in values[row][completion].tolist()]
            for name, values in suspects.values.items()
        },
    }


def json_number(value: float) -> float | str:
    """The number, or `nan`, `inf` or `-inf`, which JSON has no numbers for and `float` reads."""
    return value if math.isfinite(value) else str(value)


def write_lines(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes JSON Lines, in a folder that is made for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
