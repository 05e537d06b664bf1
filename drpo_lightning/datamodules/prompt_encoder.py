"""From a data set's rows to the token ids that the policy sees."""

from collections.abc import Sequence
from typing import Any, Literal

from drpo_lightning.errors import SettingError, loading_model

PromptFormat = Literal["raw", "chat"]


class PromptEncoder:
    """The policy's tokenizer, its stop tokens and its context, and prompts in its terms.

    Args:
        model: folder or hub name of the policy.
        prompt_format: `raw` takes a text as it is, `chat` as a user's message in the model's chat template.
        system_prompt: first message of a chat that does not begin with a system message of its own.
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
        with loading_model(model):
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

    def encode(self, rows: Sequence[dict[str, Any]], *, key: str) -> list[dict[str, Any]]:
        """Adds `prompt_ids` to every row, and makes `prompt` the text that the policy sees.

        Special tokens that a prompt has in its text become special tokens.

        Args:
            rows: rows with a `prompt`, a text or a list of chat messages.
            key: the setting that the rows come from, for errors.

        Raises:
            SettingError: if a prompt has no tokens or is not Unicode, if the model has no chat template or the template
                refuses a chat, or if there is a system prompt for prompts that are no chats.
        """
        encoded = []
        for i, row in enumerate(rows):
            place = f"`{key}`: prompt {i}"
            is_raw = isinstance(row["prompt"], str) and self.prompt_format == "raw"
            if is_raw and self.system_prompt is not None:
                raise SettingError(f"{place} is no chat, so `data.system_prompt` needs `data.prompt_format: chat`")
            text = row["prompt"] if is_raw else self._chat(row["prompt"], place)
            _check_unicode(text, place)
            # A chat template writes its special tokens itself.
            ids = self.tokenizer(text, add_special_tokens=is_raw).input_ids
            if not ids:
                raise SettingError(f"{place} has no tokens: {text!r}")
            encoded.append({**row, "prompt": text, "prompt_ids": ids})
        return encoded

    def _chat(self, prompt: str | list[dict[str, str]], place: str) -> str:
        """A chat in the model's template, up to where the answer begins."""
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if self.tokenizer.chat_template is None:
            raise SettingError(f"`model` {self.model!r} has no chat template; set `data.prompt_format: raw`")
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise SettingError(f"{place}: the chat template of {self.model!r} refuses it: {error}") from error


def _check_unicode(text: str, place: str) -> None:
    """Raises `SettingError` if a text holds half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SettingError(f"{place} is not Unicode: {error}") from error
