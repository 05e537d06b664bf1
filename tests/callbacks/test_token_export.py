"""The exported tokens: what was sampled and trained on, the same in every file, and readable in one line."""

import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from drpo_lightning.callbacks.token_export import COLUMNS, TokenExport, write_parquet
from drpo_lightning.objectives import DPPO, DRPO
from drpo_lightning.rollout import RolloutHooks


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def rows(folder):
    """All rows of a folder, as dictionaries."""
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def half_equal_reward(completion_ids, **_):
    """Every other prompt gives all its samples the same reward, and so A = 0."""
    return [0.0 if i // 4 % 2 else sum(ids) % 7 / 6 for i, ids in enumerate(completion_ids)]


@pytest.mark.parametrize("objective", [DRPO(0.2), DPPO("binary_tv", 0.02)], ids=["drpo", "dppo"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_trained_token_is_a_row(make_run, make_recorder, tmp_path, objective, accumulate):
    from drpo_lightning.callbacks import FunctionReward

    recorder = make_recorder()
    run = make_run(
        TokenExport(str(tmp_path / "tokens")),
        recorder,
        rewards=[FunctionReward(half_equal_reward, name="half")],
        trainer={"max_epochs": 2, "accumulate_grad_batches": accumulate},
        module={"objective": objective},
    )
    run.fit()
    decode = run.data.encoder.tokenizer.decode
    expected = []
    outputs = iter(recorder.outputs)
    for number, (rollout, batches) in enumerate(zip(recorder.rollouts, recorder.batches, strict=True)):
        for i, batch in enumerate(batches):
            output = next(outputs)
            for row, sample in enumerate(batch.sample_ids.tolist()):
                completion = rollout.completions[sample]
                start = len(rollout.prompt_ids[sample])
                for position, token in enumerate(completion.token_ids):
                    place = (row, start + position)
                    weight = output["objective"].grad_weight[place].item()
                    keep = output["objective"].keep
                    expected.append(
                        {
                            "rollout": number,
                            "update": 2 * number + i // accumulate + 1,
                            "rank": 0,
                            "sample_id": sample,
                            "prompt_number": rollout.prompt_numbers[sample],
                            "position": position,
                            "token_id": token,
                            "text": decode([token]),
                            "log_mu": pytest.approx(completion.logprobs[position], rel=1e-6),
                            "log_pi": output["policy_logprobs"][place].item(),
                            "advantage": batch.advantages[place].item(),
                            "grad_weight": None if math.isnan(weight) else weight,
                            "keep": None if keep is None else keep[place].item(),
                            "reward": pytest.approx(rollout.rewards[sample].item(), rel=1e-6),
                            "staleness": 0,
                            "updates_since_sync": i // accumulate,
                        }
                    )
    found = rows(tmp_path / "tokens")
    assert found == expected
    assert len(found) == sum(rollout.num_completion_tokens for rollout in recorder.rollouts)
    assert any(row["grad_weight"] is None for row in found)
    assert all((row["grad_weight"] is None) == (row["advantage"] == 0) for row in found)
    assert {row["keep"] for row in found} <= ({True, False} if objective.has_mask else {None})
    assert any(row["log_pi"] != row["log_mu"] for row in found if row["updates_since_sync"])


def test_files_lie_in_the_log_folder_under_number_and_rank(make_run, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    make_run(TokenExport(every_n_rollouts=2), trainer={"logger": logger, "max_epochs": 4}).fit()
    folder = tmp_path / "run" / "version_0" / "tokens"
    assert files(folder) == ["rollout_000000.rank0.parquet", "rollout_000002.rank0.parquet"]
    make_run(TokenExport()).fit()
    assert files(tmp_path / "tokens") == ["rollout_000000.rank0.parquet"]


@pytest.mark.parametrize("objective", [DRPO(0.2), DPPO()], ids=["drpo", "dppo"])
def test_one_line_of_pandas_reads_all_files(make_run, tmp_path, objective):
    pandas = pytest.importorskip("pandas")
    # With and without nulls, with and without a mask: the types are the same.
    make_run(TokenExport(str(tmp_path / "tokens")), trainer={"max_epochs": 3}, module={"objective": objective}).fit()
    frame = pandas.read_parquet(tmp_path / "tokens")
    assert list(frame.columns) == list(COLUMNS)
    assert frame["rollout"].unique().tolist() == [0, 1, 2]
    assert frame["log_mu"].dtype == np.float32
    assert frame["update"].dtype == np.int32


def test_all_files_have_one_schema(make_run, tmp_path):
    for name, objective in (("drpo", DRPO(0.2)), ("dppo", DPPO())):
        make_run(TokenExport(str(tmp_path / name)), module={"objective": objective}).fit()
    schemas = [pq.read_schema(path) for path in sorted(tmp_path.glob("*/*.parquet"))]
    assert len(schemas) == 2
    assert schemas[0].equals(schemas[1])
    types = {field.name: str(field.type).replace("float", "float32").replace("3232", "32") for field in schemas[0]}
    assert types == COLUMNS


def test_every_column_is_documented():
    for name in COLUMNS:
        assert f"    | `{name}` | " in TokenExport.__doc__


def test_a_large_rollout_is_exported_in_part_by_whole_completions(make_run, make_recorder, tmp_path):
    recorder = make_recorder()
    for folder in ("first", "again"):
        run = make_run(
            TokenExport(str(tmp_path / folder), max_rows=20), recorder, trainer={"max_epochs": 3}, data={"seed": 3}
        )
        run.fit()
    found = rows(tmp_path / "first")
    assert found == rows(tmp_path / "again")
    chosen = []
    for number, rollout in enumerate(recorder.rollouts[:3]):
        mine = [row for row in found if row["rollout"] == number]
        samples = {row["sample_id"] for row in mine}
        lengths = {i: len(rollout.completions[i].token_ids) for i in range(len(rollout))}
        assert len(mine) == sum(lengths[sample] for sample in samples)
        # No other completion would have had room behind them.
        assert 20 - max(lengths.values()) < len(mine) <= 20
        chosen.append(samples)
    assert any(samples != set(range(len(samples))) for samples in chosen)
    assert len({row["updates_since_sync"] for row in found}) == 2


def test_staleness_is_that_of_each_completion(make_run, tmp_path):
    class Aging(Callback, RolloutHooks):
        def on_rollout_end(self, trainer, pl_module, rollout):
            rollout.weights_version = 7
            versions = [i % 4 for i in range(len(rollout))]
            rollout.completions = [
                replace(c, weights_version=v) for c, v in zip(rollout.completions, versions, strict=True)
            ]

    make_run(Aging(), TokenExport(str(tmp_path / "tokens"))).fit()
    found = {(row["sample_id"] % 4, row["staleness"]) for row in rows(tmp_path / "tokens")}
    assert found == {(0, 7), (1, 6), (2, 5), (3, 4)}


def test_an_interrupted_rollout_leaves_no_file(make_run, make_recorder, tmp_path):
    def fail(trainer, pl_module, batch_idx):
        if trainer.global_step == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        make_run(TokenExport(str(tmp_path / "t")), make_recorder(fail), trainer={"max_epochs": 3}).fit()
    assert files(tmp_path / "t") == ["rollout_000000.rank0.parquet"]


def test_a_write_that_fails_leaves_the_file_of_before(tmp_path, monkeypatch):
    import pyarrow as pa

    path = tmp_path / "rollout_000000.rank0.parquet"
    write_parquet(pa.table({"x": [1]}), path)
    usual = pq.write_table

    def half(table, where):
        usual(table, where)
        where.write_bytes(where.read_bytes()[:-10])
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(OSError, match="No space left"):
        write_parquet(pa.table({"x": [2]}), path)
    # What is left is hidden from those who read the folder.
    assert pq.read_table(tmp_path).to_pydict() == {"x": [1]}
    assert list(tmp_path.glob("*.parquet")) == [path]


def test_a_resumed_run_writes_the_same_files_from_the_next_rollout_on(make_run, make_recorder, tmp_path):
    def save(trainer, pl_module, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    for folder, recorder, ckpt_path in (
        ("whole", make_recorder(save), None),
        ("resumed", make_recorder(), tmp_path / "run.ckpt"),
    ):
        make_run(TokenExport(str(tmp_path / folder)), recorder, trainer={"max_epochs": 3}).fit(ckpt_path=ckpt_path)
    whole, resumed = rows(tmp_path / "whole"), rows(tmp_path / "resumed")
    names = ["rollout_000001.rank0.from_update4.parquet", "rollout_000002.rank0.parquet"]
    assert files(tmp_path / "resumed") == names
    assert resumed == [row for row in whole if row["update"] > 3]


@pytest.mark.parametrize("name", ["every_n_rollouts", "max_rows"])
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        TokenExport(**{name: 0})


def test_rollouts_without_tokens_have_the_columns_too(make_run, make_recorder, tmp_path):
    class NoTokens(type(make_recorder())):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch.completion_mask = torch.zeros_like(batch.completion_mask)

    make_run(NoTokens(), TokenExport(str(tmp_path / "tokens"))).fit()
    assert not rows(tmp_path / "tokens")
    (path,) = (tmp_path / "tokens").iterdir()
    assert pq.read_schema(path).names == list(COLUMNS)
