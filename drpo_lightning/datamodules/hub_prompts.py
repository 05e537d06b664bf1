"""Prompts from the Hugging Face hub, or from a folder."""

import os
from pathlib import Path
from typing import Any

from drpo_lightning.datamodules.prompts import PromptSource, rows_with_prompts
from drpo_lightning.errors import SettingError


class HubPrompts(PromptSource):
    """Prompts from a data set on the Hugging Face hub, from a local folder of one, or from `save_to_disk`.

    Args:
        name: name on the hub, `owner/name`, or a folder.
        split: its split, with slices as `datasets` writes them: `train[:1000]`. A folder of `save_to_disk` has whole
            splits only; one without names for them is `train`.
        config: its configuration, if it has several.
        prompt_column: column that holds the prompt, a text or a list of chat messages.
        columns: columns that rewards need, by the name that they get: `{answer: solution}` hands the column
            `solution` on as `answer`. Every row must have them. Other columns keep their names.
        suffix: text that is added to every prompt, such as how the answer is to be written.
        revision: commit, branch or tag on the hub; by default the newest.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        config: str | None = None,
        prompt_column: str = "prompt",
        columns: dict[str, str] | None = None,
        suffix: str = "",
        revision: str | None = None,
    ) -> None:
        self.name = os.path.expanduser(name)
        self.split = split
        self.config = config
        self.prompt_column = prompt_column
        self.columns = columns or {}
        self.suffix = suffix
        self.revision = revision

    def load(self) -> list[dict[str, Any]]:
        """See `PromptSource.load`."""
        try:
            rows = [(f"row {number}", row) for number, row in enumerate(self._data_set())]
        except SettingError:
            raise
        except Exception as error:  # anything: of the hub's client, and of as many loaders as there are formats
            raise SettingError(
                f"the data set {self.name!r} (config {self.config!r}, split {self.split!r}) cannot be loaded: "
                f"{type(error).__name__}: {error}. Check its name, or download it and give its folder as `name`"
            ) from error
        return rows_with_prompts(
            rows,
            prompt_column=self.prompt_column,
            columns=self.columns,
            suffix=self.suffix,
            origin=f"{self.name} ({self.split})",
        )

    def _data_set(self) -> Any:  # noqa: ANN401 - datasets.Dataset
        from datasets import DatasetDict, load_dataset, load_from_disk

        if not any((Path(self.name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return load_dataset(self.name, self.config, split=self.split, revision=self.revision)
        saved = load_from_disk(self.name)
        splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
        if self.split not in splits:
            raise SettingError(
                f"the data set {self.name!r} was written by `save_to_disk` and has the splits {sorted(splits)}, "
                f"got `split` {self.split!r}"
            )
        return splits[self.split]
