"""Rollouts of a small real model, as the micro-batches of a real training."""

import itertools
import json
import shutil
from collections import Counter
from datetime import date

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import FunctionReward
from drpo_lightning.datamodules import ArithmeticPrompts, PromptSource
from drpo_lightning.errors import SettingError
from drpo_lightning.objectives import ClippedRatio, Decoupled, TopKDPPO
from drpo_lightning.rewards.base import RewardError
from drpo_lightning.rollout import RolloutHooks, TransformersEngine


class Listed(PromptSource):
    def __init__(self, *prompts, **columns):
        self.rows = [{"prompt": prompt} | columns for prompt in prompts]

    def load(self):
        return self.rows


class WatchedEngine(TransformersEngine):
    """The real engine, which also notes what it is asked for."""

    can_sleep = True

    def __init__(self):
        super().__init__()
        self.calls = []
        self.requests = []

    def start(self, *arguments, **settings):
        self.calls.append("start")
        super().start(*arguments, **settings)

    def load_weights(self, weights):
        self.calls.append("load")
        super().load_weights(weights)

    def generate(self, prompt_ids, sampling, **settings):
        self.calls.append("generate")
        self.requests.append({"num_prompts": len(prompt_ids), "sampling": sampling} | settings)
        return super().generate(prompt_ids, sampling, **settings)

    def _sleep(self):
        self.calls.append("sleep")

    def _wake(self):
        self.calls.append("wake")


def trained_sequences(batches):
    """Each row that was trained on: its tokens, the number of prompt tokens, and the logprobs of the engine."""
    rows = []
    for batch in batches:
        for i in range(len(batch.input_ids)):
            inside, sampled = batch.attention_mask[i], batch.completion_mask[i]
            logprobs = tuple(batch.rollout_logprobs[i][sampled].tolist())
            rows.append((tuple(batch.input_ids[i][inside].tolist()), int((inside & ~sampled).sum()), logprobs))
    return Counter(rows)


def trained_tokens(batches):
    """The token ids of each row that was trained on."""
    return Counter(tokens for tokens, _, _ in trained_sequences(batches).elements())


def sampled_sequences(rollout):
    return Counter(
        (tuple(ids + c.token_ids), len(ids), tuple(torch.tensor(c.logprobs).tolist()))
        for ids, c in zip(rollout.prompt_ids, rollout.completions, strict=True)
    )


def weights_of(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.module.parameters()])


@pytest.fixture
def copied_model(model_folder, tmp_path):
    """Copies the small model with changes to its JSON files; None removes an entry, or the file."""

    def copy(**changes):
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        for name, entries in changes.items():
            path = folder / f"{name}.json"
            if entries is None:
                path.unlink()
                continue
            content = json.loads(path.read_text()) | entries
            path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return str(folder)

    return copy


# ---------------------------------------------------------------- what is trained on


@pytest.mark.parametrize(("num_updates", "accumulate"), [(1, 1), (2, 1), (1, 4), (4, 2), (2, 8)])
def test_an_epoch_is_a_rollout_of_updates_times_micro_batches(make_run, make_recorder, num_updates, accumulate):
    recorder = make_recorder()
    run = make_run(
        recorder,
        trainer={"max_epochs": 3, "accumulate_grad_batches": accumulate},
        data={"num_updates": num_updates},
    )
    run.fit()
    assert len(recorder.rollouts) == run.data.iteration == 3
    assert [len(batches) for batches in recorder.batches] == [num_updates * accumulate] * 3
    assert {len(b.input_ids) for batches in recorder.batches for b in batches} == {16 // (num_updates * accumulate)}
    assert run.trainer.global_step == 3 * num_updates


def test_every_sample_is_trained_on_exactly_once(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"max_epochs": 3, "accumulate_grad_batches": 2})
    run.fit()
    for rollout, batches in zip(recorder.rollouts, recorder.batches, strict=True):
        assert len(rollout) == 16
        assert trained_sequences(batches) == sampled_sequences(rollout)


