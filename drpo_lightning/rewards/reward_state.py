"""The state of a reward as data: what of it goes from process to process and into a checkpoint."""

import json
from typing import Any

from drpo_lightning.errors import SettingError
from drpo_lightning.rewards.base import Reward

MAX_STATE_BYTES = 48 * 2**10
"""Of the state as JSON: it travels with every sample, in an answer of at most 64 KiB."""


def reward_state(reward: Reward) -> dict[str, Any] | None:
    """What a reward returns as `state_dict()`; None if it has only the one of Lightning's callbacks, or none at all.

    Raises:
        SettingError: if JSON cannot hold it, or makes something else of it, or if it is too large.
    """
    method = getattr(type(reward), "state_dict", None)
    if method is None or method.__module__.startswith("lightning."):
        return None
    state: dict[str, Any] = reward.state_dict()  # type: ignore[attr-defined]
    what = f"the state of the reward {reward.name!r} must be"
    try:
        text = json.dumps(state)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{what} what JSON can hold: {error}") from error
    if json.loads(text) != state:
        raise SettingError(f"{what} what JSON can hold: lists in place of tuples, names that are texts")
    if len(text) > MAX_STATE_BYTES:
        raise SettingError(f"{what} at most {MAX_STATE_BYTES} bytes as JSON, got {len(text)}")
    return state
