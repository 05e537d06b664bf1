"""A reward model: a sequence classifier with one output."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from drpo_lightning.callbacks.fallible_reward import FallibleReward, OnFailure
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch, RewardFailure, RewardSample
from drpo_lightning.rewards.base import RewardOutcome


class RewardModelReward(FallibleReward):
    """The output of a reward model, an `AutoModelForSequenceClassification` with one label, as it is.

    Every rank has a copy, which stays loaded, in evaluation mode and without gradients. It is in no checkpoint.

    ```yaml
    - class_path: drpo_lightning.callbacks.RewardModelReward
      init_args: {model: Skywork/Skywork-Reward-V2-Qwen3-0.6B, prompt_column: question, dtype: bfloat16}
    ```

    Args:
        model: folder or hub name of the reward model.
        input_format: `chat` puts prompt and completion into the reward model's chat template, as messages of a user and
            an assistant; `raw` joins the two texts.
        prompt_column: column of the data set that the prompt is taken from, a text or, for `chat`, a list of messages;
            by default what the policy saw, which for a chat has the marks of the policy's own template in it.
        batch_size: texts that are scored together.
        max_tokens: a longer text is a failure; by default the reward model's context.
        device: where the model is, such as `cuda:1`; by default the trainer's device.
        dtype: of its weights: `auto`, as saved, or `float32`, `bfloat16`, `float16`.
        weight: factor of this reward in the sum.
        name: what it is logged as.
        trust_remote_code: whether code that comes with the model may run.
        on_failure: see `FallibleReward`.
        failure_score: see `FallibleReward`.
        max_stored_failures: see `FallibleReward`.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        model: str,
        input_format: Literal["chat", "raw"] = "chat",
        prompt_column: str | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        device: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        weight: float = 1.0,
        name: str = "reward_model",
        trust_remote_code: bool = False,
        on_failure: OnFailure = "raise",
        failure_score: float | None = None,
        max_stored_failures: int = 100,
    ) -> None:
        super().__init__(weight, name, on_failure, failure_score, max_stored_failures)
        for key, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"`{key}` must be at least 1, got {value}")
        if input_format not in ("chat", "raw"):
            raise ValueError(f"`input_format` must be chat or raw, got {input_format!r}")
        self.model = model
        self.input_format = input_format
        self.prompt_column = prompt_column
        self.required_columns = () if prompt_column is None else (prompt_column,)
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code
        self._classifier: Any = None
        self._tokenizer: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads the model. Collective."""
        super().setup(trainer, pl_module, stage)
        self.device = self.device or trainer.strategy.root_device
        self._load()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Gives the model back."""
        self.close()

    def close(self) -> None:
        """Gives the model back."""
        self._classifier = None

    def _load(self) -> None:
        """Loads the reward model and its tokenizer, unless they are.

        Raises:
            SettingError: if it is no reward model, or cannot be used as the settings say.
        """
        if self._classifier is not None:
            return
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=self.trust_remote_code)
            classifier, loading = AutoModelForSequenceClassification.from_pretrained(
                self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise SettingError(f"the reward model {self.model!r} cannot be loaded: {error}") from error
        if missing := sorted(loading["missing_keys"]):
            raise SettingError(f"{self.model!r} is no reward model: it has no weights for {missing[:3]}")
        if classifier.config.num_labels != 1:
            raise SettingError(
                f"the reward model {self.model!r} must have one label, got {classifier.config.num_labels}"
            )
        if self.input_format == "chat" and self._tokenizer.chat_template is None:
            raise SettingError(f"the reward model {self.model!r} has no chat template; set `input_format: raw`")
        self._set_padding(classifier.config.get_text_config())
        self._classifier = classifier.eval().to(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def _set_padding(self, config: Any) -> None:  # noqa: ANN401
        """Makes tokenizer and classifier, which reads its score off the last token that is no padding, agree."""
        pad = config.pad_token_id if config.pad_token_id is not None else self._tokenizer.pad_token_id
        if pad is None and self.batch_size > 1:
            raise SettingError(f"the reward model {self.model!r} has no padding token; set `batch_size: 1`")
        config.pad_token_id = pad
        context = getattr(config, "max_position_embeddings", None)
        self._longest = min(value for value in (self.max_tokens, context, float("inf")) if value is not None)

    def outcomes(self, batch: RewardBatch) -> Sequence[RewardOutcome]:
        """Scores the completions, texts of similar length together."""
        self._load()
        token_ids = [self._token_ids(batch.sample(i)) for i in range(len(batch))]
        outcomes: list[RewardOutcome] = [
            RewardFailure("error", f"has {len(ids)} tokens of the reward model, more than {self._longest}")
            for ids in token_ids
        ]
        by_length = sorted(range(len(batch)), key=lambda i: len(token_ids[i]))
        fitting = [i for i in by_length if len(token_ids[i]) <= self._longest]
        for start in range(0, len(fitting), self.batch_size):
            chosen = fitting[start : start + self.batch_size]
            for i, score in zip(chosen, self._scores([token_ids[i] for i in chosen]), strict=True):
                outcomes[i] = score
        return outcomes

    def _token_ids(self, sample: RewardSample) -> list[int]:
        """Prompt and completion as the reward model's tokens."""
        prompt = sample.prompt if self.prompt_column is None else sample.columns[self.prompt_column]
        if self.input_format == "raw":
            return list(self._tokenizer(f"{prompt}{sample.completion}").input_ids)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages.append({"role": "assistant", "content": sample.completion})
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def _scores(self, token_ids: Sequence[Sequence[int]]) -> list[float]:
        """The reward model's output for some texts."""
        longest = max(map(len, token_ids))
        pad = self._classifier.config.get_text_config().pad_token_id
        input_ids = torch.tensor([[*ids, *([pad] * (longest - len(ids)))] for ids in token_ids])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in token_ids])
        device = self._classifier.device
        logits = self._classifier(input_ids=input_ids.to(device), attention_mask=mask.to(device)).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores
