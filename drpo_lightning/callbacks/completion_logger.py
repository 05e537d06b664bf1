"""Samples to read, in TensorBoard's text tab."""

from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.batch import Rollout
from drpo_lightning.callbacks.tensorboard import markdown_cell, markdown_table, tensorboard_writers
from drpo_lightning.rollout.hooks import RolloutHooks


class CompletionLogger(Callback, RolloutHooks):
    """Writes a table of prompts, completions and rewards of a rollout under the tag `completions`.

    Args:
        num_groups: prompts per table; all samples of each are shown.
        every_n_rollouts: writes a table of every n-th rollout, the first included.
        max_characters: longer prompts and completions are cut in the middle.
    """

    def __init__(self, num_groups: int = 2, every_n_rollouts: int = 10, max_characters: int = 1000) -> None:
        for name, value in (("num_groups", num_groups), ("every_n_rollouts", every_n_rollouts)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if max_characters < 2:
            raise ValueError(f"`max_characters` must be at least 2, got {max_characters}")
        self.num_groups = num_groups
        self.every_n_rollouts = every_n_rollouts
        self.max_characters = max_characters

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:  # noqa: ARG002
        """Writes the table."""
        rollouts_before = trainer.datamodule.iteration - 1  # type: ignore[attr-defined] # of a resumed run too
        if rollouts_before % self.every_n_rollouts == 0:
            table = completion_table(rollout, self.num_groups * rollout.group_size, self.max_characters)
            for writer in tensorboard_writers(trainer):
                writer.add_text("completions", table, trainer.global_step)


def completion_table(rollout: Rollout, num_rows: int, max_characters: int) -> str:
    """A Markdown table of the first completions of a rollout."""
    names = list(rollout.reward_parts)
    header = ["prompt", "completion", "finish", "tokens", *names, "reward"]
    rows = []
    for i in range(min(num_rows, len(rollout))):
        completion = rollout.completions[i]
        row = [
            markdown_cell(rollout.prompts[i], max_characters),
            markdown_cell(rollout.texts[i], max_characters),
            completion.finish_reason,
            str(len(completion.token_ids)),
            *(f"{float(rollout.reward_parts[name][i]):.3g}" for name in names),
            f"{float(rollout.rewards[i]):.3g}",
        ]
        rows.append(row)
    return markdown_table(header, rows)
