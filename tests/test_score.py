"""`drpo score`: figures, samples and files of a configuration's rewards, without trainer, model and engine."""

import json
import math
from pathlib import Path

import pytest
import yaml

from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardError, RewardFailure
from drpo_lightning.score import main, read_samples, read_settings

ROWS = [
    {"prompt": "1+2=", "completion": "3", "answer": "3"},
    {"prompt": "1+2=", "completion": "4", "answer": "3"},
    {"prompt": "2+2=", "completion": "44", "answer": "44", "finish_reason": "length"},
    {"prompt": "2+2=", "completion": "", "answer": "4"},
]
FRAGILE = """
from drpo_lightning.callbacks import FallibleReward, RewardCallback
from drpo_lightning.rewards import RewardFailure


class Fragile(FallibleReward):
    def outcomes(self, batch):
        return [RewardFailure("timeout", "was asleep") if not text else float(len(text)) for text in batch.completions]


class Choosy(RewardCallback):
    def score(self, batch):
        return [1.0 if text == "3" else None for text in batch.completions]


def faulty(completions, answer, **_):
    return [1 / len(text) for text in completions]
"""


@pytest.fixture
def score(tmp_path, monkeypatch, model_folder):
    """Scores rows by some callbacks of a configuration for a GPU; returns what was written."""
    (tmp_path / "score_rewards.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(tmp_path)

    def run(callbacks, rows=ROWS, *options, model=model_folder, **sections):
        config = {
            "trainer": {"accelerator": "gpu", "devices": 8, "callbacks": callbacks},
            "model": {"model": model},
            "data": {"engine": "VLLMEngine", "prompts": "ArithmeticPrompts", "sampling": {"max_tokens": 7}},
        } | sections
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"config": "config.yaml", "data": "rows.jsonl", "output": "scores.jsonl"}
        main([*(f"--{name}={tmp_path / file}" for name, file in files.items()), *options])
        return [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]

    return run


def callback(path, **settings):
    return {"class_path": path, "init_args": settings}


def cells(output, name):
    """The cells of a reward's line in the table."""
    return next(line.split()[1:] for line in output.splitlines() if line.split()[:1] == [name])


def test_the_table_and_the_file_say_what_the_rewards_say(score, capsys):
    rows = score(
        [callback("ExactMatchReward"), callback("score_rewards.Fragile", on_failure="drop_sample", weight=0.5)]
    )
    output = capsys.readouterr().out
    assert cells(output, "exact_match")[:8] == ["1.000", "0.500", "0.500", "0.000", "1.000", "100.0%", "-", "-"]
    std = math.sqrt(((1 - 4 / 3) ** 2 * 2 + (2 - 4 / 3) ** 2) / 3)
    assert cells(output, "fragile")[:8] == ["0.500", "1.333", f"{std:.3f}", "1.000", "2.000", "75.0%", "0.0%", "25.0%"]
    assert cells(output, "sum")[:5] == ["1.333", "0.624", "0.500", "2.000", "75.0%"]
    assert [row["reward"] for row in rows] == [1.5, 0.5, 2.0, None]
    assert [row["rewards"]["fragile"] for row in rows] == [1.0, 1.0, 2.0, None]
    assert [row["finish_reason"] for row in rows] == ["stop", "stop", "length", "stop"]
    assert [len(row["completion_ids"]) for row in rows] == [2, 2, 2, 1]  # with an end of sequence where it stopped
    assert rows[3]["failures"] == {"fragile": {"kind": "timeout", "reason": "was asleep", "output": ""}}
    assert rows[0]["columns"] == {"answer": "3"}


def test_the_lowest_the_highest_and_the_dropped_samples_are_shown(score, capsys):
    long = {"prompt": "x" * 1000, "completion": "8" * 3, "answer": "3"}
    score([callback("score_rewards.Fragile", on_failure="drop_sample")], [*ROWS, long], "--num_samples=1")
    output = capsys.readouterr().out
    lowest, highest, dropped = (output.index(title) for title in ("lowest: row 0", "highest: row 4", "dropped: row 3"))
    assert lowest < highest < dropped
    assert f"'{'x' * 200} ... {'x' * 200}'" in output
    assert "fragile failed (timeout): was asleep" in output[dropped:]


def test_what_it_writes_it_reads(score):
    callbacks = [callback("ExactMatchReward"), callback("OverlongReward", max_tokens=2, buffer_tokens=2)]
    first = score(callbacks)
    assert score(callbacks, first, model="no/such/model") == first


def test_a_failure_under_raise_exits_with_the_sample(score, capsys):
    with pytest.raises(SystemExit) as exit_info:
        score([callback("score_rewards.Fragile")])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert "reward 'fragile' was asleep, for prompt '2+2=', completion '', columns {'answer': '4'}" in error


