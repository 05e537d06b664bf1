"""Prompts as the model sees them, and settings that cannot work."""

import re

import pytest
from lightning.pytorch import Trainer

from drpo_lightning.batch import Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout import TransformersEngine
from tests.datamodules.rollout_runs import Listed, WatchedEngine

# ---------------------------------------------------------------- prompts as the model sees them


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def test_a_chat_prompt_goes_through_the_template(make_run, make_recorder, copied_model):
    model = copied_model(tokenizer_config={"chat_template": TEMPLATE})
    recorder = make_recorder()
    run = make_run(
        recorder,
        data={"model": model, "prompts": Listed("1+1="), "prompt_format": "chat", "system_prompt": "Add."},
    )
    run.fit()
    assert set(recorder.rollouts[0].prompts) == {"[system]Add.[user]1+1=>"}


def test_messages_go_through_the_template_whatever_the_format(make_run, make_recorder, copied_model):
    model = copied_model(tokenizer_config={"chat_template": TEMPLATE})
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    recorder = make_recorder()
    make_run(recorder, data={"model": model, "prompts": Listed(messages)}).fit()
    assert set(recorder.rollouts[0].prompts) == {"[user]1+1=[assistant]2>"}


def test_generation_stops_at_the_tokens_of_tokenizer_and_model(make_run, copied_model):
    engine = WatchedEngine()
    make_run(data={"engine": engine, "model": copied_model(generation_config={"eos_token_id": [7, 9]})}).fit()
    assert engine.requests[0]["stop_token_ids"] == [1, 7, 9]


def test_a_model_without_generation_config_stops_at_the_tokenizer_s_token(make_run, copied_model):
    engine = WatchedEngine()
    make_run(data={"engine": engine, "model": copied_model(generation_config=None)}).fit()
    assert engine.requests[0]["stop_token_ids"] == [1]


# ---------------------------------------------------------------- settings that cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, r"`data\.group_size` must be at least 2, got 1: an advantage compares"),
        ({"num_prompts": 0}, r"`data\.num_prompts` must be at least 1, got 0"),
        ({"max_tokens_per_batch": 0}, r"`data\.max_tokens_per_batch` must be at least 1, got 0"),
        ({"num_updates": 0}, r"`data\.num_updates` must be at least 1, got 0"),
        ({"val_num_samples": 0}, r"`data\.val_num_samples` must be at least 1, got 0"),
    ],
)
def test_a_setting_out_of_range_is_refused_at_once(make_run, settings, message):
    with pytest.raises(ValueError, match=message):
        make_run(data=settings)


LONG = "1+" * 255 + "1="  # 512 characters and tokens, the whole context


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_updates": 3},
            r"= 16 completions on each of 1 ranks cannot be split evenly into `data\.num_updates` 3 updates",
        ),
        ({"prompts": Listed("1+1=", LONG)}, r"`data\.prompts`: prompt 1 has 512 tokens and may be continued by 4"),
        ({"prompts": Listed(LONG[4:]), "sampling": Sampling(5, 1.5)}, "508 tokens .* more than the context of 512"),
        (
            {"val_prompts": Listed("1+1="), "val_sampling": Sampling(509)},
            r"`data\.val_prompts`: prompt 0 has 4 tokens and may be continued by 509",
        ),
        ({"prompts": Listed("")}, r"`data\.prompts`: prompt 0 has no tokens: ''"),
        ({"prompt_format": "chat"}, r"has no chat template; set `data\.prompt_format: raw`"),
        ({"prompts": Listed([{"role": "user", "content": "1+1="}])}, "has no chat template"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_engine_starts(make_run, settings, message):
    engine = WatchedEngine()
    run = make_run(data={"engine": engine} | settings, trainer={"accumulate_grad_batches": 2})
    with pytest.raises(ValueError, match=message):
        run.fit()
    assert not engine.calls


def test_a_prompt_that_just_fits_is_taken(make_run):
    make_run(data={"prompts": Listed(LONG[4:]), "num_prompts": 1, "num_updates": 1}).fit()


def test_the_engine_may_make_the_context_shorter(make_run):
    engine = TransformersEngine()
    engine.max_context_tokens = 7
    run = make_run(data={"engine": engine, "prompts": Listed("1+1=")})
    with pytest.raises(ValueError, match=r"4 tokens and may be continued by 4 .* more than the context of 7"):
        run.fit()


@pytest.mark.parametrize("packing", ["always", "never"])
def test_a_micro_batch_that_is_too_large_stops_the_run_before_it_is_trained_on(make_run, packing):
    def fit(window, limit):
        run = make_run(
            module={"packing": packing},
            data={"max_tokens_per_batch": limit},
            trainer={"accumulate_grad_batches": window},
        )
        run.fit()
        return run

    with pytest.raises(SettingError, match=r"more than `data\.max_tokens_per_batch` 20; set") as stop:
        fit(2, 20)
    window = int(re.search(r"set `trainer\.accumulate_grad_batches` to (\d+) or more, now 2", str(stop.value))[1])
    assert window > 2
    assert fit(window, 20).trainer.global_step == 2


def test_a_run_needs_a_reward(make_run):
    engine = WatchedEngine()
    with pytest.raises(SettingError, match=r"`trainer\.callbacks` has no reward: list a `RewardCallback`"):
        make_run(data={"engine": engine}, rewards=[]).fit()
    assert not engine.calls


def test_every_rank_needs_as_many_prompts(make_run, monkeypatch):
    run = make_run()
    run.data.trainer = run.trainer
    monkeypatch.setattr(Trainer, "world_size", 3)
    with pytest.raises(ValueError, match=r"`data\.num_prompts` 4 must be a multiple of the 3 ranks"):
        run.data.setup("fit")


def test_a_model_that_never_ends_is_refused(make_run, copied_model):
    model = copied_model(
        tokenizer_config={"eos_token": None}, generation_config={"eos_token_id": None}, config={"eos_token_id": None}
    )
    with pytest.raises(ValueError, match="has no end-of-sequence token: no completion would end"):
        make_run(data={"model": model}).fit()
