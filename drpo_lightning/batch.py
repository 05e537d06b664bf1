"""The data that travels: how tokens are sampled, what an engine returns, a scored rollout, and what is trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_tokens: most tokens of a completion, the end-of-sequence token included.
        temperature: the logits are divided by it; 0 is greedy and only of use in validation.
        top_p: share of the probability that tokens are drawn from, in (0, 1].
        top_k: number of tokens that are drawn from; 0 is all.

    Raises:
        ValueError: if a setting is out of range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"`sampling.max_tokens` must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`sampling.temperature` must be 0 or positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`sampling.top_p` must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"`sampling.top_k` must be 0 (all tokens) or positive, got {self.top_k}")

    @property
    def is_full_distribution(self) -> bool:
        """True if every token of the vocabulary can be drawn, so that pi and mu have the same support."""
        return self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class Completion:
    """What an engine sampled after one prompt.

    Args:
        token_ids: sampled tokens; the end-of-sequence token is one of them if it was drawn.
        logprobs: log mu of each token, in nats, of the distribution that was sampled from.
        finish_reason: `stop` after an end-of-sequence token, `length` if it was cut off.
        topk_ids: the K most likely tokens under mu at each position, most likely first; None if not asked for.
        topk_logprobs: log mu of those, in nats.
        weights_version: number of the oldest weights that a token can have been drawn with, see
            `Rollout.weights_version`; None if all were drawn with the newest.

    Raises:
        ValueError: if there is not one logprob per token, or not one row of the top K.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    topk_ids: Int[Tensor, "tokens k"] | None = field(default=None, compare=False)
    topk_logprobs: Float[Tensor, "tokens k"] | None = field(default=None, compare=False)
    weights_version: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"a completion of {len(self.token_ids)} tokens has {len(self.logprobs)} logprobs")
        for name in ("topk_ids", "topk_logprobs"):
            if (topk := getattr(self, name)) is not None and len(topk) != len(self.token_ids):
                raise ValueError(f"a completion of {len(self.token_ids)} tokens has {len(topk)} rows of `{name}`")

    @property
    def is_truncated(self) -> bool:
        """True if the completion was cut off before an end-of-sequence token."""
        return self.finish_reason == "length"


