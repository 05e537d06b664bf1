"""A penalty on completions that are about to be cut off."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer

from drpo_lightning.callbacks.rewards import RewardCallback
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch
from drpo_lightning.rewards.length import overlong_penalty


class OverlongReward(RewardCallback):
    """DAPO's soft overlong punishment: 0 up to `max_tokens - buffer_tokens`, then linearly down to -1 at `max_tokens`.

    It is added to the reward of the answer, so that a completion that is a little too long does not fall from right to
    wrong at one token. Formula and source: `drpo_lightning.rewards.length.overlong_penalty`. The paper has `max_tokens:
    20480` and `buffer_tokens: 4096`.

    Args:
        max_tokens: completion tokens from which on the penalty is -1; as a rule `data.sampling.max_tokens`.
        buffer_tokens: tokens before that over which it grows.
        weight: factor of this reward in the sum.
        name: what it is logged as.

    Raises:
        ValueError: if the buffer is not in [1, max_tokens].
    """

    def __init__(self, max_tokens: int, buffer_tokens: int, weight: float = 1.0, name: str = "overlong") -> None:
        super().__init__(weight, name)
        if not 1 <= buffer_tokens <= max_tokens:
            raise ValueError(f"`buffer_tokens` must be in [1, `max_tokens`] = [1, {max_tokens}], got {buffer_tokens}")
        self.max_tokens = max_tokens
        self.buffer_tokens = buffer_tokens

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuses a penalty that no completion can reach."""
        longest = trainer.datamodule.sampling.max_tokens  # type: ignore[attr-defined]
        if longest <= self.max_tokens - self.buffer_tokens:
            raise SettingError(
                f"the reward {self.name!r} starts beyond {self.max_tokens - self.buffer_tokens} tokens, which no "
                f"completion has: `data.sampling.max_tokens` is {longest}. Lower its `max_tokens`"
            )

    def score(self, batch: RewardBatch) -> Sequence[float | None]:
        """See `overlong_penalty`."""
        return [
            overlong_penalty(len(ids), max_tokens=self.max_tokens, buffer_tokens=self.buffer_tokens)
            for ids in batch.completion_ids
        ]
