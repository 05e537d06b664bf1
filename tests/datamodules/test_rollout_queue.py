"""Rollouts that are sampled ahead: how old they get, what is asked for when, and what a checkpoint keeps of them."""

import warnings
from collections import Counter

import pytest
import torch

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import FunctionReward
from drpo_lightning.datamodules import ArithmeticPrompts, PassRateCurriculum
from drpo_lightning.errors import SettingError
from drpo_lightning.modules.reference import ReferencePenalty
from drpo_lightning.objectives import ClippedRatio, Decoupled
from drpo_lightning.rollout import EngineError
from tests.datamodules.engine_ahead import EngineAhead
from tests.datamodules.rollout_runs import sampled_sequences, trained_sequences, weights_of


def ahead(make_run, *callbacks, max_staleness=1, engine=None, epochs=5, data=None, trainer=None, **settings):
    return make_run(
        *callbacks,
        trainer={"max_epochs": epochs} | (trainer or {}),
        data={"engine": engine or EngineAhead(), "max_staleness": max_staleness} | (data or {}),
        **settings,
    )


def staleness_of(rollouts):
    return [rollout.staleness.tolist() for rollout in rollouts]


def named(engine, *methods):
    return [event for event in engine.events if event[0] in methods]


@pytest.mark.parametrize("max_staleness", [1, 2, 3])
def test_a_rollout_is_asked_for_as_many_syncs_before_its_turn_as_it_may_be_stale(
    make_run, make_recorder, max_staleness
):
    recorder = make_recorder()
    run = ahead(make_run, recorder, max_staleness=max_staleness, data={"in_flight": "continue"})
    run.fit()
    assert staleness_of(recorder.rollouts) == [[min(i, max_staleness)] * 16 for i in range(5)]
    assert [rollout.weights_version for rollout in recorder.rollouts] == [0, 1, 2, 3, 4]
    asked = [number for _, numbers in named(run.data.engine, "submit") for number in numbers]
    assert asked == list(range(20))
    waited_for = [numbers for _, numbers in named(run.data.engine, "collect")]
    assert waited_for == [list(range(4 * i, 4 * i + 4)) for i in range(5)]


def test_what_is_dropped_is_as_fresh_as_what_is_asked_for_last(make_run, make_recorder):
    recorder = make_recorder()
    ahead(make_run, recorder, max_staleness=2, data={"in_flight": "drop"}).fit()
    assert staleness_of(recorder.rollouts) == [[0] * 16] * 5


def test_nothing_is_asked_for_beyond_the_end(make_run):
    for limit in ({"max_epochs": 2}, {"max_epochs": -1, "max_steps": 3}):
        run = ahead(make_run, max_staleness=3, trainer=limit)
        run.fit()
        assert [numbers for _, numbers in named(run.data.engine, "submit")] == [list(range(8))]


def test_every_prompt_is_the_one_that_it_would_be_without_staleness(make_run, make_recorder):
    recorders = [make_recorder(), make_recorder()]
    for max_staleness, recorder in enumerate(recorders):
        ahead(make_run, recorder, max_staleness=max_staleness).fit()
    now, later = ([rollout.prompts for rollout in recorder.rollouts] for recorder in recorders)
    assert now == later


def test_the_logprobs_that_are_trained_on_are_those_of_the_engine(make_run, make_recorder):
    recorder = make_recorder()
    ahead(make_run, recorder).fit()
    for rollout, batches in zip(recorder.rollouts, recorder.batches, strict=True):
        assert trained_sequences(batches) == sampled_sequences(rollout)


def test_hooks_and_rewards_come_in_the_order_of_the_rollouts(make_run, make_recorder):
    recorder = make_recorder()
    ahead(make_run, recorder, epochs=3).fit()
    assert recorder.events == ["start", "refresh", "end"] * 3


def test_a_decoupled_objective_compares_with_the_newest_weights(make_run, make_recorder):
    recorder = make_recorder()
    ahead(make_run, recorder, epochs=3, module={"objective": Decoupled(ClippedRatio())}).fit()
    for rollout, output, batches in zip(recorder.rollouts, recorder.outputs[::2], recorder.batches, strict=True):
        assert rollout.proximal_logprobs is not None
        batch = batches[0]  # before the first update on the rollout
        pi, proximal = (x[batch.completion_mask] for x in (output["policy_logprobs"], batch.proximal_logprobs))
        torch.testing.assert_close(pi.detach(), proximal, rtol=0, atol=1e-5)


def test_a_reference_scores_what_was_sampled_ahead(make_run, make_recorder):
    recorder = make_recorder()
    ahead(make_run, recorder, epochs=2, module={"reference": ReferencePenalty(0.3)}).fit()
    for rollout in recorder.rollouts:
        assert [len(logprobs) for logprobs in rollout.reference_logprobs] == [
            len(completion.token_ids) for completion in rollout.completions
        ]