@dataclass
class Rollout:
    """Completions of one rank's prompts with their rewards; the samples of a prompt stand next to each other.

    Args:
        prompts: text of each prompt, once per sample.
        prompt_ids: token ids of each prompt, once per sample.
        completions: what the engine returned, one per sample.
        texts: decoded completions without special tokens.
        columns: the data set's other columns, one value per sample.
        group_size: samples per prompt.
        rewards: weighted sum of the rewards, one per sample; NaN for a sample that is dropped: a reward failed on it,
            and it is left out of its group and of the training.
        reward_parts: each reward by name, one value per sample, NaN where it does not apply or has dropped the sample.
        prompt_numbers: row of the data set that each prompt is, once per sample.
        proximal_logprobs: log pi_prox of each sampled token, in nats, under the trainer's weights of the rollout, one
            list per sample; None if no objective asks for it.
        reference_logprobs: log pi_ref of each sampled token, in nats, under the frozen reference model, one list per
            sample; None without a reference.
        reference_penalties: what the divergence from the reference takes off each reward, one value per sample, in
            units of reward; None if it takes nothing. `rewards` is without it.
        reward_errors: True where a reward failed for any reason but time, one value per sample, by its name; of the
            rewards that may fail.
        reward_timeouts: True where a reward took too long, likewise.
        answers: final answer of each completion, equal texts for equal answers, None where there is none; None if no
            reward says what an answer is.
        weights_version: number of the newest weights that the engine had when the rollout was complete: rollouts that
            they were trained on.
        positions: number of each prompt among those of all rollouts, once per sample; empty in a validation.
        masks_truncated: True if completions that were cut off count in their groups, but are not trained on.
    """

    prompts: list[str]
    prompt_ids: list[list[int]]
    completions: list[Completion]
    texts: list[str]
    columns: dict[str, list[Any]]
    group_size: int
    rewards: Float[Tensor, " samples"]
    reward_parts: dict[str, Float[Tensor, " samples"]] = field(default_factory=dict)
    prompt_numbers: list[int] = field(default_factory=list)
    proximal_logprobs: list[list[float]] | None = None
    reference_logprobs: list[list[float]] | None = None
    reference_penalties: Float[Tensor, " samples"] | None = None
    reward_errors: dict[str, Bool[Tensor, " samples"]] = field(default_factory=dict)
    reward_timeouts: dict[str, Bool[Tensor, " samples"]] = field(default_factory=dict)
    answers: list[str | None] | None = None
    weights_version: int = 0
    positions: list[int] = field(default_factory=list)
    masks_truncated: bool = False

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def num_completion_tokens(self) -> int:
        """Sampled tokens of all completions."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, prompt and completion."""
        pairs = zip(self.prompt_ids, self.completions, strict=True)
        return [len(prompt) + len(completion.token_ids) for prompt, completion in pairs]

    @property
    def staleness(self) -> Int[Tensor, " samples"]:
        """Weight syncs between the oldest weights that each sample was drawn with and the newest synced ones.

        One sync is counted for each rollout that was trained on in between.
        """
        newest = self.weights_version
        versions = (completion.weights_version for completion in self.completions)
        return torch.tensor([0 if version is None else newest - version for version in versions], dtype=torch.long)

    @property
    def is_kept(self) -> Bool[Tensor, " samples"]:
        """False on the samples that are dropped."""
        return ~self.rewards.isnan()

    @property
    def is_trained(self) -> Bool[Tensor, " samples"]:
        """False on the samples that are dropped, or masked since they were cut off."""
        if not self.masks_truncated:
            return self.is_kept
        return self.is_kept & torch.tensor([not completion.is_truncated for completion in self.completions])

    @property
    def group_rewards(self) -> Float[Tensor, "groups samples"]:
        """Rewards, a row per prompt; NaN on dropped samples."""
        return self.rewards.view(-1, self.group_size)

    @property
    def has_equal_rewards(self) -> Bool[Tensor, " groups"]:
        """True for prompts whose samples, without dropped ones, have one reward, and so no advantage."""
        rewards = self.group_rewards
        return rewards.nan_to_num(nan=torch.inf).amin(1) >= rewards.nan_to_num(nan=-torch.inf).amax(1)

    @property
    def has_signal(self) -> Bool[Tensor, " groups"]:
        """True for prompts whose samples differ in their rewards, if any of them is trained on."""
        return ~self.has_equal_rewards & self.is_trained.view(-1, self.group_size).any(1)

    @property
    def penalized_rewards(self) -> Float[Tensor, " samples"]:
        """What advantages are taken of: the rewards less what the divergence from the reference takes off."""
        return self.rewards if self.reference_penalties is None else self.rewards - self.reference_penalties


