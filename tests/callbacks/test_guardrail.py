"""A logged value that violates its rule stops the run or lowers the learning rate, and the state is kept."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import lr_scheduler

from drpo_lightning.callbacks import RolloutStatistics
from drpo_lightning.callbacks.guardrail import DEFAULT_RULES, Guardrail, Rule, scale_learning_rates
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.errors import SettingError
from drpo_lightning.logs import log_metrics

ROOT = Path(__file__).parents[2]
VALIDATION = {"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20)}
TRIGGERED = r"ignore:Guardrail after \d+ updates"


class Script(Callback):
    """Logs given values of `script/value`, one after every update; None logs nothing."""

    def __init__(self, values):
        self.values = values
        self.before = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        if self.before < step <= len(self.values) and self.values[step - 1] is not None:
            log_metrics(trainer, pl_module, {"script/value": self.values[step - 1]})


def guardrail(**changes):
    return Guardrail(**{"rules": [Rule("script/value", max=1.0)], "checkpoint": False} | changes)


# ---------------------------------------------------------------- what triggers


@pytest.mark.filterwarnings(TRIGGERED)
@pytest.mark.parametrize(
    ("values", "patience", "steps"),
    [
        ([0, 1, 2], 1, 4),
        ([0, 2, 2, 0, 2, 2, 2], 3, 8),
        ([2, 0, 2, 0, 2, 0], 2, None),
        # A value that is logged once counts once, however long it stays the latest.
        ([2, None, None, None, None, 0], 2, None),
        ([2, None, None, None, 2], 2, 6),
        ([math.nan], 1, 2),
        ([math.inf], 1, 2),
        ([1.0, -5.0], 1, None),
    ],
)
def test_a_rule_acts_after_so_many_violations_in_succession(make_run, values, patience, steps):
    # The update after the violation has begun when it is noticed, unless the rollout ends with it.
    run = make_run(guardrail(patience=patience), Script(values), trainer={"max_epochs": 2}, data={"num_updates": 8})
    run.fit()
    assert run.trainer.global_step == (16 if steps is None else steps)


@pytest.mark.filterwarnings(TRIGGERED)
def test_a_violation_in_the_last_update_of_a_rollout_stops_before_the_next(make_run, make_recorder):
    recorder = make_recorder()
    make_run(guardrail(), Script([0, 2]), recorder, trainer={"max_epochs": 3}).fit()
    assert len(recorder.rollouts) == 1


@pytest.mark.filterwarnings(TRIGGERED)
@pytest.mark.parametrize("value", [0.4, math.nan, -math.inf])
def test_a_value_below_the_minimum_or_nan_triggers(make_run, value):
    run = make_run(guardrail(rules=[Rule("script/value", min=0.5)]), Script([0.5, value]), trainer={"max_epochs": 3})
    run.fit()
    assert run.trainer.global_step == 2


@pytest.mark.filterwarnings(TRIGGERED)
@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_guardrail_guards_a_second_fit_too(make_run, capsys):
    guardrail = Guardrail(rules=[Rule("optim/loss", max=-1e9)], checkpoint=False)
    for _ in range(2):
        make_run(guardrail, trainer={"max_epochs": 5}).fit()
        assert "Stopped by Guardrail after " in capsys.readouterr().out
    make_run(guardrail, trainer={"max_epochs": 0}).fit()
    assert "Stopped" not in capsys.readouterr().out


def test_a_sound_run_is_left_alone(make_run, make_memory):
    logger = make_memory()
    run = make_run(Guardrail(), RolloutStatistics(), trainer={"logger": logger, "max_epochs": 3})
    run.fit()
    assert run.trainer.global_step == 6
    assert "guardrail/triggered" not in logger.scalars


# ---------------------------------------------------------------- what happens


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_stopped_run_says_why_keeps_its_state_and_validates(make_run, tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    trainer = {"logger": logger, "max_epochs": 5}
    run = make_run(guardrail(checkpoint=True), Script([0, 0, 7]), trainer=trainer, data=VALIDATION)
    with pytest.warns(UserWarning, match="Guardrail after 3 updates: script/value 7 is not at most 1; the run stops"):
        run.fit()
    path = f"{logger.log_dir}/guardrail-step=3.ckpt"
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert last_line == f"Stopped by Guardrail after 3 updates: script/value 7 is not at most 1. State: {path}"
    assert Path(path).is_file()
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("guardrail/triggered")] == [(3, 1.0)]
    (text,) = events.Tensors("guardrail/text_summary")
    assert text.step == 3
    assert b"script/value 7 is not at most 1" in text.tensor_proto.string_val[0]
    assert [event.step for event in events.Scalars("val/reward/mean")] == [0, 2, 4]


@pytest.mark.filterwarnings(TRIGGERED)
@pytest.mark.parametrize("least", [{"min_epochs": 4}, {"min_steps": 7}])
def test_it_stops_even_if_the_run_is_to_last_longer(make_run, least):
    run = make_run(guardrail(), Script([2]), trainer={"max_epochs": 5, **least})
    run.fit()
    assert run.trainer.global_step == 2


@pytest.mark.filterwarnings(TRIGGERED)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("step", [1, 2, 3], ids=["mid-rollout", "between rollouts", "first update"])
def test_from_the_state_that_is_kept_a_run_goes_on_as_if_nothing_had_been(make_run, tmp_path, step, accumulate):
    whole = make_run(trainer={"max_epochs": 3, "accumulate_grad_batches": accumulate})
    whole.fit()
    trainer = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
    make_run(guardrail(checkpoint=True), Script([0] * (step - 1) + [2]), trainer=trainer).fit()
    resumed = make_run(guardrail(rules=[]), trainer=trainer)
    resumed.fit(ckpt_path=tmp_path / f"guardrail-step={step}.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 6
    theirs = dict(whole.module.named_weights())
    for name, tensor in resumed.module.named_weights():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.filterwarnings(TRIGGERED)
def test_violations_are_counted_over_a_resume(make_run, make_recorder, tmp_path):
    def save(trainer, pl_module, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    parts = {"trainer": {"max_epochs": 3}}
    values = [2, 2, None, 2, 0, 0]
    make_run(guardrail(patience=3), Script(values), make_recorder(save), **parts).fit()
    resumed = make_run(guardrail(patience=3), Script(values), **parts)
    resumed.fit(ckpt_path=tmp_path / "run.ckpt")
    assert resumed.trainer.global_step == 4


# ---------------------------------------------------------------- the learning rate


def lambda_with_warmup(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4) * 0.9**step)


def warmup_then_cosine(optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=6)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 10)], [6])


SCHEDULERS = {
    "none": None,
    "lambda": lambda_with_warmup,
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=1e-5),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5, eta_min=1e-5),
    "sequential": warmup_then_cosine,
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-4, 1e-2, 5, cycle_momentum=False),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 4, 0.3),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "polynomial": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 12),
}


@pytest.mark.parametrize("when", [2, 9])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_keeps_its_shape_at_the_lower_level(name, when):
    rates = []
    for factor in (None, 0.25):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([{"params": [parameter], "lr": 1e-3}], lr=1.0, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer) if SCHEDULERS[name] else None
        taken = []
        for step in range(18):
            if step == when and factor:
                scale_learning_rates([optimizer], [scheduler] if scheduler else [], factor)
            taken.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler:
                scheduler.step()
        rates.append(torch.tensor(taken, dtype=torch.float64))
    usual, lowered = rates
    expected = torch.where(torch.arange(18) < when, usual, 0.25 * usual)
    torch.testing.assert_close(lowered, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_run_goes_on_at_the_lower_learning_rate_and_can_be_lowered_again(make_run, make_memory, tmp_path, capsys):
    rates = []
    for callbacks in ((), (guardrail(action="lower_learning_rate", factor=0.1, checkpoint=True),)):
        logger = make_memory()
        module = {"lr_scheduler": lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=10)}
        run = make_run(*callbacks, Script([0, 0, 2, 0, 2]), module=module, trainer={"max_epochs": 4, "logger": logger})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit()
        rates.append(logger.values("optim/learning_rate"))
    usual, lowered = rates
    # Logged after a step is the rate of the next one.
    factors = [1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01]
    assert lowered == pytest.approx([rate * factor for rate, factor in zip(usual, factors, strict=True)], rel=1e-6)
    messages = [str(entry.message) for entry in caught if "Guardrail" in str(entry.message)]
    assert [message.split(":")[0] for message in messages] == [f"Guardrail after {n} updates" for n in (3, 5)]
    assert all("the learning rate is multiplied by 0.1" in message for message in messages)
    assert logger.steps("guardrail/triggered") == [3, 5]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"guardrail-step={n}.ckpt" for n in (3, 5)]
    assert "Stopped" not in capsys.readouterr().out


@pytest.mark.filterwarnings(TRIGGERED)
def test_after_it_has_acted_it_is_patient_again(make_run, make_memory):
    logger = make_memory()
    callback = guardrail(action="lower_learning_rate", patience=2)
    make_run(callback, Script([2] * 5), trainer={"max_epochs": 3, "logger": logger}).fit()
    assert logger.steps("guardrail/triggered") == [2, 4]


@pytest.mark.filterwarnings(TRIGGERED)
def test_the_lower_learning_rate_survives_a_resume(make_run, make_memory, make_recorder, tmp_path):
    def save(trainer, pl_module, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    rates = []
    for recorder, ckpt_path in ((make_recorder(save), None), (make_recorder(), tmp_path / "run.ckpt")):
        logger = make_memory()
        run = make_run(
            guardrail(action="lower_learning_rate"),
            Script([2]),
            recorder,
            module={"lr_scheduler": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6)},
            trainer={"max_epochs": 3, "logger": logger},
        )
        run.fit(ckpt_path=ckpt_path)
        rates.append(logger.values("optim/learning_rate"))
    assert rates[1] == rates[0][3:]


# ---------------------------------------------------------------- settings


def test_a_rule_of_a_value_that_nothing_logs_is_an_error_after_the_first_rollout(make_run, make_recorder):
    recorder = make_recorder()
    run = make_run(Guardrail([Rule("reward/maen", min=0.0)]), RolloutStatistics(), recorder, trainer={"max_epochs": 3})
    with pytest.raises(SettingError, match=r"a rule of 'reward/maen', which was not logged .*'reward/mean'"):
        run.fit()
    assert len(recorder.rollouts) == 1


@pytest.mark.parametrize("rule", [Rule("reward/mean", min=-1), Rule("perf/tokens_per_second", min=0), Rule("val/x", 0)])
def test_a_rule_of_a_value_that_is_logged_or_may_come_is_none(make_run, rule):
    run = make_run(Guardrail([rule]), RolloutStatistics(), trainer={"max_epochs": 3})
    run.fit()
    assert run.trainer.global_step == 6


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_a_value_that_is_logged_rarely_has_time(make_run):
    run = make_run(Guardrail([Rule("optim/loss", max=1e9)]), trainer={"max_epochs": 4, "log_every_n_steps": 5})
    run.fit()
    assert run.trainer.global_step == 8
    late = make_run(Guardrail([Rule("optim/lost", max=1e9)]), trainer={"max_epochs": 4, "log_every_n_steps": 5})
    with pytest.raises(SettingError, match="a rule of 'optim/lost'"):
        late.fit()
    assert late.trainer.global_step == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "halt"}, "`action` must be `stop` or `lower_learning_rate`, got 'halt'"),
        ({"factor": 1.0}, r"`factor` must be in \(0, 1\), got 1.0"),
        ({"patience": 0}, "`patience` must be at least 1, got 0"),
        ({"rules": [Rule("a", min=0), Rule("a", max=1)]}, "`rules` has several rules of 'a'"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guardrail(**arguments)


def test_a_rule_has_a_bound():
    with pytest.raises(ValueError, match="the rule of `a` must have a `min` or a `max`"):
        Rule("a")


def test_the_default_rules_are_those_that_the_docstring_explains():
    for rule in DEFAULT_RULES:
        assert f"`{rule.metric}` at {'least' if rule.max is None else 'most'} " in Guardrail.__doc__


# ---------------------------------------------------------------- from the command line, on two ranks


@pytest.mark.reliability
def test_on_two_ranks_a_configured_guardrail_stops_the_command_with_status_0(tmp_path):
    callbacks = [
        ("rollout_statistics.RolloutStatistics", {}),
        ("guardrail.Guardrail", {"rules": [{"metric": "perf/generate_seconds", "max": 0.0}], "patience": 2}),
        ("guardrail.Guardrail", {"rules": [], "action": "lower_learning_rate"}),
        ("adaptive_delta.AdaptiveDelta", {"statistic": "corrective_fraction"}),
        ("token_export.TokenExport", {"max_rows": 500}),
        ("shift_map.ShiftMap", {"every_n_updates": 2, "max_tokens": 101}),
    ]
    command = [sys.executable, "-m", "drpo_lightning", "fit", "--config=configs/quickstart.yaml"]
    command += ["--trainer.callbacks=null", "--trainer.callbacks+=drpo_lightning.callbacks.ExactMatchReward"]
    command += ["--data.engine=drpo_lightning.rollout.TransformersEngine", "--trainer.accelerator=cpu"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.num_sanity_val_steps=0"]
    command += ["--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    command += ["--trainer.max_epochs=4", "--trainer.logger=TensorBoardLogger"]
    command += [f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=run", "--trainer.logger.version=0"]
    command += ["--data.num_prompts=8", "--data.group_size=8", "--model.objective.delta=0.2"]
    for name, settings in callbacks:
        entry = {"class_path": f"drpo_lightning.callbacks.{name}", "init_args": settings}
        command.append(f"--trainer.callbacks+={json.dumps(entry)}")
    result = subprocess.run(command, cwd=ROOT, check=False, timeout=300, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    folder = tmp_path / "run" / "version_0"
    stopped = result.stdout.strip().splitlines()[-1]
    assert stopped.startswith("Stopped by Guardrail after 4 updates: perf/generate_seconds "), result.stdout[-2000:]
    assert stopped.endswith(f", 2 times in succession. State: {folder}/guardrail-step=4.ckpt")
    assert (folder / "guardrail-step=4.ckpt").is_file()
    tables = {path.name: pq.read_table(path) for path in sorted((folder / "tokens").iterdir())}
    assert list(tables) == [f"rollout_00000{n}.rank{rank}.parquet" for n in (0, 1) for rank in (0, 1)]
    for name, table in tables.items():
        assert 0 < len(table) <= 500
        assert set(table["rank"].to_pylist()) == {int(name.split(".")[1][-1])}
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Images("shift_map")] == [2, 4]
    assert len({event.value for event in events.Scalars("adaptive/delta")}) > 1
