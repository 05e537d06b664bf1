"""Prompts as the model sees them: whatever the text, token ids or an error that names the prompt."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from drpo_lightning.datamodules.prompt_encoder import PromptEncoder
from drpo_lightning.errors import SettingError

TEMPLATE = (
    "{% if messages[-1].role != 'user' %}{{ raise_exception('the last message must be a user\\'s') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}>"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(chat_model):
    """Makes encoders of the small model with a chat template."""

    def make(prompt_format="raw", system_prompt=None):
        return PromptEncoder(
            chat_model, prompt_format=prompt_format, system_prompt=system_prompt, trust_remote_code=False
        )

    return make


@pytest.fixture(scope="module")
def raw(encoder):
    return encoder()


@pytest.fixture(scope="module")
def chat(encoder):
    return encoder("chat")


def encode(encoder, *prompts):
    return encoder.encode([{"prompt": prompt} for prompt in prompts], key="data.prompts")


PIECES = ["<eos>", "<pad>", "<unk>", "<|im_start|>", "</s>", " ", "\t\n", "\0", "\ufeff", "\u2028", "\ud800", "1+1="]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=5).map("".join), st.booleans())
def test_any_text_gives_tokens_or_an_error_that_names_the_prompt(raw, chat, text, is_chat):
    try:
        _, row = encode(chat if is_chat else raw, "1+1=", text)
    except SettingError as error:
        assert "`data.prompts`: prompt 1 " in str(error)  # noqa: PT017 - one of two outcomes
    else:
        assert row["prompt"] == (f"[user]{text.strip()}>" if is_chat else text)
        assert row["prompt_ids"]
        assert all(0 <= token < raw.vocabulary_size for token in row["prompt_ids"])


def test_half_of_a_surrogate_pair_is_refused(raw, chat):
    with pytest.raises(SettingError, match=r"prompt 1 is not Unicode: .* surrogates not allowed"):
        encode(raw, "1+1=", "1\ud800")
    with pytest.raises(SettingError, match="prompt 0 is not Unicode"):
        encode(chat, [{"role": "user", "content": "\udfff"}])


def test_white_space_is_a_prompt(raw, chat):
    assert encode(raw, "  ")[0]["prompt_ids"] == raw.tokenizer.convert_tokens_to_ids([" ", " "])
    assert encode(chat, "  ")[0]["prompt"] == "[user]>"


def test_special_tokens_in_a_text_are_special_tokens(raw):
    assert encode(raw, "1<eos>")[0]["prompt_ids"] == [raw.tokenizer.convert_tokens_to_ids("1"), 1]


def test_a_system_prompt_begins_every_chat_that_has_none_of_its_own(encoder):
    own = [{"role": "system", "content": "Subtract."}, {"role": "user", "content": "1-1="}]
    rows = encode(encoder("chat", "Add."), "1+1=", own, own[1:])
    assert [row["prompt"] for row in rows] == [
        "[system]Add.[user]1+1=>",
        "[system]Subtract.[user]1-1=>",
        "[system]Add.[user]1-1=>",
    ]


def test_a_system_prompt_without_a_chat_is_refused(encoder):
    with pytest.raises(SettingError, match=r"prompt 0 is no chat, so `data\.system_prompt` needs"):
        encode(encoder("raw", "Add."), "1+1=")


def test_a_chat_that_the_template_refuses_names_the_prompt(chat):
    with pytest.raises(SettingError, match=r"prompt 1: the chat template of .* refuses it: the last message must be"):
        encode(chat, "1+1=", [{"role": "assistant", "content": "2"}])


def test_other_columns_are_handed_on(raw):
    assert raw.encode([{"prompt": "1", "answer": None}], key="k")[0] == {
        "prompt": "1",
        "answer": None,
        "prompt_ids": [20],
    }