def test_the_split_into_micro_batches_is_random_and_differs_between_rollouts(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"max_epochs": 2})
    run.fit()
    rows = [
        [sampled_rows.index(key) for batch in batches for key in trained_sequences([batch]).elements()]
        for sampled_rows, batches in zip(
            [list(sampled_sequences(rollout).elements()) for rollout in recorder.rollouts],
            recorder.batches,
            strict=True,
        )
    ]
    assert rows[0] != sorted(rows[0])
    assert rows[0] != rows[1]


@pytest.mark.parametrize("advantage", ["group_mean", "leave_one_out", "group_mean_std"])
def test_advantages_sum_to_zero_over_the_samples_of_a_prompt(make_run, make_recorder, advantage):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"max_epochs": 2, "accumulate_grad_batches": 2}, data={"advantage": advantage})
    run.fit()
    for rollout, batches in zip(recorder.rollouts, recorder.batches, strict=True):
        groups = {}
        for batch in batches:
            for i, sampled in enumerate(batch.completion_mask):
                prompt = tuple(batch.input_ids[i][batch.attention_mask[i] & ~sampled].tolist())
                (value,) = batch.advantages[i][sampled].unique().tolist()
                groups.setdefault(prompt, []).append(value)
        assert len(groups) == 4
        assert all(len(values) == 4 for values in groups.values())
        assert all(abs(sum(values)) < 1e-5 for values in groups.values())
        if advantage == "group_mean":
            means = rollout.group_rewards.mean(1, keepdim=True)
            expected = (rollout.group_rewards - means).flatten().tolist()
            found = [value for values in groups.values() for value in values]
            assert sorted(found) == pytest.approx(sorted(expected))
            assert max(found) > 0


@pytest.mark.parametrize("num_batches", [8, 7, 5, 1])
def test_the_denominators_are_those_of_the_update_also_if_it_is_incomplete(make_run, make_recorder, num_batches):
    recorder = make_recorder()
    run = make_run(
        recorder, trainer={"accumulate_grad_batches": 4, "limit_train_batches": num_batches, "max_epochs": 2}
    )
    run.fit()
    for batches in recorder.batches:
        assert len(batches) == num_batches
        for start in range(0, num_batches, 4):
            update = batches[start : start + 4]
            tokens = sum(int(batch.completion_mask.sum()) for batch in update)
            sequences = sum(len(batch.input_ids) for batch in update)
            assert {(batch.num_update_tokens, batch.num_update_sequences) for batch in update} == {(tokens, sequences)}


def test_prompts_come_in_shuffled_passes_over_the_data_set(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(
        recorder,
        trainer={"max_epochs": 5},
        data={"prompts": ArithmeticPrompts(max_operand=3, num_validation=4), "num_prompts": 5, "num_updates": 1},
    )
    run.fit()
    stream = [prompt for rollout in recorder.rollouts for prompt in rollout.prompts[::4]]
    first, second = stream[:12], stream[12:24]
    everything = {row["prompt"] for row in run.data.prompts.load()}
    assert len(everything) == 12
    assert set(first) == set(second) == everything
    assert first != second
    assert first != [row["prompt"] for row in run.data.prompts.load()]


def test_the_samples_of_a_prompt_stand_next_to_each_other_with_their_columns(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder)
    run.fit()
    (rollout,) = recorder.rollouts
    for i, prompt in enumerate(rollout.prompts):
        assert prompt == rollout.prompts[i - i % 4]
        assert eval(prompt.removesuffix("=")) == int(rollout.columns["answer"][i])
        assert run.data.encoder.tokenizer.decode(rollout.prompt_ids[i]).replace(" ", "") == prompt
    assert rollout.columns.keys() == {"answer"}
    assert rollout.texts == run.data.encoder.tokenizer.batch_decode(
        [completion.token_ids for completion in rollout.completions], skip_special_tokens=True
    )
    assert rollout.rewards.tolist() == rollout.reward_parts["scattered"].tolist()
    assert len({tuple(c.token_ids) for c in rollout.completions[:4]}) > 1


def test_a_prompt_that_comes_twice_in_a_rollout_gets_different_samples(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, data={"prompts": Listed("1+1=", "2+7="), "num_prompts": 8, "num_updates": 1})
    run.fit()
    samples = {}
    for prompt, completion in zip(recorder.rollouts[0].prompts, recorder.rollouts[0].completions, strict=True):
        samples.setdefault(prompt, []).append(tuple(completion.token_ids))
    for tokens in samples.values():
        groups = {tuple(tokens[i : i + 4]) for i in range(0, len(tokens), 4)}
        assert len(groups) > 1


def test_samples_know_the_row_of_the_data_set_and_rows_of_a_batch_their_sample(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"max_epochs": 2})
    run.fit()
    data = run.data.prompts.load()
    for rollout, batches in zip(recorder.rollouts, recorder.batches, strict=True):
        assert [data[number]["prompt"] for number in rollout.prompt_numbers] == rollout.prompts
        assert sorted(row for batch in batches for row in batch.sample_ids.tolist()) == list(range(16))
        for batch in batches:
            for i, row in enumerate(batch.sample_ids.tolist()):
                expected = rollout.prompt_ids[row] + rollout.completions[row].token_ids
                assert batch.input_ids[i][batch.attention_mask[i]].tolist() == expected


