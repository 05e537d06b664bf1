"""The last lines of a run: before and after, and where everything is."""

import re

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from drpo_lightning.callbacks import ExportPolicy, RunSummary
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.modules import ReferencePenalty

VALIDATION = {"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20), "val_num_samples": 2}


def printed(capsys):
    return capsys.readouterr().out.strip().splitlines()


def test_before_and_after_are_the_first_and_the_last_validation(make_run, make_memory, capsys):
    logger = make_memory()
    make_run(
        RunSummary(), trainer={"logger": logger, "max_epochs": 3, "num_sanity_val_steps": -1}, data=VALIDATION
    ).fit()
    rewards, passes = logger.values("val/reward/mean"), logger.values("val/pass@1")
    assert len(rewards) == 4
    lines = printed(capsys)
    assert "6 updates on 3 rollouts" in lines
    for label, values in (("reward", rewards), ("pass@1", passes)):
        (line,) = (line for line in lines if line.startswith(f"held-out {label}: "))
        before, after = re.fullmatch(r".*: (\d\.\d{3}) before -> (\d\.\d{3}) after", line).groups()
        assert (float(before), float(after)) == pytest.approx((values[0], values[-1]), abs=6e-4)
    assert rewards[0] != rewards[-1]


def test_folders_are_named(make_run, tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    make_run(ExportPolicy(), RunSummary(), trainer={"logger": logger}).fit()
    assert printed(capsys)[-4:] == [
        "2 updates on 1 rollouts",
        f"logs:    {logger.log_dir}",
        f"policy:  {logger.log_dir}/policy",
        f"look at: tensorboard --logdir '{tmp_path}/run'",
    ]


def test_without_validation_there_is_no_line_of_it(make_run, capsys):
    make_run(RunSummary()).fit()
    assert not any("held-out" in line for line in printed(capsys))


def start_of(capsys):
    return dict(re.split(":\\s+", line, maxsplit=1) for line in printed(capsys) if re.match(r"[a-z]+:\s", line))


def test_the_start_says_what_will_be_done(make_run, model_folder, tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    run = make_run(RunSummary(), trainer={"logger": logger, "max_epochs": 3})
    run.fit()
    shown = start_of(capsys)
    size = sum(parameter.numel() for parameter in run.module.network.parameters())
    name, parameters = shown["model"].split(", ")
    assert name == model_folder
    assert float(parameters.removesuffix(" k parameters")) == pytest.approx(size / 1e3, rel=0.01)
    assert shown["strategy"] == "SingleDeviceStrategy, 1 rank on cpu, 32-true"
    assert shown["objective"] == run.module.objective.describe()
    assert shown["engine"] == "TransformersEngine"
    assert shown["rollout"] == (
        "4 prompts x 4 samples = 16 completions -> 2 updates of 8, each in 1 micro-batches of about 8 on 1 rank(s); "
        f"completions of at most {run.data.sampling.max_tokens} tokens"
    )
    tokens = 3 * 16 * run.data.sampling.max_tokens
    assert shown["run"] == (
        f"3 rollouts, 6 updates, at most {tokens} sampled tokens, staleness 0 (every rollout is of the newest weights)"
    )


@pytest.mark.parametrize("callbacks", [(), (RunSummary(),)], ids=["without", "with"])
def test_sizes_objective_and_reference_are_said_once(make_run, capsys, caplog, callbacks):
    with caplog.at_level("INFO"):
        run = make_run(*callbacks, module={"reference": ReferencePenalty(beta=0.5)})
        run.fit()
    said = caplog.text + capsys.readouterr().out
    for text in (run.data.describe_rollout(), run.module.objective.describe(), run.module.reference.describe()):
        assert said.count(text) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": -1, "max_steps": 3}, "2 rollouts, 3 updates, at most "),
        ({"max_epochs": 1, "max_steps": 30}, "1 rollouts, 2 updates, at most "),
        ({"max_epochs": -1, "max_time": "00:00:00:01"}, "no end set, at most "),
    ],
)
def test_the_length_of_a_run_is_what_ends_it_first(make_run, capsys, settings, expected):
    make_run(RunSummary(), trainer=settings).fit()
    assert start_of(capsys)["run"].startswith(expected)


def test_a_first_validation_without_a_reward_is_left_out(make_run, capsys):
    summary = RunSummary()
    run = make_run(summary, data=VALIDATION, trainer={"num_sanity_val_steps": -1})
    run.fit()
    first = summary.state_dict()["first"]
    for name in [name for name in first if name != "val/completions/mean_length"]:
        del first[name]
    capsys.readouterr()
    summary.on_fit_end(run.trainer, run.module)
    assert re.search(r"held-out reward: \d\.\d{3} after\n", capsys.readouterr().out)
