"""The table of a validation, and the numbers by data set and category that it shows."""

import json

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drpo_lightning.callbacks import NumericAnswerReward, SampleWriter, ValidationTable
from drpo_lightning.callbacks.validation_table import ALL, validation_table
from drpo_lightning.console import print_table
from drpo_lightning.datamodules import ArithmeticPrompts, PromptSource


class TwoSets(PromptSource):
    """Five additions of two data sets, one of which has categories."""

    def load(self):
        rows = ArithmeticPrompts(split="validation").load()[:5]
        kinds = [("easy", None), ("hard", "odd"), ("hard", "even"), ("hard", "odd"), ("easy", None)]
        return [row | {"data_set": name, "category": kind} for row, (name, kind) in zip(rows, kinds, strict=True)]


def test_the_table_worked_by_hand():
    metrics = {"val/reward/mean": 0.25, "val/avg@4": 0.5, "val/pass@1": 0.5, "val/pass@2": 1.0, "val/x/pass@2": 0.1234}
    header, rows = validation_table({ALL: 3, "x": 1}, metrics | {"val/completions/mean_length": 123.4})
    assert header == ["", "prompts", "avg@4", "pass@1", "pass@2", "reward", "tokens"]
    assert rows == [
        ["all", "3", "0.500", "0.500", "1.000", "0.250", "123"],
        ["x", "1", "-", "-", "0.123", "-", "-"],
    ]


def test_k_stands_in_the_order_of_numbers():
    metrics = {f"val/{name}@{k}": 0.0 for name in ("maj", "pass") for k in (16, 2, 4)}
    header, _ = validation_table({ALL: 1}, metrics)
    assert header[2:] == ["pass@2", "pass@4", "pass@16", "maj@4", "maj@16"] or header[2:] == [
        "pass@2", "pass@4", "pass@16", "maj@2", "maj@4", "maj@16"
    ]  # fmt: skip


def test_a_run_shows_every_subset_and_writes_every_sample(make_run, tmp_path, capsys):
    run = make_run(
        ValidationTable(),
        SampleWriter(every_n_rollouts=2),
        trainer={"logger": TensorBoardLogger(tmp_path, default_hp_metric=False), "max_epochs": 2},
        data={"val_prompts": TwoSets(), "val_num_samples": 4},
        rewards=[NumericAnswerReward()],
    )
    run.fit()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {
        line[0]: line[1:] for line in lines if line and line[0] in ("all", "easy", "hard", "hard/odd", "hard/even")
    }
    assert {name: cells[0] for name, cells in table.items()} == {
        "all": "5", "easy": "2", "hard": "3", "hard/odd": "2", "hard/even": "1"
    }  # fmt: skip

    folder = tmp_path / "lightning_logs" / "version_0"
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "rollout-000001.jsonl", *(f"validation-00000{updates}.jsonl" for updates in (0, 2, 4))
    ]  # fmt: skip
    samples = [json.loads(line) for line in (folder / "samples/validation-000004.jsonl").read_text().splitlines()]
    assert [sample["prompt_number"] for sample in samples] == [number for number in range(5) for _ in range(4)]
    metrics = run.trainer.callback_metrics
    for name in ("easy", "hard"):
        own = [sample["reward"] for sample in samples if sample["columns"]["data_set"] == name]
        assert metrics[f"val/{name}/avg@4"] == pytest.approx(sum(own) / len(own))
        assert metrics[f"val/{name}/reward/mean"] == pytest.approx(sum(own) / len(own))
    odd = [sample for sample in samples if sample["columns"]["category"] == "odd"]
    assert metrics["val/hard/odd/completions/mean_length"] == pytest.approx(
        sum(len(s["completion_ids"]) for s in odd) / len(odd)
    )
    assert "val/maj@4" in metrics

    events = EventAccumulator(str(folder))
    events.Reload()
    *_, text = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("validation/text_summary")]
    assert text.splitlines()[0].startswith("|  | prompts | avg@4 | pass@1 ")
    assert [row.split(" | ")[0].strip("| ") for row in text.splitlines()[2:]] == list(table)


def test_without_validation_nothing_is_shown(make_run, capsys):
    make_run(ValidationTable(), SampleWriter()).fit()
    assert "prompts" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("callback", "settings"), [(ValidationTable, {"max_rows": 0}), (SampleWriter, {"every_n_rollouts": -1})]
)
def test_settings_out_of_range_are_refused(callback, settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
        callback(**settings)


def test_a_trial_run_writes_nothing(make_run, tmp_path):
    make_run(SampleWriter(every_n_rollouts=1), trainer={"fast_dev_run": True}, data={"val_prompts": TwoSets()}).fit()
    assert not list(tmp_path.rglob("samples"))


def test_a_rollout_is_written_in_the_order_of_its_prompts(make_run, make_recorder, tmp_path):
    recorder = make_recorder()
    make_run(SampleWriter(every_n_rollouts=1), recorder).fit()
    lines = (tmp_path / "samples" / "rollout-000001.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt_number"] for line in lines] == recorder.rollouts[0].prompt_numbers


def test_no_column_is_lost_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    print_table("t", ["", "prompts", *(f"pass@{2**k}" for k in range(12))], [["hard/even", "12", *["0.123"] * 12]])
    words = capsys.readouterr().out.split()
    assert words.count("0.123") == 12
    assert {"hard/even", "prompts", "pass@2048"} <= set(words)


def test_a_checkpoint_that_is_validated_has_the_updates_of_its_run(make_run, tmp_path, capsys):
    data = {"val_prompts": TwoSets(), "val_num_samples": 1}
    trained = make_run(trainer={"max_epochs": 2, "limit_val_batches": 0}, data=data)
    trained.fit()
    trained.trainer.save_checkpoint(tmp_path / "last.ckpt")
    run = make_run(ValidationTable(), SampleWriter(), data=data)
    run.trainer.validate(run.module, run.data, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert "Held-out prompts after 4 updates" in capsys.readouterr().out
    assert (tmp_path / "samples" / "validation-000004.jsonl").is_file()


def test_of_a_folder_that_is_validated_no_number_of_updates_is_said(make_run, capsys):
    data = {"val_prompts": TwoSets(), "val_num_samples": 1}
    run = make_run(ValidationTable(), data=data)
    run.trainer.validate(run.module, run.data, verbose=False)
    assert capsys.readouterr().out.splitlines()[0].strip() == "Held-out prompts"
    make_run(ValidationTable(), trainer={"num_sanity_val_steps": -1, "max_steps": 1}, data=data).fit()
    assert "Held-out prompts after 0 updates" in capsys.readouterr().out