def test_a_validation_is_of_the_newest_weights_and_disturbs_no_rollout(make_run, make_recorder):
    def validated(trainer, pl_module, *_):
        own = dict(pl_module.named_weights())
        assert all(torch.equal(tensor, own[name]) for name, tensor in run.data.engine._model.state_dict().items())

    recorder = make_recorder()
    recorder.on_validation_batch_start = validated
    validation = ArithmeticPrompts("validation", max_operand=9, num_validation=4)
    run = ahead(
        make_run,
        recorder,
        max_staleness=2,
        data={"val_prompts": validation},
        trainer={"val_check_interval": 0.5, "num_sanity_val_steps": -1},
    )
    run.fit()
    assert [what for _, what in named(run.data.engine, "generate")] == [4] * 11
    assert staleness_of(recorder.rollouts) == [[min(i, 2)] * 16 for i in range(5)]
    # The validations' syncs, two in each rollout, are not counted.
    assert [what for _, what in named(run.data.engine, "load")] == [0, *(i for i in range(5) for _ in range(3))]


def test_an_engine_that_fails_is_restarted_and_asked_again_for_what_was_lost(make_run, make_recorder):
    recorders = [make_recorder(), make_recorder()]
    failures = [("submit", 1), ("load", 3), ("collect", 4)]
    runs = [
        ahead(make_run, recorder, engine=EngineAhead(failures=failed, max_restarts=3))
        for recorder, failed in zip(recorders, ([], failures), strict=True)
    ]
    runs[0].fit()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        runs[1].fit()
    assert sum("The engine is started again" in str(warning.message) for warning in warned) == 3
    assert runs[1].data.engine.num_restarts == 3
    # All are answered when they are waited for, seeded, with weights that are the same by then.
    assert [sampled_sequences(r) for r in recorders[0].rollouts] == [
        sampled_sequences(r) for r in recorders[1].rollouts
    ]
    assert torch.equal(weights_of(runs[0]), weights_of(runs[1]))


def test_an_engine_that_cannot_be_restarted_ends_the_run(make_run):
    run = ahead(make_run, engine=EngineAhead(failures=[("collect", 2)]))
    with pytest.raises(EngineError, match="collect number 2 failed"):
        run.fit()
    assert not run.data.engine.is_started


def test_a_sample_of_weights_that_are_too_old_is_not_trained_on(make_run):
    class LateEngine(EngineAhead):
        def _answer(self, number):
            self.begun[number] -= 2
            return super()._answer(number)

    with pytest.raises(EngineError, match=r"from 3 weight syncs ago, more than `data\.max_staleness` 2"):
        ahead(make_run, max_staleness=2, engine=LateEngine(), data={"in_flight": "continue"}).fit()


# ---------------------------------------------------------------- checkpoints


def saved_at(path, moment):
    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == moment:
            trainer.save_checkpoint(path)

    return save


def quick(number):
    """Every third prompt has its samples before anybody waits for them."""
    return number % 3 == 0


@pytest.mark.parametrize("moment", [(0, 0), (0, 1), (2, 0), (2, 1)])
@pytest.mark.parametrize("max_staleness", [1, 3])
def test_a_resumed_run_takes_up_what_has_finished_and_samples_the_rest_again(
    make_run, make_recorder, tmp_path, moment, max_staleness
):
    path = tmp_path / "run.ckpt"
    first, second = make_recorder(saved_at(path, moment)), make_recorder()
    engines = [EngineAhead(quick), EngineAhead(quick)]
    settings = {"max_staleness": max_staleness, "epochs": 6}
    ahead(make_run, first, engine=engines[0], **settings).fit()
    again = ahead(make_run, second, engine=engines[1], **settings)
    again.fit(ckpt_path=path)

    next_rollout = moment[0] + 1
    under_way = range(4 * next_rollout, 4 * min(next_rollout + max_staleness, 6))
    asked = [number for _, numbers in named(engines[1], "submit") for number in numbers]
    assert sorted(asked) == [n for n in range(4 * next_rollout, 24) if n not in under_way or not quick(n)]
    assert len(second.rollouts) == 6 - next_rollout
    ours, theirs = ([r.prompts for r in recorder.rollouts] for recorder in (second, first))
    assert ours == theirs[next_rollout:]
    restored = [number for number in under_way if quick(number)]
    assert restored
    for number in restored:
        i, rows = number // 4, slice(4 * (number % 4), 4 * (number % 4) + 4)
        ours, theirs = (r.completions[rows] for r in (second.rollouts[i - next_rollout], first.rollouts[i]))
        assert ours == theirs
        assert [c.weights_version for c in ours] == [c.weights_version for c in theirs]
    assert all(max(rollout.staleness) <= max_staleness for rollout in second.rollouts)
    trained = Counter(prompt for r in [*first.rollouts[:next_rollout], *second.rollouts] for prompt in r.prompts)
    assert trained == Counter(prompt for r in first.rollouts for prompt in r.prompts)