@pytest.mark.parametrize(("overfit_batches", "num_batches"), [(1, 1), (3, 3), (0.5, 2), (1.0, 4)])
def test_overfitting_samples_the_same_prompts_anew(make_run, make_recorder, overfit_batches, num_batches):
    engine, recorder, usual = WatchedEngine(), make_recorder(), make_recorder()
    trainer = {"max_epochs": 3, "overfit_batches": overfit_batches, "accumulate_grad_batches": 2}
    val_prompts = ArithmeticPrompts("validation", max_operand=9, num_validation=20)
    run = make_run(recorder, trainer=trainer, data={"engine": engine, "val_prompts": val_prompts})
    upcoming = []
    recorder.after_batch = lambda trainer, *_: upcoming.append(trainer.datamodule.upcoming_prompt_ids(4))
    run.fit()
    make_run(usual).fit()
    prompts = [rollout.prompts for rollout in recorder.rollouts]
    assert prompts == [usual.rollouts[0].prompts] * 3, "the first of the stream"
    assert all(ids == recorder.rollouts[0].prompt_ids[::4] for ids in upcoming)
    assert [len(batches) for batches in recorder.batches] == [num_batches] * 3
    seeds = [seed for request in engine.requests if request["num_samples"] == 4 for seed in request["seeds"]]
    assert len(set(seeds)) == 12
    assert len({str(sampled_sequences(rollout)) for rollout in recorder.rollouts}) == 3
    assert "val/pass@1" in run.trainer.callback_metrics


# ---------------------------------------------------------------- what an objective asks for


def test_without_need_the_engine_returns_no_top_k_and_nothing_is_scored(make_run, make_recorder):
    engine, recorder = WatchedEngine(), make_recorder()
    make_run(recorder, data={"engine": engine}).fit()
    assert [request["num_topk"] for request in engine.requests] == [0]
    assert recorder.rollouts[0].proximal_logprobs is None
    assert recorder.rollouts[0].completions[0].topk_ids is None
    batch = recorder.batches[0][0]
    assert (batch.proximal_logprobs, batch.topk_ids, batch.topk_logprobs) == (None, None, None)


