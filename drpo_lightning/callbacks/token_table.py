"""The tokens that the objective masks or corrects most, in TensorBoard's text tab."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from drpo_lightning.batch import RolloutBatch
from drpo_lightning.callbacks.tensorboard import markdown_cell, markdown_table, tensorboard_writers
from drpo_lightning.callbacks.update_statistics import CompletionTokens, completion_tokens
from drpo_lightning.ranks import of_all_ranks

HEADER = ("token id", "text", "count", "share", "mean w", "mean mu", "mean pi", "A > 0")
MAX_CHARACTERS = 100
NUM_SUMS = 5


class TokenCounts(NamedTuple):
    """Sums over the corrected tokens of each kind.

    Attributes:
        token_ids: the kinds of tokens, each once, in ascending order.
        sums: of each kind, how many there were and the sums of w, mu, pi and (A > 0).
        num_tokens: all completion tokens, corrected or not.
    """

    token_ids: Int[Tensor, " kinds"]
    sums: Float[Tensor, "kinds 5"]
    num_tokens: int


class TokenTable(Callback):
    """Writes a table of the tokens that were masked or corrected most over the last rollouts, as `tokens/corrected`.

    A token is one of them if the objective's mask drops it or its gradient weight w is negative; tokens with A = 0,
    which have no gradient, are left out. Of each kind: token id, text (quoted, so that white space shows), count, share
    in all that were masked or corrected, means of w, mu and pi, and the share of A > 0. Counted over all ranks.

    Args:
        num_tokens: most kinds of tokens in the table.
        every_n_rollouts: writes a table after every n-th rollout, of the n rollouts; after a resume in between on
            another number of ranks, of those since.

    Raises:
        ValueError: if a setting is not positive.
    """

    def __init__(self, num_tokens: int = 30, every_n_rollouts: int = 10) -> None:
        for name, value in (("num_tokens", num_tokens), ("every_n_rollouts", every_n_rollouts)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.num_tokens = num_tokens
        self.every_n_rollouts = every_n_rollouts
        self._counts = no_tokens(torch.device("cpu"))
        self._resumed: TokenCounts | None = None
        self._rank, self._num_ranks = 0, 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Notes which part of a checkpoint is this rank's."""
        self._rank, self._num_ranks = trainer.global_rank, trainer.world_size

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Counts from here on, or from where a checkpoint was saved, on the device of the policy."""
        self._counts, self._resumed = _moved(self._resumed or no_tokens(pl_module.device), pl_module.device), None

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401 - Lightning's signature; a StepOutput
        batch: RolloutBatch,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Counts the tokens of the micro-batch."""
        self._counts = merged([self._counts, corrected_tokens(completion_tokens(batch, outputs))])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the table if it is due. Collective over ranks."""
        if (trainer.current_epoch + 1) % self.every_n_rollouts:
            return
        ranks = self._of_all_ranks()
        self._counts = no_tokens(pl_module.device)
        for writer in tensorboard_writers(trainer):
            tokenizer = trainer.datamodule.encoder.tokenizer  # type: ignore[attr-defined]
            writer.add_text(
                "tokens/corrected", token_table(merged(ranks), tokenizer, self.num_tokens), trainer.global_step
            )

    def state_dict(self) -> dict[str, Any]:
        """What every rank has counted for the next table. Collective over ranks."""
        return {"ranks": [counts._asdict() for counts in self._of_all_ranks()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting from this rank's part of `state_dict`, if there are as many ranks."""
        ranks = state_dict["ranks"]
        self._resumed = TokenCounts(**ranks[self._rank]) if len(ranks) == self._num_ranks else None

    def _of_all_ranks(self) -> list[TokenCounts]:
        return of_all_ranks(_moved(self._counts, torch.device("cpu")), self._num_ranks)


def _moved(counts: TokenCounts, device: torch.device) -> TokenCounts:
    return TokenCounts(counts.token_ids.to(device), counts.sums.to(device), counts.num_tokens)


def no_tokens(device: torch.device) -> TokenCounts:
    """Counts to begin with."""
    ids = torch.zeros(0, dtype=torch.long, device=device)
    return TokenCounts(ids, torch.zeros(0, NUM_SUMS, dtype=torch.float64, device=device), 0)


def corrected_tokens(tokens: CompletionTokens) -> TokenCounts:
    """Counts the masked or corrected tokens of a micro-batch."""
    weight = tokens.grad_weight
    corrected = weight < 0 if tokens.keep is None else (weight < 0) | ~(tokens.keep | weight.isnan())
    chosen = corrected.nonzero().squeeze(1)
    columns = (
        torch.ones_like(weight),
        weight,
        tokens.rollout_logprobs.exp(),
        tokens.policy_logprobs.exp(),
        tokens.advantages > 0,
    )
    values = torch.stack([column[chosen].double() for column in columns], 1)
    return merged([TokenCounts(tokens.token_ids[chosen], values, len(weight))])


def merged(counts: list[TokenCounts]) -> TokenCounts:
    """Adds up what belongs to the same token."""
    ids = torch.cat([part.token_ids for part in counts])
    token_ids, kinds = torch.unique(ids, return_inverse=True)
    rows = torch.cat([part.sums for part in counts])
    sums = rows.new_zeros(len(token_ids), rows.shape[1]).index_add(0, kinds, rows)
    return TokenCounts(token_ids, sums, sum(part.num_tokens for part in counts))


def token_table(counts: TokenCounts, tokenizer: Any, num_tokens: int) -> str:  # noqa: ANN401
    """A Markdown table of the tokens that were corrected most often; a sentence if none was."""
    total = int(counts.sums[:, 0].sum())
    if not total:
        return f"None of {counts.num_tokens} tokens was masked or corrected."
    rows = []
    order = counts.sums[:, 0].argsort(descending=True, stable=True)[:num_tokens]
    for token_id, (count, *sums) in zip(counts.token_ids[order].tolist(), counts.sums[order].tolist(), strict=True):
        weight, mu, pi, positive = (value / count for value in sums)
        text = markdown_cell(repr(tokenizer.decode([token_id])), MAX_CHARACTERS)
        means = (f"{weight:.3g}", f"{mu:.3g}", f"{pi:.3g}", f"{positive:.1%}")
        rows.append([str(token_id), text, f"{count:.0f}", f"{count / total:.1%}", *means])
    share = f"{total} of {counts.num_tokens} tokens ({total / counts.num_tokens:.3%})"
    return f"{share} were masked or corrected.\n\n{markdown_table(HEADER, rows)}"
