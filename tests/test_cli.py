"""The command line: configurations are built, merged and refused with the key, the value and the way out."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar

from drpo_lightning import cli
from drpo_lightning.callbacks import RolloutProgress, RolloutStatistics
from drpo_lightning.objectives import DPPO, DRPO

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
ON_CPU = ("--trainer.accelerator=cpu",)
FSDP2 = "{class_path: ModelParallelStrategy}"
TRANSFORMERS = "--data.engine=drpo_lightning.rollout.TransformersEngine"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs `drpo` with arguments, from the repository's root, logs in a temporary folder."""

    def run(*arguments, config=QUICKSTART):
        monkeypatch.chdir(ROOT)
        logs = (f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.init_args.save_dir={tmp_path}")
        monkeypatch.setattr(sys, "argv", ["drpo", "fit", f"--config={config}", *logs, *arguments])
        cli.main()

    return run


@pytest.fixture
def build(run, monkeypatch):
    """Builds everything that `drpo fit` would run, and returns the command line object."""
    built = []
    monkeypatch.setattr(cli.DRPOCommandLine, "_run_subcommand", lambda self, _: built.append(self))

    def build(*arguments, config=QUICKSTART):
        run(*ON_CPU, *arguments, config=config)
        return built[-1]

    return build


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_built_up_to_the_model(build, config):
    command = build(config=config)
    assert isinstance(command.model.objective, DRPO)
    assert command.datamodule.model_name == command.model.model_name
    assert command.model.network is None


def test_the_papers_settings_are_in_the_recipe(build):
    command = build(config=ROOT / "configs" / "qwen3_math.yaml")
    model, data = command.model, command.datamodule
    assert model.model_name == "Qwen/Qwen3-4B-Base"
    assert (model.objective.delta, model.aggregation, model.horizon) == (12.5, "seq_mean_token_sum_norm", 8192)
    assert (data.num_prompts * data.group_size, data.num_updates, data.advantage) == (512, 4, "group_mean")
    assert (data.sampling.temperature, data.sampling.top_p, data.sampling.top_k) == (1.0, 1.0, 0)


def test_interpolation_and_later_files_and_flags_win(build, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "vars: {radius: 0.5}\n"
        "model:\n  objective: {init_args: {delta: '${vars.radius}'}}\n"
        "data: {num_updates: '${oc.env:DRPO_TEST_UPDATES,2}'}\n"
    )
    command = build(f"--config={overlay}")
    assert command.model.objective.delta == 0.5
    assert command.datamodule.num_updates == 2
    assert build(f"--config={overlay}", "--vars.radius=0.7").model.objective.delta == 0.7


def test_the_objective_is_swapped_in_one_line(build):
    objective = build("--model.objective=DPPO", "--model.objective.divergence=binary_kl").model.objective
    assert objective == DPPO("binary_kl")


def test_the_temperature_of_the_policy_is_that_of_the_sampling(build):
    assert build("--data.sampling.temperature=0.7").model.temperature == 0.7


def test_the_printed_configuration_builds_the_same(build, run, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run("--print_config", "--model.objective.delta=0.3", *ON_CPU)
    assert stop.value.code in (0, None)
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert yaml.safe_load(printed.read_text())["model"]["objective"]["init_args"] == {
        "delta": 0.3,
        "scale_by_advantage": True,
    }
    assert build(config=printed).model.objective == DRPO(0.3)


def test_a_progress_bar_is_there_unless_it_is_not_wanted(build):
    assert any(isinstance(callback, RolloutProgress) for callback in build().trainer.callbacks)
    without = build("--trainer.enable_progress_bar=false").trainer.callbacks
    assert not any(isinstance(callback, ProgressBar) for callback in without)


def test_statistics_of_rollouts_are_there_once(build):
    for arguments in ((), (*ON_CPU, "--trainer.callbacks=drpo_lightning.callbacks.ExactMatchReward")):
        callbacks = build(*arguments).trainer.callbacks
        assert [type(callback) for callback in callbacks].count(RolloutStatistics) == 1


def test_verbose_is_the_progress_bars(build):
    for arguments, expected in (([], False), (["--verbose=true"], True)):
        (bar,) = (c for c in build(*arguments).trainer.callbacks if isinstance(c, RolloutProgress))
        assert bar.verbose is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.objective.delta=-1"], r"`delta` must be positive, in units of probability, got -1"),
        (["--model.objective.delta=.nan"], r"`delta` must be positive, in units of probability, got nan"),
        (["--model.objective.dleta=1"], r"'dleta' is not accepted Is `delta` meant\?"),
        (["--model.optimizer.lr={nonsense: 1}"], r"Option 'nonsense' is not accepted"),
        (["--data.group_sise=4"], r"--data\.group_sise=4 Is `data\.group_size` meant\?"),
        (["--trainer.max_epoch=4"], r"Is `trainer\.max_epochs` meant\?"),
        (["--data.nothing_alike=4"], r"--data\.nothing_alike=4\s*$"),
        (["--model.objective=Nonsense"], r"Nonsense"),
        (["--model.lr=1"], r"model\.lr"),
        (["--data.group_size=1"], r"`data\.group_size` must be at least 2, got 1"),
        (["--data.num_updates=0"], r"`data\.num_updates` must be at least 1, got 0"),
        (["--data.num_prompts=ten"], r"data\.num_prompts"),
        (["--data.sampling.top_p=0"], r"`sampling\.top_p` must be in \(0, 1\], got 0"),
        (["--data.sampling.temperature=-1"], r"`sampling\.temperature` must be 0 or positive, got -1"),
        (["--model.model=models/nowhere/at/all"], r"'models/nowhere/at/all' is no folder"),
        (["--model.model=configs"], r"'configs' has no config\.json"),
        (["--model.aggregation=mean"], r"model\.aggregation"),
        (["--model.aggregation=seq_mean_token_sum_norm"], r"`model\.horizon` must be positive"),
        (
            ["--seed_everything=-1"],
            r'key "seed_everything":\s+Not of type Seed: -1 does not conform to restriction v>=0',
        ),
        (["--seed_everything=true"], r'key "seed_everything"'),
        (["--trainer.precision=16-mixed"], r"16-mixed needs a CUDA GPU.*set that, or 32-true"),
        (["--trainer.strategy=ModelParallelStrategy"], r"invalid strategy name.*A class is written \{class_path:"),
        (["--trainer.strategy=fsdp"], r"requires a GPU accelerator.*Or take `ddp` or ModelParallelStrategy"),
        (
            [f"--trainer.strategy={FSDP2}", "--trainer.precision=16-mixed"],
            r"does not support .*16-mixed.*Choose a different precision among",
        ),
        (["--trainer.devices=-1"], r"`trainer` cannot be made: `devices` .*should be an int > 0"),
        (["--trainer.accumulate_grad_batches=0"], r"`trainer\.accumulate_grad_batches` must be at least 1.*got 0"),
        (
            ["--trainer.gradient_clip_val=-1"],
            r"`trainer\.gradient_clip_val` must be 0 \(no clipping\) or positive, got -1",
        ),
        (["--model.optimizer.lr=-1"], r"`model\.optimizer` cannot be made: Invalid learning rate: -1"),
        (
            ["--model.lr_scheduler=LinearLR", "--model.lr_scheduler.start_factor=-1"],
            r"`model\.lr_scheduler` cannot be made: Starting multiplicative factor expected",
        ),
        (["--trainer.callbacks+=my_rewards.Missing"], r"my_rewards\.Missing"),
        (
            ["--trainer.callbacks+=FunctionReward", "--trainer.callbacks.function=my_rewards.missing"],
            r"`function` 'my_rewards\.missing' cannot be imported",
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_bad_setting_is_refused_before_anything_is_loaded(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(*ON_CPU, *arguments)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert re.search(message, text), text


def test_a_misspelt_name_in_a_file_is_answered_by_the_one_that_is_meant(run, capsys, tmp_path):
    (tmp_path / "more.yaml").write_text("data: {num_promts: 4}")
    with pytest.raises(SystemExit):
        run(f"--config={tmp_path / 'more.yaml'}")
    assert re.search(r"'data\.num_promts' Is `data\.num_prompts` meant\?", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_without_a_configuration_the_way_to_one_is_shown(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["drpo", command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert re.search(r'key "model\.model".*`--config FILE`: `drpo init` writes one', capsys.readouterr().err, re.DOTALL)


def test_a_single_callback_need_not_be_a_list(build):
    cli = build(*ON_CPU, "--trainer.callbacks=drpo_lightning.callbacks.ExactMatchReward")
    assert {"ExactMatchReward", "RolloutProgress"} <= {type(callback).__name__ for callback in cli.trainer.callbacks}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": {"num_prompts": None}}, r"has a default: data\.num_prompts\n"),
        ({"model": {"objective": None}}, r"has a default: model\.objective\n"),
        ({"trainer": {"accumulate_grad_batches": None}}, r"`trainer\.accumulate_grad_batches` must be .* got None\n"),
    ],
    ids=["number", "object", "trainer"],
)
def test_what_is_null_in_a_file_is_named(run, capsys, tmp_path, section, message):
    file = tmp_path / "null.yaml"
    file.write_text(yaml.safe_dump(section))
    with pytest.raises(SystemExit) as stop:
        run(*ON_CPU, f"--config={file}")
    assert re.search(message, f"{capsys.readouterr().err} {stop.value.code}")


@pytest.mark.parametrize("value", [None, -1, ["nonsense"]])
def test_a_trainer_that_holds_no_settings_is_refused(monkeypatch, capsys, tmp_path, value):
    config = yaml.safe_load(QUICKSTART.read_text()) | {"trainer": value}
    (tmp_path / "trainer.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["drpo", "fit", f"--config={tmp_path / 'trainer.yaml'}"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "`trainer` must hold settings, got" in capsys.readouterr().err


def test_a_callback_without_a_class_is_refused(run, capsys, tmp_path):
    config = yaml.safe_load(QUICKSTART.read_text())
    config["trainer"]["callbacks"].insert(3, {})  # Lightning's base class, which does nothing
    (tmp_path / "nothing.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        run(*ON_CPU, config=tmp_path / "nothing.yaml")
    assert "`trainer.callbacks` item 3 has no `class_path`; name its class" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.sampling.temperature=0"], r"`data\.sampling\.temperature` must be positive, got 0"),
        (["--data.sampling.top_p=0.9"], r"top_p=0\.9, top_k=0 renormalises mu"),
        (["--data.sampling.top_k=5"], r"top_k=5 renormalises mu"),
        (["--data.num_updates=5"], r"512 completions .* cannot be split evenly into `data\.num_updates` 5"),
        (["--data.sampling.max_tokens=600"], r"more than the context of 512"),
        (["--data.prompt_format=chat"], r"has no chat template; set `data\.prompt_format: raw`"),
        (["--trainer.precision=64-true"], r"`trainer\.precision` 64-true is not supported; take one of 32-true"),
        (["--trainer.callbacks=null"], r"`trainer\.callbacks` has no reward"),
        pytest.param(
            ["--trainer.accelerator=gpu"],
            r"No supported gpu backend found! `trainer.accelerator: gpu` needs a GPU .*`drpo doctor`",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--data.prompts=FilePrompts", "--data.prompts.path=nowhere.jsonl"], r"'nowhere\.jsonl' does not exist"),
        (["--model.model=models/nowhere"], r"`model\.model` 'models/nowhere' cannot be loaded: .*drpo doctor"),
        (["--model.model=models/arithmatic"], r"There is a folder 'models/arithmetic': is it meant\?"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_together_is_refused_before_the_model_is_loaded(run, monkeypatch, arguments, message):
    monkeypatch.setattr(
        "drpo_lightning.modules.PolicyModule.configure_model", lambda self: pytest.fail("the model was loaded")
    )
    with pytest.raises(SystemExit, match=f"drpo: error: .*{message}"):
        run(*ON_CPU, TRANSFORMERS, *arguments)


def test_a_policy_folder_without_weights_is_refused(run, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SystemExit):
        run(*ON_CPU, f"--model.model={tmp_path}")
    assert f"`model` '{tmp_path}' has no weights" in capsys.readouterr().err


def test_a_column_that_a_reward_needs_is_missed_before_the_model_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "drpo_lightning.modules.PolicyModule.configure_model", lambda self: pytest.fail("the model was loaded")
    )
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "result": "3"}\n')
    message = r"`data\.prompts`: row 1 has no column 'answer', which the reward 'exact_match' needs"
    with pytest.raises(SystemExit, match=message):
        run(*ON_CPU, TRANSFORMERS, "--data.prompts=FilePrompts", f"--data.prompts.path={tmp_path / 'prompts.jsonl'}")


def test_verbose_needs_no_value():
    given = ["fit", "--verbose", "--config", "a.yaml", "--verbose", "false", "--verbose"]
    assert cli.with_values_of_flags(given) == [
        "fit", "--verbose=true", "--config", "a.yaml", "--verbose", "false", "--verbose=true"
    ]  # fmt: skip
    assert cli.with_values_of_flags([]) == []


def test_an_answer_that_is_no_number_is_refused_before_the_model_is_loaded(run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "drpo_lightning.modules.PolicyModule.configure_model", lambda self: pytest.fail("the model was loaded")
    )
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "x+x=", "answer": "2x"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = '--trainer.callbacks+={"class_path": "drpo_lightning.callbacks.NumericAnswerReward"}'
    with pytest.raises(
        SystemExit, match=r"`data\.prompts`: row 1: reward 'numeric_answer': `answer` must be one number"
    ):
        run(
            *ON_CPU,
            TRANSFORMERS,
            "--data.prompts=FilePrompts",
            f"--data.prompts.path={tmp_path / 'prompts.jsonl'}",
            reward,
        )