def test_a_checkpoint_of_the_time_of_scoring_holds_what_is_scored(make_run, make_recorder, tmp_path):
    path = tmp_path / "run.ckpt"

    def save(completion_ids, **_):
        if run.data.iteration == 2 and not path.exists():
            run.trainer.save_checkpoint(path)
        return [float(len(ids) + i % 3) for i, ids in enumerate(completion_ids)]

    recorder, second = make_recorder(), make_recorder()
    run = ahead(make_run, recorder, rewards=[FunctionReward(save, name="saving")], epochs=4)
    run.fit()
    again = ahead(make_run, second, rewards=[FunctionReward(save, name="saving")], epochs=4)
    again.fit(ckpt_path=path)
    assert sampled_sequences(second.rollouts[0]) == sampled_sequences(recorder.rollouts[2])
    assert [number for _, numbers in named(again.data.engine, "submit") for number in numbers] == list(range(12, 16))


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, range(8, 20)),
        ({"max_staleness": 2}, range(8, 12)),
        ({"max_staleness": 1}, ()),
        ({"sampling": Sampling(max_tokens=3, temperature=1.5)}, ()),
        ({"group_size": 8}, ()),
        ({"seed": 1}, ()),
    ],
    ids=str,
)
def test_what_is_restored_answers_the_present_request_and_is_not_too_old(
    make_run, make_recorder, tmp_path, changed, kept
):
    path = tmp_path / "run.ckpt"
    ahead(
        make_run,
        make_recorder(saved_at(path, (1, 1))),
        engine=EngineAhead(lambda number: True),
        max_staleness=3,
        epochs=6,
    ).fit()
    recorder = make_recorder()
    again = ahead(make_run, recorder, data={"max_staleness": 3} | changed, epochs=6)
    again.fit(ckpt_path=path)
    asked = [number for _, numbers in named(again.data.engine, "submit") for number in numbers]
    # Rollouts 2 to 4 were finished, of the weights 0, 0 and 1.
    assert sorted(set(range(8, 24)) - set(asked)) == list(kept)
    assert all(max(rollout.staleness) <= again.data.max_staleness for rollout in recorder.rollouts)


def test_a_run_without_staleness_resumes_one_with_it(make_run, make_recorder, tmp_path):
    path = tmp_path / "run.ckpt"
    ahead(make_run, make_recorder(saved_at(path, (1, 1))), engine=EngineAhead(lambda number: True)).fit()
    recorder = make_recorder()
    ahead(make_run, recorder, max_staleness=0).fit(ckpt_path=path)
    assert staleness_of(recorder.rollouts) == [[0] * 16] * 3


def test_a_dead_engine_prevents_no_checkpoint(make_run, make_recorder, tmp_path):
    path = tmp_path / "run.ckpt"
    ahead(make_run, make_recorder(saved_at(path, (1, 0))), engine=EngineAhead(failures=[("finished", 0)])).fit()
    assert path.exists()


def test_a_closed_run_can_be_continued(make_run, make_recorder):
    recorder = make_recorder()
    run = ahead(make_run, recorder, epochs=2, trainer={"limit_train_batches": 1.0})
    run.fit()
    run.trainer.fit_loop.max_epochs = 4
    run.fit()
    assert staleness_of(recorder.rollouts) == [[0] * 16, [1] * 16, [0] * 16, [1] * 16]


def test_an_exception_closes_the_engine_with_requests_in_flight(make_run, make_recorder):
    def fail(trainer, pl_module, batch_idx):
        assert run.data.engine.open
        raise OSError("disk full")

    run = ahead(make_run, make_recorder(fail))
    with pytest.raises(OSError, match="disk full"):
        run.fit()
    assert not run.data.engine.is_started


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"max_staleness": -1}, r"`data\.max_staleness` must be 0 or positive, got -1"),
        ({"max_staleness": 1, "in_flight": "wait"}, r"`data\.in_flight` must be `continue` or `drop`, got 'wait'"),
        (
            {"max_staleness": 1, "curriculum": PassRateCurriculum()},
            r"`data\.max_staleness` must be 0 with `data\.curriculum`.*leave one of them out",
        ),
        (
            {"max_staleness": 1, "dynamic_sampling_rounds": 1},
            r"`data\.max_staleness` must be 0 with `data\.dynamic_sampling_rounds`.*leave one of them out",
        ),
    ],
    ids=["negative", "in_flight", "curriculum", "dynamic_sampling_rounds"],
)
def test_settings_that_cannot_work_are_refused(make_run, data, message):
    with pytest.raises(ValueError, match=message):
        make_run(data=data)


def test_an_engine_that_cannot_sample_ahead_is_refused_before_it_starts(make_run):
    with pytest.raises(SettingError, match=r"must be 0 with TransformersEngine.*set `data\.engine: .*VLLMEngine`"):
        make_run(data={"max_staleness": 1}).fit()
