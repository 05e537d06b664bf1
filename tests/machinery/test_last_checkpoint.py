"""`--ckpt_path last`: the first start, every further one, and damaged checkpoints; explicit paths."""

import csv
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import yaml

ONE_ROLLOUT = ("--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1")
TWO_ROLLOUTS = ("--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1")


@pytest.fixture
def runs(drpo, tmp_path, capsys):
    """Runs `drpo`, keeping all checkpoints; what it printed and warned of."""

    def runs(command, *arguments):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            keep = ["--trainer.callbacks.save_top_k=-1"] if command == "fit" else []
            drpo(command, *keep, *arguments)
        return "".join([*capsys.readouterr(), *(str(warning.message) for warning in caught)])

    return runs


def versions(folder):
    return sorted(path.name for path in (folder / "quickstart").iterdir())


def checkpoint(folder, name):
    return folder / "quickstart" / "version_0" / "checkpoints" / name


def damage(path):
    age = path.stat().st_mtime_ns
    os.truncate(path, path.stat().st_size // 2)
    os.utime(path, ns=(age, age))


def test_the_same_command_starts_and_goes_on_in_one_folder(runs, tmp_path, caplog):
    with caplog.at_level("INFO"):
        runs("fit", *ONE_ROLLOUT, "--ckpt_path=last")
        assert "there is no checkpoint yet, the run starts from the beginning" in caplog.text
        printed = runs("fit", *TWO_ROLLOUTS, "--ckpt_path=last")
    assert "Going on from" in caplog.text
    assert "epoch=0-step=1.ckpt" in caplog.text
    assert "2 updates on 2 rollouts" in printed
    assert versions(tmp_path) == ["version_0"]
    assert checkpoint(tmp_path, "last.ckpt").readlink() == Path("epoch=1-step=2.ckpt")


def test_an_explicit_path_begins_a_new_folder_and_leaves_the_other_as_it_is(runs, tmp_path):
    runs("fit", *ONE_ROLLOUT)
    before = {path: path.stat().st_size for path in (tmp_path / "quickstart" / "version_0").rglob("*")}
    runs("fit", *TWO_ROLLOUTS, f"--ckpt_path={checkpoint(tmp_path, 'last.ckpt')}")
    assert versions(tmp_path) == ["version_0", "version_1"]
    assert before == {path: path.stat().st_size for path in (tmp_path / "quickstart" / "version_0").rglob("*")}


def test_damaged_checkpoints_are_left_out_or_named(runs, drpo, tmp_path):
    runs("fit", *TWO_ROLLOUTS)
    newest, before = (checkpoint(tmp_path, name) for name in ("epoch=1-step=2.ckpt", "epoch=0-step=1.ckpt"))
    damage(newest)
    printed = runs("validate", "--ckpt_path=last")
    assert re.search(r"step=2.ckpt' is cut off or corrupt.*the one before is looked at", printed)
    assert f"{before}' is" not in printed
    with pytest.warns(UserWarning, match="cut off"), pytest.raises(SystemExit) as error:
        drpo("fit", f"--ckpt_path={newest}")
    assert f"The newest whole checkpoint is '{before}'" in str(error.value.code)
    damage(before)
    with pytest.warns(UserWarning, match="cut off"), pytest.raises(SystemExit) as error:
        drpo("fit", "--ckpt_path=last")
    assert "there is no whole checkpoint" in str(error.value.code)


def test_validating_the_last_checkpoint_needs_one(drpo, tmp_path):
    with pytest.raises(SystemExit) as error:
        drpo("validate", "--ckpt_path=last")
    assert "`--ckpt_path last`: there is no checkpoint in" in str(error.value.code)
    assert str(error.value.code).endswith("or leave it out to validate `model.model` as it is")


def test_a_version_that_is_configured_is_the_only_one_that_is_looked_at(runs, tmp_path, caplog):
    runs("fit", *ONE_ROLLOUT)
    with caplog.at_level("INFO"):
        runs("fit", *ONE_ROLLOUT, "--ckpt_path=last", "--trainer.logger.init_args.version=other")
    assert "there is no checkpoint yet" in caplog.text
    assert versions(tmp_path) == ["other", "version_0"]


def delta_in(path):
    return yaml.safe_load(path.read_text())["model"]["objective"]["init_args"]["delta"]


def test_a_refused_resume_changes_nothing(runs, drpo, tmp_path):
    runs("fit", *TWO_ROLLOUTS)
    folder = tmp_path / "quickstart" / "version_0"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as error:
        drpo("fit", *ONE_ROLLOUT, "--ckpt_path=last", "--model.objective.delta=12.5")
    message = str(error.value.code)
    assert "`trainer.max_epochs` must be at least the 2 rollouts behind the checkpoint" in message
    assert message.endswith("got 1; set it to 2 plus those to add, or begin anew without `--ckpt_path`")
    assert before.items() == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}.items()
    with pytest.raises(SystemExit, match="and the checkpoint has null, all weights"):
        drpo("fit", "--trainer.max_epochs=3", "--ckpt_path=last", "--model.objective.delta=12.5", "--model.peft={r: 2}")
    with pytest.raises(SystemExit, match=r"`model.optimizer` must be torch.optim.AdamW, .* got torch.optim.SGD; for"):
        drpo("fit", "--trainer.max_epochs=3", "--ckpt_path=last", "--model.optimizer=torch.optim.SGD")
    assert delta_in(folder / "config.yaml") == 0.2
    assert "AdamW" in (folder / "config.yaml").read_text()


