"""From a data set's rows to the token ids that the policy sees."""

from collections.abc import Sequence
from typing import Any, Literal

from drpo_lightning.errors import SettingError

PromptFormat = Literal["raw", "chat"]


class PromptEncoder:
    """The policy's tokenizer, its stop tokens and its context, and prompts in its terms.

    Args:
        model: folder or hub name of the policy.
        prompt_format: `raw` takes a text as it is, `chat` as a user's message in the model's chat template.
        system_prompt: first message of a chat.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        SettingError: if the model has no end-of-sequence token.
    """

    def __init__(
        self, model: str, *, prompt_format: PromptFormat, system_prompt: str | None, trust_remote_code: bool
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        self.model = model
        self.prompt_format = prompt_format
        self.system_prompt = system_prompt
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        self.context_tokens = int(config.get_text_config().max_position_embeddings)
        self.vocabulary_size = int(config.get_text_config().vocab_size)
        """Tokens that the model has a row for; a padded vocabulary has more of them than the tokenizer knows."""
        try:
            configured = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:  # a model without generation_config.json stops at the tokenizer's token alone
            configured = None
        stop = {self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        self.stop_token_ids = sorted(token for token in stop if token is not None)
        if not self.stop_token_ids:
            raise SettingError(f"`model` {model!r} has no end-of-sequence token: no completion would end")

    @property
    def pad_token_id(self) -> int:
        """A token to fill up rows with; it is never attended to."""
        pad = self.tokenizer.pad_token_id
        return self.stop_token_ids[0] if pad is None else int(pad)

    def encode(
        self, rows: Sequence[dict[str, Any]], *, max_tokens: int, context_tokens: int, key: str
    ) -> list[dict[str, Any]]:
        """Adds `prompt_ids` to every row, and makes `prompt` the text that the policy sees.

        Args:
            rows: rows with a `prompt`, a text or a list of chat messages.
            max_tokens: most tokens that a completion adds.
            context_tokens: most tokens of prompt and completion together.
            key: the setting that the rows come from, for errors.

        Raises:
            SettingError: if a prompt has no tokens, is too long, or the model has no chat template.
        """
        encoded = []
        for i, row in enumerate(rows):
            is_raw = isinstance(row["prompt"], str) and self.prompt_format == "raw"
            text = row["prompt"] if is_raw else self._chat(row["prompt"])
            # A chat template writes its special tokens itself.
            ids = self.tokenizer(text, add_special_tokens=is_raw).input_ids
            if not ids:
                raise SettingError(f"`{key}`: prompt {i} has no tokens: {text!r}")
            if len(ids) + max_tokens > context_tokens:
                raise SettingError(
                    f"`{key}`: prompt {i} has {len(ids)} tokens and may be continued by {max_tokens} "
                    f"(`sampling.max_tokens`), more than the context of {context_tokens}: shorten or remove it, or "
                    f"lower `sampling.max_tokens`. It starts with {text[:60]!r}"
                )
            encoded.append({**row, "prompt": text, "prompt_ids": ids})
        return encoded

    def _chat(self, prompt: str | list[dict[str, str]]) -> str:
        """A chat in the model's template, up to where the answer begins."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system_prompt is not None:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if self.tokenizer.chat_template is None:
            raise SettingError(f"`model` {self.model!r} has no chat template; set `data.prompt_format: raw`")
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
