"""From rows of a data set and what the engine sampled after them to a scored rollout."""

from collections.abc import Mapping, Sequence
from typing import Any

from drpo_lightning.batch import Completion, Rollout
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards.base import Reward, RewardBatch
from drpo_lightning.rewards.scoring import combine_rewards, score_rewards


def scored_rollout(
    rows: Sequence[dict[str, Any]],
    row_numbers: Sequence[int],
    groups: Sequence[Sequence[Completion]],
    *,
    columns: Sequence[str],
    num_samples: int,
    tokenizer: Any,  # noqa: ANN401
    rewards: Sequence[Reward],
) -> Rollout:
    """Decodes and scores the completions of some prompts.

    Args:
        rows: the prompts, encoded, with the data set's other columns.
        row_numbers: which rows of the data set they are.
        groups: completions of each prompt.
        columns: the data set's other columns.
        num_samples: how many completions a prompt has.
        tokenizer: the policy's.
        rewards: what scores.

    Raises:
        RewardError: if a reward fails.
    """
    completions = [completion for group in groups for completion in group]
    repeated = [row for row in rows for _ in range(num_samples)]
    # transformers takes an empty batch for one empty sequence.
    texts = tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True) if completions else []
    batch = RewardBatch(
        prompts=[row["prompt"] for row in repeated],
        completions=texts,
        completion_ids=[completion.token_ids for completion in completions],
        finish_reasons=[completion.finish_reason for completion in completions],
        columns={name: [row.get(name) for row in repeated] for name in columns},
    )
    scores = score_rewards(rewards, batch)
    return Rollout(
        prompts=list(batch.prompts),
        prompt_ids=[row["prompt_ids"] for row in repeated],
        completions=completions,
        texts=list(batch.completions),
        columns={name: list(values) for name, values in batch.columns.items()},
        group_size=num_samples,
        rewards=combine_rewards(scores.parts, {reward.name: reward.weight for reward in rewards}, scores.dropped),
        reward_parts=scores.parts,
        reward_errors=scores.errors,
        reward_timeouts=scores.timeouts,
        prompt_numbers=[number for number in row_numbers for _ in range(num_samples)],
        answers=_answers(rewards, batch),
    )


def _answers(rewards: Sequence[Reward], batch: RewardBatch) -> list[str | None] | None:
    """What the first reward that knows of answers takes each completion's to be."""
    for reward in rewards:
        if (answers := reward.answers(batch)) is not None:
            return list(answers)
    return None


def column_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What rows of a data set have beside the prompt."""
    return sorted(set().union(*rows) - {"prompt", "prompt_ids"})


def check_columns(rows: Sequence[Mapping[str, Any]], rewards: Sequence[Reward], key: str) -> None:
    """Raises `SettingError` if a row of the setting `key` is nothing that a reward can score completions of."""
    for reward in rewards:
        for i, row in enumerate(rows):
            if missing := [name for name in reward.required_columns if name not in row]:
                raise SettingError(
                    f"`{key}`: row {i} has no column {missing[0]!r}, which the reward {reward.name!r} needs; "
                    f"it has {sorted(row)}"
                )
            try:
                reward.check_row(row)
            except ValueError as error:
                raise SettingError(f"`{key}`: row {i}: reward {reward.name!r}: {error}") from error