@dataclass
class RolloutBatch:
    """One micro-batch: the padded sequences, what the engine said of them, and the size of the whole update.

    Every `[batch, seq]` tensor is aligned with `input_ids`: entry t speaks of token t.
    (Not frozen: Lightning's transfer to a device sets the fields.)

    Args:
        input_ids: prompt and completion, padded on the right.
        attention_mask: True on prompt and completion, False on padding.
        completion_mask: True on sampled tokens; nowhere in the row of a dropped or masked sample.
        rollout_logprobs: log mu in nats, 0 outside the completions.
        advantages: A of each token, in units of reward, 0 outside the completions.
        num_update_tokens: completion tokens of the optimizer update, over all its micro-batches and ranks.
        num_update_sequences: sequences of the optimizer update, over all its micro-batches and ranks; like the tokens,
            without dropped and masked samples.
        sample_ids: which sample of this rank's rollout each row is; -1 for the row of an empty micro-batch.
        proximal_logprobs: log pi_prox in nats, 0 outside the completions; None if no objective asks for it.
        topk_ids: the K most likely tokens under mu, 0 outside the completions; None if no objective asks for them.
        topk_logprobs: log mu of those, in nats, 0 outside the completions.
        reference_logprobs: log pi_ref in nats, 0 outside the completions; None without a reference.

    Raises:
        ValueError: if shapes differ: a `[batch]` advantage would silently broadcast along `seq` when batch = seq.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Bool[Tensor, "batch seq"]
    completion_mask: Bool[Tensor, "batch seq"]
    rollout_logprobs: Float[Tensor, "batch seq"]
    advantages: Float[Tensor, "batch seq"]
    num_update_tokens: int
    num_update_sequences: int
    sample_ids: Int[Tensor, " batch"]
    proximal_logprobs: Float[Tensor, "batch seq"] | None = None
    topk_ids: Int[Tensor, "batch seq k"] | None = None
    topk_logprobs: Float[Tensor, "batch seq k"] | None = None
    reference_logprobs: Float[Tensor, "batch seq"] | None = None

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        if len(shape) != 2:
            raise ValueError(f"`input_ids` must be [batch, seq], got {list(shape)}")
        required = ("attention_mask", "completion_mask", "rollout_logprobs", "advantages")
        for name in (*required, "proximal_logprobs", "reference_logprobs"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"`{name}` must have the shape of `input_ids` {list(shape)}, got {list(tensor.shape)}")

    @staticmethod
    def collate(
        rollout: Rollout,
        rows: list[int],
        advantages: Float[Tensor, " samples"] | None,
        *,
        pad_token_id: int,
        num_update_tokens: int,
        num_update_sequences: int,
    ) -> "RolloutBatch":
        """Pads the samples `rows` of a rollout to the longest of them.

        The row of a dropped or masked sample has no completion tokens: nothing is trained on it, and no statistic
        counts it. An empty micro-batch has such a row too, of one token, since a network that is spread over ranks
        takes all of them.

        Args:
            rollout: the samples.
            rows: indices of the samples; may be empty.
            advantages: A of every sample of the rollout. None for a batch that is only scored: its advantages are 0,
                and dropped and masked samples are like the others.
            pad_token_id: id that fills `input_ids`; it is never attended to.
            num_update_tokens: see the class.
            num_update_sequences: see the class.
        """
        sequences = [rollout.prompt_ids[row] + rollout.completions[row].token_ids for row in rows]
        shape = (max(len(rows), 1), max(map(len, sequences), default=1))
        batch = RolloutBatch(
            input_ids=torch.full(shape, pad_token_id),
            attention_mask=torch.zeros(shape, dtype=torch.bool),
            completion_mask=torch.zeros(shape, dtype=torch.bool),
            rollout_logprobs=torch.zeros(shape),
            advantages=torch.zeros(shape),
            num_update_tokens=num_update_tokens,
            num_update_sequences=num_update_sequences,
            sample_ids=torch.tensor(rows or [-1]),
        )
        recomputed = {
            name: logprobs
            for name in ("proximal_logprobs", "reference_logprobs")
            if (logprobs := getattr(rollout, name)) is not None
        }
        for name in recomputed:
            setattr(batch, name, torch.zeros(shape))
        if (topk := rollout.completions[0].topk_ids) is not None:
            batch.topk_ids = torch.zeros(*shape, topk.shape[1], dtype=torch.long)
            batch.topk_logprobs = torch.zeros(*shape, topk.shape[1])
        batch.attention_mask[0, 0] = True  # of an empty micro-batch too
        is_trained = rollout.is_trained.tolist()
        for i, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            completion = slice(len(rollout.prompt_ids[row]), len(sequence))
            batch.input_ids[i, : len(sequence)] = torch.tensor(sequence)
            batch.attention_mask[i, : len(sequence)] = True
            if advantages is not None and not is_trained[row]:
                continue
            batch.completion_mask[i, completion] = True
            batch.rollout_logprobs[i, completion] = torch.tensor(rollout.completions[row].logprobs)
            if advantages is not None:
                batch.advantages[i, completion] = advantages[row]
            for name, logprobs in recomputed.items():
                getattr(batch, name)[i, completion] = torch.tensor(logprobs[row])
            sampled = rollout.completions[row]
            if sampled.topk_ids is not None and sampled.topk_logprobs is not None:
                assert batch.topk_ids is not None and batch.topk_logprobs is not None  # noqa: PT018
                batch.topk_ids[i, completion] = sampled.topk_ids
                batch.topk_logprobs[i, completion] = sampled.topk_logprobs
        return batch


class ValidationBatch:
    """Scored completions of the validation prompts: `num_samples` of each prompt.

    Not a dataclass: Lightning's precisions look into those for tensors, and stop at the frozen ones inside.

    Args:
        rollout: the completions and rewards, grouped by prompt.
        subsets: which of the rollout's prompts belong to each subset of the data; every rank has every name.
    """

    def __init__(self, rollout: Rollout, subsets: Mapping[str, Sequence[int]]) -> None:
        self.rollout = rollout
        self.subsets = subsets