def test_the_top_k_is_asked_of_the_engine_in_training_alone(make_run, make_recorder):
    engine, recorder = WatchedEngine(), make_recorder()
    make_run(
        recorder,
        module={"objective": TopKDPPO(6)},
        data={"engine": engine, "val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20)},
    ).fit()
    assert {(request["num_prompts"], request["num_topk"]) for request in engine.requests} == {(4, 6), (20, 0)}
    for completion in recorder.rollouts[0].completions:
        assert completion.topk_ids.shape == completion.topk_logprobs.shape == (len(completion.token_ids), 6)
        assert (completion.topk_logprobs.diff(dim=1) <= 0).all()
        likeliest = completion.topk_logprobs[:, 0]
        assert (torch.tensor(completion.logprobs) <= likeliest + 1e-6).all()


def test_pi_prox_is_the_trainer_at_the_weights_of_the_rollout(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(
        recorder,
        trainer={"max_epochs": 3},
        module={"objective": Decoupled(ClippedRatio()), "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
    )
    run.fit()
    differences = []
    for rollout in recorder.rollouts:
        for proximal, completion in zip(rollout.proximal_logprobs, rollout.completions, strict=True):
            assert len(proximal) == len(completion.logprobs)
            differences += [abs(a - b) for a, b in zip(proximal, completion.logprobs, strict=True)]
    assert 0 < max(differences) <= 1e-4
    for batches in recorder.batches:
        shift = [(b.proximal_logprobs - b.rollout_logprobs)[b.completion_mask].abs().max() for b in batches]
        assert max(shift) <= 1e-4, "also of the second update, when the policy has moved"
    second = recorder.outputs[1]["policy_logprobs"]
    assert (second - recorder.batches[0][1].proximal_logprobs).abs().max() > 1e-3


def test_completions_of_one_token_are_trained_on(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(recorder, trainer={"max_epochs": 2}, data={"sampling": Sampling(1, 1.5)})
    run.fit()
    assert {batch.num_update_tokens for batches in recorder.batches for batch in batches} == {8}
    assert weights_of(run).isfinite().all()


# ---------------------------------------------------------------- repeatability


@pytest.mark.parametrize("seeded_requests", [None, False])
def test_equal_seeds_give_equal_runs_and_others_do_not(make_run, make_recorder, seeded_requests):
    runs = []
    for seed in (3, 3, 4):
        recorder = make_recorder()
        run = make_run(recorder, trainer={"max_epochs": 2}, data={"seed": seed, "seeded_requests": seeded_requests})
        run.fit()
        runs.append(([trained_sequences(batches) for batches in recorder.batches], weights_of(run)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_the_order_of_prompts_depends_on_the_seed(make_run, make_recorder):
    orders = []
    for seed in (3, 4):
        recorder = make_recorder()
        make_run(recorder, data={"seed": seed, "num_prompts": 8}).fit()
        orders.append(recorder.rollouts[0].prompts)
    assert orders[0] != orders[1]


def test_requests_get_a_seed_of_their_own_in_every_rollout(make_run):
    engine = WatchedEngine()
    make_run(
        trainer={"max_epochs": 2}, data={"engine": engine, "prompts": Listed("1+1=", "1+2=", "1+3=", "1+4=")}
    ).fit()
    seeds = [seed for request in engine.requests for seed in request["seeds"]]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_unseeded_requests_are_possible(make_run):
    engine = WatchedEngine()
    make_run(data={"engine": engine, "seeded_requests": False}).fit()
    assert engine.requests[0]["seeds"] is None


# ---------------------------------------------------------------- engine


def test_weights_are_loaded_before_every_rollout_and_the_engine_sleeps_after_it(make_run):
    engine = WatchedEngine()
    make_run(trainer={"max_epochs": 2}, data={"engine": engine}).fit()
    assert engine.calls == ["start", "load", "generate", "sleep", "wake", "load", "generate", "sleep"]


def test_hooks_run_in_order(make_run, make_recorder):
    recorder = make_recorder()
    make_run(recorder, trainer={"max_epochs": 2}).fit()
    assert recorder.events == ["start", "refresh", "end"] * 2


def test_after_a_refresh_the_engine_has_the_weights_of_the_trainer(make_run):
    class Compare(Callback, RolloutHooks):
        def __init__(self):
            self.heads = []

        def on_engine_refresh(self, trainer, pl_module, engine):
            own = engine._model.state_dict()
            named = dict(pl_module.named_weights())
            assert own.keys() == named.keys()
            assert all(torch.equal(own[name], tensor) for name, tensor in named.items())
            self.heads.append(own["lm_head.weight"].clone())

    compare = Compare()
    make_run(compare, trainer={"max_epochs": 3}).fit()
    assert len(compare.heads) == 3
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(compare.heads, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stops_the_run_before_anything_is_sent(make_run, make_recorder, value):
    def break_one_weight(trainer, pl_module, batch_idx):
        if batch_idx == 1:
            with torch.no_grad():
                next(iter(pl_module.parameters()))[5, 7] = value

    engine = WatchedEngine()
    run = make_run(make_recorder(break_one_weight), trainer={"max_epochs": 2}, data={"engine": engine})
    with pytest.raises(
        ValueError, match=r"a weight of the policy is NaN or infinite: it is not sent.*gradient_clip_val"
    ):
        run.fit()
    assert engine.calls.count("load") == engine.calls.count("generate") == 1
    assert not engine.is_started


def test_weights_of_another_model_are_refused_before_anything_is_sent(make_run, copied_model):
    from transformers import AutoConfig, AutoModelForCausalLM

    other = copied_model()
    config = AutoConfig.from_pretrained(other)
    config.intermediate_size = 8
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    engine = WatchedEngine()
    run = make_run(data={"engine": engine, "model": other})
    with pytest.raises(ValueError, match=r"do not fit the engine's model \(6 problems\).*Do trainer and engine load"):
        run.fit()
    assert "load" not in engine.calls
    assert not engine.is_started


def test_the_engine_is_closed_after_training(make_run):
    run = make_run()
    run.fit()
    assert not run.data.engine.is_started


def test_the_engine_is_closed_after_an_exception(make_run, make_recorder):
    seen = []

    def fail(trainer, pl_module, batch_idx):
        seen.append(run.data.engine.is_started)
        raise OSError("disk full")

    run = make_run(make_recorder(fail))
    with pytest.raises(OSError, match="disk full"):
        run.fit()
    assert seen == [True]
    assert not run.data.engine.is_started


def test_the_engine_is_closed_after_an_interrupt(make_run, make_recorder):
    def interrupt(trainer, pl_module, batch_idx):
        raise KeyboardInterrupt

    run = make_run(make_recorder(interrupt))
    with pytest.raises(SystemExit):
        run.fit()
    assert not run.data.engine.is_started


def test_the_engine_is_closed_after_a_reward_fails(make_run):
    run = make_run(rewards=[FunctionReward(lambda **_: [1.0], name="short")])
    with pytest.raises(RewardError, match="'short' returned 1 scores for 16"):
        run.fit()
    assert not run.data.engine.is_started


def test_a_closed_run_can_be_continued(make_run):
    run = make_run()
    run.fit()
    run.trainer.fit_loop.max_epochs = 2
    run.fit()
    assert run.data.iteration == 2


# ---------------------------------------------------------------- validation


def test_validation_scores_every_prompt_by_its_own_sampling(make_run):
    engine = WatchedEngine()
    greedy = Sampling(max_tokens=3, temperature=0.0)
    run = make_run(
        trainer={"max_epochs": 2, "num_sanity_val_steps": -1},
        data={
            "engine": engine,
            "val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20),
            "val_sampling": greedy,
            "val_num_samples": 2,
        },
    )
    run.fit()
    validations = [request for request in engine.requests if request["sampling"] == greedy]
    assert [(v["num_prompts"], v["num_samples"]) for v in validations] == [(20, 2)] * 3
    assert validations[0]["seeds"] == validations[1]["seeds"]
    assert run.data.iteration == 2
    assert 0 <= run.trainer.callback_metrics["val/pass@1"] <= run.trainer.callback_metrics["val/pass@2"] <= 1
    assert run.trainer.callback_metrics["val/completions/mean_length"] <= 3


def test_validation_does_not_disturb_the_training(make_run, make_recorder):
    batches, weights = [], []
    for val_prompts in (None, ArithmeticPrompts("validation", max_operand=9, num_validation=20)):
        recorder = make_recorder()
        run = make_run(recorder, trainer={"max_epochs": 2}, data={"val_prompts": val_prompts})
        run.fit()
        batches.append([trained_sequences(b) for b in recorder.batches])
        weights.append(weights_of(run))
    assert batches[0] == batches[1]
    assert torch.equal(*weights)


def test_validation_alone_needs_no_training_prompts(make_run):
    run = make_run(data={"val_prompts": Listed("1+1=", "2+2="), "prompts": Listed("x" * 600)})
    run.trainer.validate(run.module, run.data)
    assert run.trainer.callback_metrics["val/reward/mean"] <= 1
    assert not run.data.engine.is_started


def test_a_run_without_validation_prompts_needs_no_other_setting(make_run):
    make_run(trainer={"limit_val_batches": 1.0}).fit()


def test_the_trainer_validates_again_after_a_run_without_validation_prompts(make_run, make_recorder):
    def fail(trainer, pl_module, batch_idx):
        raise OSError("disk full")

    trainer = {"limit_val_batches": 0.5}
    run, broken = make_run(trainer=trainer), make_run(make_recorder(fail), trainer=trainer)
    run.fit()
    with pytest.raises(OSError, match="disk full"):
        broken.fit()
    assert run.trainer.limit_val_batches == broken.trainer.limit_val_batches == 0.5
    run.trainer.limit_val_batches = 1.0
    other = make_run(data={"val_prompts": Listed("1+1=")})
    run.trainer.validate(run.module, other.data)
    assert "val/reward/mean" in run.trainer.callback_metrics


def test_validation_needs_validation_prompts(make_run):
    run = make_run()
    with pytest.raises(ValueError, match=r"`data\.val_prompts` must be set to validate"):
        run.trainer.validate(run.module, run.data)


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
            r"= 16 completions on each of 1 ranks cannot be split evenly into `data\.num_updates` 3 x "
            r"`trainer\.accumulate_grad_batches` 2 = 6",
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


# ---------------------------------------------------------------- checkpoints


def saved_and_read(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


def test_the_state_in_the_middle_of_a_rollout_survives_a_file(make_run, make_recorder, tmp_path):
    states = []

    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            states.append(saved_and_read(trainer.datamodule.state_dict(), tmp_path))

    recorder = make_recorder(save)
    run = make_run(recorder, trainer={"max_epochs": 2, "accumulate_grad_batches": 2})
    run.fit()
    fresh = make_run(trainer={"accumulate_grad_batches": 2})
    fresh.data.trainer = fresh.trainer
    fresh.data.load_state_dict(states[0])
    assert fresh.data.iteration == 2
    assert sampled_sequences(fresh.data.rollout) == sampled_sequences(recorder.rollouts[1])
    assert fresh.data.rollout.rewards.tolist() == recorder.rollouts[1].rewards.tolist()
    assert states[0]["updates"] == 1


def test_the_state_between_rollouts_holds_no_rollout(make_run, tmp_path):
    run = make_run(trainer={"max_epochs": 2})
    run.fit()
    state = saved_and_read(run.data.state_dict(), tmp_path)
    split = {"num_prompts": 4, "group_size": 4, "num_updates": 2, "seed": 0}
    assert len(state.pop("random")) == 1
    counts = {"iteration": 2, "updates": 2, "accumulate_grad_batches": 1}
    assert state == {**counts, "split": split, "rollouts": [], "curriculum": {}}
    fresh = make_run()
    fresh.data.trainer = fresh.trainer
    fresh.data.load_state_dict({**state, "random": run.data.state_dict()["random"]})
    assert (fresh.data.iteration, fresh.data.rollout) == (2, None)


def test_validation_takes_the_weights_of_a_checkpoint_alone(make_run):
    run = make_run()
    run.fit()
    state = run.data.state_dict()
    fresh = make_run()
    fresh.data.trainer = fresh.trainer
    fresh.trainer.state.fn = "validate"
    fresh.data.load_state_dict(state)
    assert fresh.data.iteration == 0


@pytest.mark.parametrize(("name", "value"), [("num_prompts", 8), ("group_size", 2), ("num_updates", 4), ("seed", 1)])
def test_a_rollout_that_is_partly_trained_on_must_be_split_as_before(make_run, make_recorder, tmp_path, name, value):
    def save(trainer, pl_module, batch_idx):
        trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    run = make_run(make_recorder(save))
    run.fit()
    other = make_run(data={name: value}, trainer={"max_epochs": 2})
    with pytest.raises(SettingError, match=rf"`data\.{name}` must be {run.data._split[name]}, got {value}: the checkp"):
        other.fit(ckpt_path=tmp_path / "0.ckpt")
    between = make_run(data={name: value}, trainer={"max_epochs": 2})
    between.fit(ckpt_path=tmp_path / "1.ckpt")
    assert between.data.iteration == 2


def resumed(make_run, make_recorder, path, *, at, trainer=None, changed=None, **settings):
    """Trains without a break, saving a checkpoint at an epoch and micro-batch; then again from that checkpoint.

    `changed` are settings of the trainer that the resumed run has otherwise.
    """

    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == at:
            trainer.save_checkpoint(path)

    trainer = {"max_epochs": 3} | (trainer or {})
    recorder, second = make_recorder(save), make_recorder()
    whole = make_run(recorder, trainer=trainer, **settings)
    whole.fit()
    again = make_run(second, trainer=trainer | (changed or {}), **settings)
    again.fit(ckpt_path=path)
    return whole, again, recorder, second


@pytest.mark.parametrize("at", [(0, 1), (1, 1), (1, 3), (1, 7)])
def test_a_resumed_run_equals_an_uninterrupted_one(make_run, make_recorder, tmp_path, at):
    whole, again, recorder, second = resumed(
        make_run,
        make_recorder,
        tmp_path / "run.ckpt",
        at=at,
        trainer={"accumulate_grad_batches": 2},
        data={"num_updates": 4},
    )
    assert torch.equal(weights_of(whole), weights_of(again))
    assert whole.trainer.global_step == again.trainer.global_step == 12
    left = [trained_sequences([b]) for batches in second.batches for b in batches]
    assert left == [trained_sequences([b]) for batches in recorder.batches for b in batches][8 * at[0] + at[1] + 1 :]
    assert len(second.rollouts) == 2 - at[0]


@pytest.mark.parametrize("objective", [TopKDPPO(5, "kl", 1e-4), Decoupled(ClippedRatio(0.01, 0.01))], ids=repr)
@pytest.mark.parametrize("at", [(0, 0), (1, 2)])
def test_a_resumed_run_keeps_what_its_objective_asks_for(make_run, make_recorder, tmp_path, objective, at):
    whole, again, recorder, second = resumed(
        make_run,
        make_recorder,
        tmp_path / "run.ckpt",
        at=at,
        trainer={"max_epochs": 2},
        data={"num_updates": 4},
        module={"objective": objective, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
    )
    assert torch.equal(weights_of(whole), weights_of(again))
    left = [b for batches in second.batches for b in batches]
    trained = [b for batches in recorder.batches for b in batches][4 * at[0] + at[1] + 1 :]
    for a, b in zip(left, trained, strict=True):
        for name in ("sample_ids", "proximal_logprobs", "topk_ids", "topk_logprobs"):
            ours, theirs = getattr(a, name), getattr(b, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)
    names = ("topk_ids", "topk_logprobs") if objective.num_topk else ("proximal_logprobs",)
    assert all(getattr(left[0], name) is not None for name in names)
    kept = [output["objective"].keep[batch.completion_mask] for output, batch in zip(second.outputs, left, strict=True)]
    assert 0 < torch.cat(kept).float().mean() < 1


@pytest.mark.parametrize("at", [(0, 0), (0, 1), (1, 0), (1, 4)])
def test_an_update_that_was_broken_off_is_begun_again(make_run, make_recorder, tmp_path, at):
    settings = {"trainer": {"accumulate_grad_batches": 3}, "data": {"num_prompts": 3}}
    whole, again, recorder, second = resumed(make_run, make_recorder, tmp_path / "run.ckpt", at=at, **settings)
    assert torch.equal(weights_of(whole), weights_of(again))
    assert whole.trainer.global_step == again.trainer.global_step == 6
    assert whole.trainer.current_epoch == again.trainer.current_epoch == 3
    left = [trained_sequences([b]) for batches in second.batches for b in batches]
    first = 6 * at[0] + (at[1] + 1) // 3 * 3
    assert left == [trained_sequences([b]) for batches in recorder.batches for b in batches][first:]


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("at", [(0, 0), (1, 1), (1, 2), (1, 3)])
def test_a_resumed_run_may_have_other_micro_batches(make_run, make_recorder, tmp_path, at, window):
    whole, again, recorder, second = resumed(
        make_run,
        make_recorder,
        tmp_path / "run.ckpt",
        at=at,
        trainer={"accumulate_grad_batches": 2, "max_epochs": 4},
        changed={"accumulate_grad_batches": window},
        module={"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)},
    )
    # Micro-batches are added up in another order, in float32.
    assert weights_of(again) == pytest.approx(weights_of(whole), abs=1e-5)
    assert whole.trainer.global_step == again.trainer.global_step == 8
    assert whole.trainer.current_epoch == again.trainer.current_epoch == 4
    updates = [trained_tokens(batches[i : i + 2]) for batches in recorder.batches for i in (0, 2)]
    flat = [batch for batches in second.batches for batch in batches]
    left = [trained_tokens(flat[i : i + window]) for i in range(0, len(flat), window)]
    assert left == updates[2 * at[0] + (at[1] + 1) // 2 :]


class SaveAt(Callback):
    """Saves a checkpoint in some hook at some step, and notes what Lightning calls, at which epoch and step."""

    def __init__(self, path=None, hook="", step=0):
        self.path, self.moment = path, (hook, step)
        self.calls = []

    def on_train_epoch_start(self, trainer, pl_module):
        self._call(trainer, "epoch start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._call(trainer, "batch end")

    def on_validation_end(self, trainer, pl_module):
        self._call(trainer, "validation end")

    def on_train_epoch_end(self, trainer, pl_module):
        self._call(trainer, "epoch end")

    def _call(self, trainer, hook):
        if self.path is not None and (hook, trainer.global_step) == self.moment:
            trainer.save_checkpoint(self.path)
            self.path = None
        self.calls.append((hook, trainer.current_epoch, trainer.global_step))


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 6}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("epoch start", 0),
        ("epoch start", 2),
        ("batch end", 1),
        ("batch end", 2),
        ("validation end", 2),
        ("epoch end", 2),
    ],
)
def test_a_run_goes_on_from_any_moment_and_then_again(make_run, tmp_path, limit, hook, step):
    def run(watch, path=None):
        validation = ArithmeticPrompts("validation", max_operand=9, num_validation=4)
        made = make_run(watch, trainer={**limit, "num_sanity_val_steps": 0}, data={"val_prompts": validation})
        made.fit(ckpt_path=path)
        return made

    first, second, third = (
        SaveAt(tmp_path / "1.ckpt", hook, step),
        SaveAt(tmp_path / "2.ckpt", "batch end", 4),
        SaveAt(),
    )
    whole = run(first)
    resumed = [run(second, tmp_path / "1.ckpt"), run(third, tmp_path / "2.ckpt")]
    for watch, other in zip((second, third), resumed, strict=True):
        assert torch.equal(weights_of(other), weights_of(whole))
        assert (other.trainer.global_step, other.trainer.current_epoch) == (6, 3)
        assert watch.calls == first.calls[-len(watch.calls) :]
    assert len(third.calls) == 5


def test_a_run_of_cut_rollouts_resumes_with_a_new_one(make_run, make_recorder, tmp_path):
    whole, again, _, second = resumed(
        make_run, make_recorder, tmp_path / "run.ckpt", at=(0, 0), trainer={"limit_train_batches": 1}
    )
    assert [len(batches) for batches in second.batches if batches] == [1, 1]
    assert torch.equal(weights_of(whole), weights_of(again))


def test_any_column_of_a_data_set_survives_a_resume(make_run, make_recorder, tmp_path):
    prompts = Listed("1+1=", "2+2=", "3+3=", "4+4=", day=date(2026, 6, 1))
    whole, again, *_ = resumed(
        make_run, make_recorder, tmp_path / "run.ckpt", at=(0, 0), trainer={"max_epochs": 1}, data={"prompts": prompts}
    )
    assert torch.equal(weights_of(whole), weights_of(again))