LOGGERS = """[
    {class_path: lightning.pytorch.loggers.TensorBoardLogger, init_args: {save_dir: FOLDER, name: quickstart}},
    {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: FOLDER, name: table}}]"""


@pytest.mark.parametrize("refused", ["--model.peft={r: 2}", "--model.optimizer=torch.optim.SGD"])
def test_a_resume_that_is_refused_while_it_loads_cuts_no_log(drpo, tmp_path, refused):
    settings = {"logger": "--trainer.logger=" + LOGGERS.replace("FOLDER", str(tmp_path))}
    drpo("fit", *TWO_ROLLOUTS, "--trainer.callbacks.save_top_k=-1", **settings)
    for name in ("last.ckpt", "epoch=1-step=2.ckpt"):
        checkpoint(tmp_path, name).unlink()
    table = tmp_path / "table" / "version_0" / "metrics.csv"
    (events,) = (tmp_path / "quickstart" / "version_0").glob("events*")
    whole = {path: path.read_bytes() for path in (table, events)}
    with pytest.raises(SystemExit):
        drpo("fit", *TWO_ROLLOUTS, "--ckpt_path=last", refused, **settings)
    assert whole == {path: path.read_bytes() for path in whole}
    drpo("fit", *TWO_ROLLOUTS, "--ckpt_path=last", **settings)
    assert 0 < events.stat().st_size < len(whole[events]), "what follows is in a file of the second start"
    with table.open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["optim/loss"]] == ["1", "2"]


def test_what_changes_on_the_way_is_said_and_kept(runs, tmp_path, caplog):
    runs("fit", *ONE_ROLLOUT, "--ckpt_path=last")
    caplog.clear()
    changed = ("--model.objective.delta=12.5", "--model.optimizer.lr=0.5")
    with caplog.at_level("INFO"):
        printed = runs("fit", *TWO_ROLLOUTS, "--ckpt_path=last", *changed)
    assert re.search(r"Going on from \S+\.ckpt, after 1 rollouts, 1 updates", caplog.text)
    applied, ignored = (re.search(f"{start}.*", caplog.text)[0] for start in ("The run goes on with", "Not applied"))
    assert applied.endswith("than it had: model.objective.init_args.delta: 0.2 -> 12.5")
    assert "model.optimizer.init_args.lr: 0.00015 -> 0.5" in ignored
    assert "exists and is not empty" not in printed
    folder = tmp_path / "quickstart" / "version_0"
    assert delta_in(folder / "config-until-1.yaml") == 0.2
    assert delta_in(folder / "config.yaml") == 12.5
    record = json.loads((folder / "policy" / "training.json").read_text())
    assert record["updates"] == 2
    assert record["changes"] == [{"from_update": 1, "settings": {"objective.delta": [0.2, 12.5]}}]
    assert record["settings"]["optimizer"]["lr"] == 0.00015
    caplog.clear()
    runs("fit", *TWO_ROLLOUTS, "--trainer.max_epochs=3", "--ckpt_path=last", *changed)
    assert "other settings" not in caplog.text
    assert "Not applied: model.optimizer" in caplog.text
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["optimizer"]["init_args"]["lr"] == 0.00015
