"""A real, small sequence classifier as a reward."""

import logging

import pytest
import torch

from drpo_lightning.callbacks import RewardModelReward
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch, RewardFailure

TEMPLATE = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '. ' }}{% endfor %}"
CHAT = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+2"}]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, model_folder):
    """Writes a classifier with random weights and the small model's tokenizer; `changes` are of its configuration."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    def write(name, template=TEMPLATE, pad_token="<pad>", **changes):
        folder = tmp_path_factory.getbasetemp() / name
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        settings = {"num_labels": 1, "vocab_size": 98, "max_position_embeddings": 64, "initializer_range": 0.5}
        config = LlamaConfig(**(sizes | settings | {"pad_token_id": None} | changes))
        LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        tokenizer.chat_template, tokenizer.pad_token = template, pad_token
        tokenizer.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture(scope="module")
def reward_model(classifier):
    return classifier("reward_model")


def batch(*completions, prompt="1+2=", **columns):
    n = len(completions)
    values = {name: [value] * n for name, value in columns.items()}
    return RewardBatch([prompt] * n, completions, [[1]] * n, ["stop"] * n, values)


def reference(folder, texts):
    """Scores of texts, one at a time: without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0]) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_are_those_of_the_model_one_at_a_time_whatever_the_batches(reward_model, batch_size):
    completions = ["3", "it is 3", "4", "", "no idea at all"]
    scores = RewardModelReward(reward_model, input_format="raw", batch_size=batch_size).score(batch(*completions))
    expected = reference(reward_model, [f"1+2={completion}" for completion in completions])
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == 5


def test_padding_changes_nothing_for_an_encoder_that_sees_all_tokens(tmp_path, model_folder):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, num_labels=1, vocab_size=98, max_position_embeddings=64, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    scores = RewardModelReward(str(tmp_path), input_format="raw").score(batch("3", "no idea at all"))
    assert scores == pytest.approx(reference(tmp_path, ["1+2=3", "1+2=no idea at all"]), abs=1e-5)


def test_a_chat_goes_through_the_reward_models_template(reward_model):
    (score,) = RewardModelReward(reward_model).score(batch("3"))
    assert score == pytest.approx(reference(reward_model, ["u: 1+2=. a: 3. "])[0], abs=1e-5)


def test_the_prompt_may_come_from_a_column_as_text_or_as_messages(reward_model):
    texts = ["u: what. a: 3. ", "s: add. u: 1+2. a: 3. "]
    rows = (batch("3", question="what"), batch("3", question=CHAT))
    reward = RewardModelReward(reward_model, prompt_column="question")
    assert [reward.score(row)[0] for row in rows] == pytest.approx(reference(reward_model, texts), abs=1e-5)
    assert reward.required_columns == ("question",)
    assert len(CHAT) == 2


def test_a_text_that_is_too_long_is_a_failure_and_the_others_are_scored(reward_model):
    reward = RewardModelReward(reward_model, input_format="raw", on_failure="drop_sample")
    long, short = reward.score(batch("3" * 61, "3" * 60))
    assert isinstance(long, RewardFailure)
    assert long.reason == "has 65 tokens of the reward model, more than 64"
    assert isinstance(short, float)
    assert isinstance(RewardModelReward(reward_model, max_tokens=5).score(batch("33"))[0], RewardFailure)


def test_a_model_without_a_padding_token_scores_one_at_a_time(classifier):
    folder = classifier("unpadded", pad_token=None)
    with pytest.raises(SettingError, match="has no padding token; set `batch_size: 1`"):
        RewardModelReward(folder, input_format="raw").score(batch("3"))
    scores = RewardModelReward(folder, input_format="raw", batch_size=1).score(batch("3", "it is 3"))
    assert scores == pytest.approx(reference(folder, ["1+2=3", "1+2=it is 3"]), abs=1e-5)


def test_what_is_no_reward_model_is_named(classifier, model_folder, caplog):
    caplog.set_level(logging.ERROR)
    with pytest.raises(SettingError, match=r"is no reward model: it has no weights for \['score.weight'\]"):
        RewardModelReward(model_folder).score(batch("3"))
    with pytest.raises(SettingError, match="must have one label, got 2"):
        RewardModelReward(classifier("two", num_labels=2)).score(batch("3"))
    with pytest.raises(SettingError, match="has no chat template; set `input_format: raw`"):
        RewardModelReward(classifier("plain", template=None)).score(batch("3"))
    with pytest.raises(SettingError, match="'no/such/folder' cannot be loaded"):
        RewardModelReward("no/such/folder").score(batch("3"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1, got 0"),
        ({"input_format": "text"}, "`input_format` must be chat or raw, got 'text'"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        RewardModelReward("model", **setting)


def test_a_run_uses_it_and_gives_it_back(reward_model, make_run, make_recorder):
    recorder = make_recorder()
    reward = RewardModelReward(reward_model, input_format="raw", weight=0.5)
    run = make_run(recorder, rewards=[reward])
    run.fit()
    (rollout,) = recorder.rollouts
    texts = [prompt + text for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)]
    expected = [0.5 * score for score in reference(reward_model, texts)]
    assert rollout.rewards.tolist() == pytest.approx(expected, abs=1e-5)
    assert reward._classifier is None
