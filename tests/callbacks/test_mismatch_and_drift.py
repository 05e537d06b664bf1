"""The shift of pi against mu, split: no mismatch of equal engines, no drift without an update, both measured else."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drpo_lightning.callbacks.mismatch_and_drift import MismatchAndDrift, part_of_rollout, score
from drpo_lightning.objectives import ClippedRatio
from drpo_lightning.objectives.decoupled import Decoupled
from drpo_lightning.rollout import RolloutHooks, TransformersEngine
from tests.datamodules.engine_ahead import EngineAhead

ROOT = Path(__file__).parents[2]
PACKAGE = "drpo_lightning.callbacks"
STATISTICS = {
    "k1_kl", "k3_kl", "chi2", "log_ratio_abs_mean", "log_ratio_abs_p99", "log_ratio_abs_max", "shift_abs_mean",
    "shift_abs_p99", "shift_abs_max", "effective_sample_size", "perplexity_ratio", "pearson",
}  # fmt: skip


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def mean_k3(log_p, log_q):
    """From the formula, in float64."""
    log_r = np.asarray(log_p, dtype=np.float64) - np.asarray(log_q, dtype=np.float64)
    return (np.exp(log_r) - 1 - log_r).mean()


def flat(lists):
    return [x for part in lists for x in part]


def steps_of(logger, scope):
    """The steps that a scope is logged at; all of its statistics stand there together."""
    names = {name for name in logger.scalars if name.startswith(f"{scope}/")}
    assert names == ({f"{scope}/{name}" for name in STATISTICS} if names else set())
    (steps,) = {tuple(logger.steps(name)) for name in names} or {()}
    return list(steps)


class Scorer(Callback, RolloutHooks):
    """Scores every completion when it has been sampled and after every micro-batch."""

    def __init__(self):
        self.proximal = []
        self.later = []

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.proximal.append(score(trainer, pl_module, rollout, list(range(len(rollout)))))

    def on_train_batch_end(self, trainer, pl_module, *_):
        rollout = trainer.datamodule.rollout
        self.later.append(score(trainer, pl_module, rollout, list(range(len(rollout)))))


class ForwardSizes:
    """Rows of every forward pass of the policy that has no gradient."""

    def __init__(self, run):
        self.sizes = []
        run.trainer.callbacks.insert(0, self.Attach(self.sizes))

    class Attach(Callback):
        def __init__(self, sizes):
            self.sizes = sizes

        def on_train_start(self, trainer, pl_module):
            def note(network, arguments):
                if not torch.is_grad_enabled():
                    self.sizes.append(len(arguments[0]))

            pl_module.network.register_forward_pre_hook(note)


def test_equal_engines_do_not_differ_and_an_update_makes_a_drift(make_run, make_memory):
    logger = make_memory()
    make_run(MismatchAndDrift(), trainer={"logger": logger, "max_epochs": 2, "log_every_n_steps": 2}).fit()
    assert steps_of(logger, "mismatch") == [1, 3]
    assert steps_of(logger, "drift") == [2, 4]
    assert max(logger.values("mismatch/log_ratio_abs_max")) < 1e-4
    assert min(logger.values("mismatch/pearson")) > 0.999999
    assert min(logger.values("drift/k3_kl")) > 1e-6


def test_without_an_update_there_is_no_drift(make_run, make_memory):
    logger = make_memory()
    frozen = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    make_run(MismatchAndDrift(every_n_updates=1), trainer={"logger": logger}, module=frozen).fit()
    assert steps_of(logger, "drift") == [1, 2]
    assert logger.values("drift/log_ratio_abs_max") == [0, 0]
    assert logger.values("drift/effective_sample_size") == [1, 1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mismatch_is_taken_over_all_tokens_of_the_first_update(make_run, make_memory, make_recorder, accumulate):
    logger, recorder = make_memory(), make_recorder()
    make_run(
        MismatchAndDrift(),
        recorder,
        trainer={"logger": logger, "accumulate_grad_batches": accumulate, "max_epochs": 2},
        data={"engine": TransformersEngine(dtype="bfloat16")},
    ).fit()
    for epoch, batches in enumerate(recorder.batches):
        outputs = recorder.outputs[2 * accumulate * epoch :][:accumulate]
        first = list(zip(batches, outputs, strict=False))
        log_pi = torch.cat([output["policy_logprobs"][batch.completion_mask] for batch, output in first])
        log_mu = torch.cat([batch.rollout_logprobs[batch.completion_mask] for batch, _ in first])
        assert len(log_pi) == batches[0].num_update_tokens
        found = logger.values("mismatch/k3_kl")[epoch]
        assert found == pytest.approx(mean_k3(log_pi, log_mu), rel=1e-9)
        assert found > 1e-6
        assert logger.values("mismatch/log_ratio_abs_max")[epoch] == pytest.approx(
            float(abs(log_pi - log_mu).max()), rel=1e-5
        )


def test_drift_equals_that_from_the_logprobs_of_all_tokens(make_run, make_memory):
    logger, scorer = make_memory(), Scorer()
    make_run(
        MismatchAndDrift(num_sequences=99, every_n_updates=1), scorer, trainer={"logger": logger, "max_epochs": 2}
    ).fit()
    assert steps_of(logger, "drift") == [1, 2, 3, 4]
    for update, later in enumerate(scorer.later):
        expected = mean_k3(later, scorer.proximal[update // 2])
        assert logger.values("drift/k3_kl")[update] == pytest.approx(expected, rel=1e-9)
        assert expected > 0


def test_of_one_set_of_tokens_both_ways_measure_the_same_drift(make_run, make_memory, make_recorder):
    """The tokens of the second update, under the weights after the first: as trained on, and scored."""
    logger, scored = make_memory(), []

    def after_batch(trainer, pl_module, batch_idx):
        rollout = trainer.datamodule.rollout
        scored.append([score(trainer, pl_module, rollout, [row]) for row in range(len(rollout))])

    recorder = make_recorder(after_batch)
    objective = {"objective": Decoupled(ClippedRatio()), "optimizer": sgd}
    make_run(MismatchAndDrift(), recorder, trainer={"logger": logger}, module=objective).fit()
    rows = recorder.batches[0][1].sample_ids.tolist()
    proximal = recorder.rollouts[0].proximal_logprobs
    expected = mean_k3(torch.cat([scored[0][row] for row in rows]), flat(proximal[row] for row in rows))
    assert logger.values("drift/k3_kl")[1] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-6


def test_given_the_proximal_logprobs_every_update_has_both_and_nothing_is_scored(make_run, make_memory, make_recorder):
    logger, recorder = make_memory(), make_recorder()
    run = make_run(
        MismatchAndDrift(),
        recorder,
        trainer={"logger": logger, "max_epochs": 2, "accumulate_grad_batches": 2},
        module={"objective": Decoupled(ClippedRatio()), "optimizer": sgd},
        data={"engine": TransformersEngine(dtype="bfloat16")},
    )
    forwards = ForwardSizes(run)
    run.fit()
    assert forwards.sizes == [4] * 4 * 2, "the data module scores 16 completions of each rollout, once"
    assert steps_of(logger, "mismatch") == steps_of(logger, "drift") == [1, 2, 3, 4]
    pairs = list(zip(flat(recorder.batches), recorder.outputs, strict=True))
    for update in range(4):
        mine = pairs[2 * update : 2 * update + 2]
        pi = torch.cat([output["policy_logprobs"][batch.completion_mask] for batch, output in mine])
        mu, proximal = (
            torch.cat([getattr(batch, name)[batch.completion_mask] for batch, _ in mine])
            for name in ("rollout_logprobs", "proximal_logprobs")
        )
        assert logger.values("mismatch/k3_kl")[update] == pytest.approx(mean_k3(proximal, mu), rel=1e-9)
        assert logger.values("drift/k3_kl")[update] == pytest.approx(mean_k3(pi, proximal), rel=1e-9, abs=1e-15)
    drift = logger.values("drift/shift_abs_mean")
    assert max(drift[0], drift[2]) < 1e-5 < 1e-4 < min(drift[1], drift[3])


def test_without_sequences_there_is_mismatch_alone(make_run, make_memory):
    logger = make_memory()
    run = make_run(MismatchAndDrift(num_sequences=0, every_n_updates=1), trainer={"logger": logger})
    forwards = ForwardSizes(run)
    run.fit()
    assert steps_of(logger, "mismatch") == [1]
    assert steps_of(logger, "drift") == []
    assert forwards.sizes == []


@pytest.mark.parametrize(
    ("every_n_updates", "steps"), [(None, [3, 6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 3, 4, 6]), (9, [3, 6])]
)
def test_drift_is_logged_after_the_last_update_and_after_every_nth(make_run, make_memory, every_n_updates, steps):
    logger = make_memory()
    make_run(
        MismatchAndDrift(num_sequences=1, every_n_updates=every_n_updates),
        trainer={"logger": logger, "max_epochs": 2, "accumulate_grad_batches": 2},
        data={"num_updates": 3, "num_prompts": 3},
    ).fit()
    assert steps_of(logger, "drift") == steps
    assert steps_of(logger, "mismatch") == [1, 4]


def test_a_rollout_that_is_cut_short_has_a_last_update_too(make_run, make_memory):
    logger = make_memory()
    make_run(
        MismatchAndDrift(),
        trainer={"logger": logger, "max_epochs": 2, "accumulate_grad_batches": 2, "limit_train_batches": 3},
        data={"num_updates": 4},
    ).fit()
    assert steps_of(logger, "drift") == [2, 4]


def test_a_forward_pass_is_no_larger_than_a_micro_batch(make_run):
    run = make_run(MismatchAndDrift(num_sequences=5), trainer={"accumulate_grad_batches": 4})
    forwards = ForwardSizes(run)
    run.fit()
    assert forwards.sizes == [2, 2, 1] * 2


def test_the_completions_are_spread_over_the_prompts(make_run):
    class Rows(Callback, RolloutHooks):
        def on_rollout_end(self, trainer, pl_module, rollout):
            self.prompts = {tuple(rollout.prompt_ids[row]) for row in callback._rows}

    callback, rows = MismatchAndDrift(num_sequences=4), Rows()
    make_run(callback, rows).fit()
    assert len(rows.prompts) == 4


def test_measuring_does_not_change_the_training(make_run):
    runs = [make_run(*callbacks) for callbacks in ([], [MismatchAndDrift(num_sequences=8, every_n_updates=1)])]
    for run in runs:
        run.fit()
    without, measured = (dict(run.module.named_weights()) for run in runs)
    for name in without:
        assert torch.equal(without[name], measured[name]), name


def test_the_figures_do_not_depend_on_the_micro_batches(make_run, make_memory):
    loggers = []
    for accumulate in (1, 4):
        logger = make_memory()
        make_run(
            MismatchAndDrift(num_sequences=16, every_n_updates=1),
            trainer={"logger": logger, "accumulate_grad_batches": accumulate},
            module={"optimizer": sgd},
            data={"engine": TransformersEngine(dtype="bfloat16")},
        ).fit()
        loggers.append(logger)
    whole, split = loggers
    for scope in ("mismatch", "drift"):
        assert steps_of(whole, scope) == steps_of(split, scope)
        for name in STATISTICS:
            expected = whole.values(f"{scope}/{name}")
            assert split.values(f"{scope}/{name}") == pytest.approx(expected, rel=2e-2, abs=1e-5), (scope, name)


@pytest.mark.parametrize("stop", [(0, 1), (0, 3), (1, 0)], ids=["mid-rollout", "between rollouts", "first update"])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(make_run, make_recorder, make_memory, tmp_path, stop):
    def save(trainer, pl_module, batch_idx):
        if (trainer.current_epoch, batch_idx) == stop:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    scalars = []
    for recorder, ckpt_path in ((make_recorder(save), None), (make_recorder(), tmp_path / "run.ckpt")):
        logger = make_memory()
        make_run(
            MismatchAndDrift(every_n_updates=3),
            recorder,
            trainer={"logger": logger, "max_epochs": 2},
            data={"num_updates": 4},
        ).fit(ckpt_path=ckpt_path)
        scalars.append(logger.scalars)
    step = 4 * stop[0] + stop[1] + 1
    for name in [name for name in scalars[0] if name.startswith(("mismatch/", "drift/"))]:
        assert scalars[1][name] == [entry for entry in scalars[0][name] if entry[0] > step], name
    assert [step for step, _ in scalars[0]["drift/k3_kl"]] == [3, 4, 6, 8]


def test_the_state_is_what_is_in_use(make_run, make_recorder):
    states = []

    def keep(trainer, pl_module, batch_idx):
        states.append(callback.state_dict())

    callback = MismatchAndDrift(num_sequences=2)
    make_run(callback, make_recorder(keep)).fit()
    (middle,), (end,) = (state["ranks"] for state in states)
    assert middle["rows"] == [0, 8]
    assert middle["proximal_logprobs"].dtype == torch.float32
    assert (end["rows"], len(end["proximal_logprobs"])) == ([], 0)


def test_part_of_a_rollout_has_the_completions_asked_for(make_rollout):
    rollout = make_rollout()
    part = part_of_rollout(rollout, [1, 3])
    assert part.completions == [rollout.completions[1], rollout.completions[3]]
    assert (part.prompts, part.texts, part.rewards.tolist()) == (["a", "b"], ["x", "z"], [0.0, 0.5])
    assert len(part) == 2


@pytest.mark.parametrize(("num_prompts", "scored"), [(4, 1), (8, 1), (24, 3)])
def test_by_default_one_completion_in_32_is_scored(make_run, num_prompts, scored):
    numbers = []

    class Rows(Callback, RolloutHooks):
        def on_rollout_end(self, trainer, pl_module, rollout):
            numbers.append(len(callback._rows))

    callback = MismatchAndDrift()
    make_run(callback, Rows(), data={"num_prompts": num_prompts}).fit()
    assert numbers == [scored]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_sequences": -1}, r"`num_sequences` must be 0 \(no drift\) or positive, got -1"),
        ({"every_n_updates": 0}, "`every_n_updates` must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MismatchAndDrift(**settings)


def test_the_reference_is_right_where_it_is_easy():
    assert mean_k3([math.log(0.5)], [math.log(0.25)]) == pytest.approx(1 - math.log(2))


def logged(folder, *arguments):
    """Mismatch and drift of a run of the quickstart on transformers, by name and step, and its table of tokens."""
    command = [sys.executable, "-m", "drpo_lightning", "fit", "--config=configs/quickstart.yaml"]
    command += ["--data.engine=drpo_lightning.rollout.TransformersEngine", "--trainer.accelerator=cpu"]
    command += ["--data.engine.dtype=bfloat16"]
    command += ["--data.num_prompts=4", "--data.num_updates=1", "--data.val_prompts=null", "--trainer.max_epochs=1"]
    command += [f"--trainer.logger.save_dir={folder}", f"--trainer.default_root_dir={folder}"]
    command += ["--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", "--model.objective.delta=0.001"]
    command += ["--trainer.callbacks=null", f"--trainer.callbacks+={PACKAGE}.ExactMatchReward"]
    command += [f"--trainer.callbacks+={PACKAGE}.MismatchAndDrift"]
    command += ["--trainer.callbacks.num_sequences=99"]
    command += [f"--trainer.callbacks+={PACKAGE}.TokenTable", "--trainer.callbacks.every_n_rollouts=1"]
    result = subprocess.run([*command, *arguments], cwd=ROOT, check=False, timeout=400, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    (log_folder,) = (path.parent for path in folder.glob("**/events.out.*"))
    events = EventAccumulator(str(log_folder)).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("mismatch/", "drift/"))]
    (table,) = events.Tensors("tokens/corrected/text_summary")
    scalars = {(name, event.step): event.value for name in names for event in events.Scalars(name)}
    return scalars, table.tensor_proto.string_val[0].decode()


@pytest.mark.reliability
def test_two_ranks_count_what_one_does(tmp_path):
    (whole, whole_table), (ranks, ranks_table) = (
        logged(tmp_path / name, *arguments)
        for name, arguments in (("whole", []), ("ranks", ["--trainer.devices=2", "--trainer.strategy=ddp"]))
    )
    assert whole.keys() == ranks.keys()
    for key, value in whole.items():
        assert ranks[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key
    assert whole_table == ranks_table
    assert "were masked or corrected" in whole_table


def test_mismatch_is_of_the_samples_of_the_newest_weights_and_staleness_of_the_others(make_run, make_memory):
    """Restored samples are stale, those that a resumed run samples again are not: both come in one rollout."""

    class Mixed(Callback, RolloutHooks):
        """Makes every other sample one of older weights."""

        def on_rollout_end(self, trainer, pl_module, rollout):
            rollout.completions = [
                replace(c, logprobs=[x - 0.25 * (i % 2) for x in c.logprobs], weights_version=-(i % 2))
                for i, c in enumerate(rollout.completions)
            ]
            rollout.weights_version = 0

    logger = make_memory()
    run = make_run(
        Mixed(),
        MismatchAndDrift(num_sequences=0),
        trainer={"logger": logger},
        data={"engine": EngineAhead(), "max_staleness": 1},
    )
    run.fit()
    assert logger.values("mismatch/log_ratio_abs_max") == [pytest.approx(0, abs=1e-5)]
    assert logger.values("staleness/k1_kl") == [pytest.approx(-0.25, abs=1e-5)]
    assert set(steps_of(logger, "staleness")) == {1}


def test_without_stale_samples_no_staleness_is_logged(make_run, make_memory):
    logger = make_memory()
    make_run(MismatchAndDrift(), trainer={"logger": logger}, data={"engine": EngineAhead(), "max_staleness": 2}).fit()
    assert not any(name.startswith("staleness/") for name in logger.scalars)
    assert logger.values("mismatch/log_ratio_abs_max") == [pytest.approx(0, abs=1e-5)]
