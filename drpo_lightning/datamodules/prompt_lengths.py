"""What becomes of prompts that are too long."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_info

from drpo_lightning.errors import SettingError

OverlongPolicy = Literal["raise", "drop"]


def without_overlong(
    rows: Sequence[dict[str, Any]],
    *,
    max_prompt_tokens: int | None,
    max_tokens: int,
    context_tokens: int,
    policy: OverlongPolicy,
    key: str,
) -> list[dict[str, Any]]:
    """The rows whose prompts are not too long; says how many are left out.

    Args:
        rows: rows with `prompt_ids`.
        max_prompt_tokens: most tokens of a prompt; None for what the context has room for.
        max_tokens: most tokens that a completion adds.
        context_tokens: most tokens of prompt and completion together.
        policy: whether prompts that are too long are left out, or an error.
        key: the setting that the rows come from.

    Raises:
        SettingError: if a prompt is too long, or with `drop` if all are.
    """
    room = context_tokens - max_tokens
    limit = room if max_prompt_tokens is None else min(room, max_prompt_tokens)
    kept = [row for row in rows if len(row["prompt_ids"]) <= limit]
    if len(kept) == len(rows):
        return kept
    if policy == "raise" or not kept:
        i, row = next((i, row) for i, row in enumerate(rows) if len(row["prompt_ids"]) > limit)
        length = len(row["prompt_ids"])
        why = (
            f"and may be continued by {max_tokens} (`sampling.max_tokens`), more than the context of {context_tokens}"
            if length > room
            else f"more than `data.max_prompt_tokens` {max_prompt_tokens}"
        )
        raise SettingError(
            f"`{key}`: prompt {i} has {length} tokens {why}; {len(rows) - len(kept)} of {len(rows)} prompts are too "
            "long. Shorten them, set `data.overlong_prompts: drop` to leave them out, or lower `sampling.max_tokens`. "
            f"It starts with {row['prompt'][:60]!r}"
        )
    rank_zero_info(
        f"`{key}`: {len(rows) - len(kept)} of {len(rows)} prompts have more than {limit} tokens and are left out"
    )
    return kept