def test_an_exception_in_a_reward_exits_with_the_sample(score, capsys):
    with pytest.raises(SystemExit) as exit_info:
        score([callback("FunctionReward", function="score_rewards.faulty")])
    assert exit_info.value.code == 1
    assert "ZeroDivisionError('division by zero'); it does so for prompt '2+2='" in capsys.readouterr().err


def test_a_sample_that_no_reward_applies_to_is_an_error_as_in_training(score, capsys):
    with pytest.raises(SystemExit) as exit_info:
        score([callback("score_rewards.Choosy")])
    assert exit_info.value.code == 1
    assert "no reward applies to completion 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([callback("ExactMatchReward", column="truth")], r"no column 'truth', which the reward 'exact_match' needs"),
        ([callback("PolicyShift")], "the configuration lists no reward under `trainer.callbacks`"),
        ([callback("FormatReward", pattern="(")], "is no regular expression"),
        (
            [callback("RewardModelReward", model="no/such/model")],
            "drpo: error: the reward model 'no/such/model' cannot",
        ),
    ],
)
def test_what_cannot_work_exits_with_2(score, capsys, callbacks, message):
    with pytest.raises(SystemExit) as exit_info:
        score(callbacks)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_options_of_fit_change_the_configuration(score):
    options = ["--trainer.callbacks+=score_rewards.Fragile", "--trainer.callbacks.on_failure=drop_sample"]
    rows = score([callback("ExactMatchReward", weight="${vars.weight}")], ROWS, *options, "--vars.weight=3")
    assert [row["reward"] for row in rows] == [4.0, 1.0, 5.0, None]


def test_a_saved_configuration_of_a_run_is_read(tmp_path, model_folder):
    (tmp_path / "config.yaml").write_text(
        f"model: {{model: {model_folder}}}\ndata: {{engine: VLLMEngine, prompts: ArithmeticPrompts}}\n"
        "trainer: {callbacks: [ExactMatchReward, PolicyShift]}\nckpt_path: last\nweights_only: true\n"
    )
    settings = read_settings([f"--config={tmp_path / 'config.yaml'}"])
    assert [reward.name for reward in settings.rewards] == ["exact_match"]
    assert settings.tokenizer == model_folder


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns_in_an_object_are_the_columns(tmp_path, model_folder):
    rows = [row | {"columns": {"answer": "7"}, "kind": "error", "completion_ids": [3]} for row in ROWS]
    batch = read_samples(write(tmp_path / "failures.jsonl", *rows), model_folder)
    assert batch.columns == {"answer": ["7"] * 4}
    assert batch.completion_ids == [[3]] * 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "row 1: no text in `completion`"),
        ({"prompt": "p", "completion": 5}, "row 1: no text in `completion`"),
        ({"completion": "c"}, "line 2: no column 'prompt'"),
        (
            {"prompt": "p", "completion": "c", "finish_reason": "eos"},
            "`finish_reason` must be stop or length, got 'eos'",
        ),
    ],
)
def test_a_row_that_is_no_sample_is_named(tmp_path, model_folder, row, message):
    with pytest.raises(SettingError, match=message):
        read_samples(write(tmp_path / "rows.jsonl", ROWS[0], row), model_folder)


def test_a_missing_tokenizer_is_named_and_only_if_it_is_needed(tmp_path):
    with pytest.raises(SettingError, match=r"'no/such/model' cannot be loaded: .* Give another with --tokenizer"):
        read_samples(write(tmp_path / "rows.jsonl", *ROWS), "no/such/model")
    rows = [row | {"completion_ids": [1]} for row in ROWS]
    assert len(read_samples(write(tmp_path / "rows.jsonl", *rows), "no/such/model")) == 4


def test_the_tokenizer_is_read_as_fit_reads_it(score, tmp_path, monkeypatch, model_folder):
    import transformers

    asked = []
    read = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda name, **settings: asked.append((name, settings)) or read(name, **settings),
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "policy").symlink_to(Path(model_folder).absolute())
    score([callback("ExactMatchReward")], ROWS, "--model.trust_remote_code=true", model="~/policy")
    assert asked == [(str(tmp_path / "policy"), {"trust_remote_code": True})]


def test_failures_are_kept_with_their_samples():
    from drpo_lightning.callbacks import FallibleReward
    from drpo_lightning.rewards import RewardBatch, score_rewards

    class Second(FallibleReward):
        def outcomes(self, batch):
            return [0.0, RewardFailure("error", "broke")]

    batch = RewardBatch(["p"] * 2, ["c"] * 2, [[1]] * 2, ["stop"] * 2)
    scores = score_rewards([Second(on_failure="drop_sample")], batch)
    assert scores.failures == {"second": {1: RewardFailure("error", "broke")}}
    assert scores.seconds["second"] >= 0
    with pytest.raises(RewardError, match="'second' broke"):
        score_rewards([Second()], batch)
