"""Without room a file is named, what was there stays, and nothing half written is left."""

import errno
import resource

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drpo_lightning.callbacks import PolicyCheckpoint
from drpo_lightning.checkpoints import newest_checkpoint, verify_checkpoint
from drpo_lightning.disk import DiskFullError, told_if_full, whole_file, whole_files
from drpo_lightning.export import export_checkpoint, write_model
from drpo_lightning.log_position import log_positions, reopen_logs
from drpo_lightning.rollout.adapters import write_adapter
from tests.disks import make_disk  # noqa: F401

LARGE = {"a": torch.zeros(100_000)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_table(path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({"x": torch.rand(100_000).numpy()}), path)


WRITERS = {
    "text": lambda path: path.write_text("x" * 10**6),
    "safetensors": lambda path: save_file(LARGE, path),
    "parquet": write_table,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_without_room_is_named_and_the_one_before_stays(make_disk, name):  # noqa: F811
    path = make_disk(64).folder / "file"
    path.write_text("before")
    with (
        pytest.raises(DiskFullError, match=r"'.*file' could not be written: the disk is full"),
        whole_file(path) as new,
    ):
        WRITERS[name](new)
    assert path.read_text() == "before"
    assert names(path.parent) == ["file"]
    with whole_file(path) as new:
        new.write_text("after")
    assert path.read_text() == "after"


def test_a_limit_of_file_sizes_is_told_from_a_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskFullError, match="files may not become so large here"), told_if_full(tmp_path / "x"):
            (tmp_path / "x").write_text("x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError, match="no"), told_if_full(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(ValueError, match="Errno 28"), told_if_full(tmp_path):
        raise ValueError("a completion that says [Errno 28]")


def test_an_error_that_is_raised_again_while_it_is_handled_is_understood(tmp_path):
    full = OSError(errno.ENOSPC, "full")

    other = ValueError("not supported")
    full.__context__, other.__cause__ = other, full
    with pytest.raises(DiskFullError, match="the disk is full"), told_if_full(tmp_path):
        raise full
    other.__cause__, other.__context__ = LookupError("itself"), other
    other.__cause__.__cause__ = other
    with pytest.raises(ValueError, match="not supported"), told_if_full(tmp_path):
        raise other


def test_a_folder_gets_all_files_or_none(tmp_path):
    with pytest.raises(IsADirectoryError), whole_files(tmp_path / "out") as new:
        (new / "a").write_text(new.read_text())
    assert not names(tmp_path / "out")
    with whole_files(tmp_path / "out") as new:
        (new / "a").write_text("new")
        (new / "below").mkdir()
        (new / "below" / "b").write_text("new")
    assert names(tmp_path / "out") == ["a", "below"]
    assert (tmp_path / "out" / "below" / "b").read_text() == "new"


def test_an_export_without_room_leaves_the_one_before(make_disk, model_folder):  # noqa: F811
    weights = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").state_dict()
    disk = make_disk(2000)
    out = disk.folder / "policy"
    write_model(model_folder, weights, out)
    before = names(out)
    (out / "model-00001-of-00002.safetensors").write_text("of a larger model")
    changed = {name: tensor + 1 for name, tensor in weights.items()}
    with pytest.raises(DiskFullError, match="policy' could not be written: the disk is full"):
        write_model(model_folder, changed, out)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(out / "model.safetensors").items())
    disk.resize(8000)
    write_model(model_folder, changed, out)
    assert all(torch.equal(tensor, changed[name]) for name, tensor in load_file(out / "model.safetensors").items())
    assert names(out) == before


def test_adapters_without_room_leave_those_before(make_disk):  # noqa: F811
    folder = make_disk(64).folder / "adapter"
    write_adapter(folder, {}, [("base_model.model.q.lora_A.weight", torch.ones(1))])
    with pytest.raises(DiskFullError, match="adapter' could not be written: the disk is full"):
        write_adapter(folder, {}, [("base_model.model.q.lora_A.weight", LARGE["a"])])
    assert load_file(folder / "adapter_model.safetensors")["base_model.model.q.lora_A.weight"].tolist() == [1]
    assert names(folder) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_export_says_where_it_cannot_write_before_it_reads(make_disk, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the folder to write '.*file' is, or lies in, a file"):
        export_checkpoint(tmp_path / "none.ckpt", tmp_path / "file")
    disk = make_disk(64)
    disk.make_read_only()
    with pytest.raises(ValueError, match=r"the folder to write '.*out' cannot be written to: Read-only file system"):
        export_checkpoint(tmp_path / "none.ckpt", disk.folder / "out")


def test_a_checkpoint_without_room_is_named_and_the_one_before_stays(make_run, make_disk):  # noqa: F811
    disk = make_disk(8000)
    checkpoint = PolicyCheckpoint(dirpath=disk.folder, save_top_k=-1)
    run = make_run(checkpoint, trainer={"max_epochs": 3, "enable_checkpointing": True})
    with pytest.raises(
        DiskFullError,
        match=r"the checkpoint '.*epoch=1-step=4.ckpt' could not be written: the disk is full. The one before",
    ):
        run.fit()
    assert newest_checkpoint(disk.folder) == disk.folder / "epoch=0-step=2.ckpt"
    verify_checkpoint(disk.folder / "epoch=0-step=2.ckpt")
    assert names(disk.folder) == ["epoch=0-step=2.ckpt", "last.ckpt"]


def test_a_table_that_cannot_be_written_anew_is_still_whole(make_disk, tmp_path):  # noqa: F811
    disk = make_disk(64)

    def logger_of(version):
        return CSVLogger(disk.folder, name="", version=version)

    logger = logger_of("v")
    for step in range(20):
        logger.log_metrics({"first": step}, step=step)
    positions = log_positions([logger])
    rows = (disk.folder / "v" / "metrics.csv").read_text()
    (disk.folder / "filler").write_bytes(bytes(52 * 1024))
    for step in range(20, 2000):
        logger.log_metrics({"second": step / 3}, step=step) if step % 100 != 99 else None
    with pytest.raises(DiskFullError, match=r"'.*metrics.csv' could not be written: the disk is full"):
        log_positions([logger])
    (disk.folder / "filler").unlink()
    reopen_logs([logger_of("v")], positions)()
    assert (disk.folder / "v" / "metrics.csv").read_text() == rows
    assert names(disk.folder / "v") == ["metrics.csv"]
