"""Rollouts of a small real model, as the micro-batches of a real training."""

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.objectives import ClippedRatio, Decoupled, TopKDPPO
from tests.datamodules.rollout_runs import Listed, WatchedEngine, sampled_sequences, trained_sequences, weights_of

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
    for batches in recorder.batches:
        for start in range(0, len(batches), accumulate):
            update = batches[start : start + accumulate]
            assert sum(len(batch.input_ids) for batch in update) == 16 // num_updates
            tokens = [int(batch.attention_mask.sum()) for batch in update]
            assert max(tokens) - min(tokens) <= max(int(b.attention_mask.sum(1).max()) for b in update), "balanced"
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
