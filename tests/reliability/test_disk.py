"""A run whose disk is full, again and again, ends with room as one that always had it; the message names the file."""

import re

import pytest
import torch

from drpo_lightning.checkpoints import verify_checkpoint
from tests.disks import make_disk  # noqa: F401
from tests.reliability.test_kill import (  # noqa: F401
    assert_ended_alike,
    assert_equal_points,
    lives,
    points_of_table,
    points_of_tensorboard,
    whole,
)

pytestmark = pytest.mark.reliability
FULL = re.compile(r"drpo: error: .*?'(\S+)'.* could not be written: the disk is full", re.DOTALL)
ARGUMENTS = ("--trainer.max_epochs=4",)


def full_lives(lives, folder, disk, sizes_kib, *arguments):  # noqa: F811
    """Starts a run again and again on a disk that grows, until it ends; what was named as without room."""
    named = []
    for size in sizes_kib:
        disk.resize(size)
        statuses, printed = lives.live(folder, "--ckpt_path=last", *ARGUMENTS, *arguments)
        if statuses == [0]:
            return named
        assert statuses == [1], printed[-3000:]
        found = FULL.search(printed)
        assert found, printed[-3000:]
        named.append(found[1].removeprefix(str(folder)))
        for path in folder.rglob("*.ckpt"):
            verify_checkpoint(path)
        assert not [path for end in ("partial", "unfinished") for path in folder.rglob(f"*.{end}")]
    raise AssertionError(f"it never ended: {named}")


def test_a_run_on_a_disk_that_is_full_again_and_again_ends_as_one_with_room(
    lives,  # noqa: F811
    whole,  # noqa: F811
    make_disk,  # noqa: F811
    tmp_path,
    record_property,
):
    disk = make_disk(64)
    sizes = (64, 3000, 6000, 8000, 9000, 9500, 9900, 40_000)
    named = full_lives(lives, tmp_path, disk, sizes, f"--vars.folder={disk.folder}")
    record_property("full", str(named))
    assert len(named) > 3
    assert_ended_alike(disk.folder, whole(*ARGUMENTS))


TOKENS = "--trainer.callbacks+=drpo_lightning.callbacks.TokenExport"
POLICY = "--trainer.callbacks+=drpo_lightning.callbacks.ExportPolicy"


def newest(paths):
    """Before its first checkpoint a run has nothing to go on from, and begins another folder."""
    return max(paths, key=lambda path: path.stat().st_mtime_ns)


OUTPUTS = {
    "run": (range(64, 2000, 64), ()),
    "table": (range(8, 1000, 32), ()),
    "tokens": (range(8, 400, 8), (TOKENS, "--trainer.callbacks.folder={}/tokens")),
    "policy": ((600, 1500, 4000), (POLICY, "--trainer.callbacks.folder={}/policy")),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_room_for_one_output_is_named_and_loses_nothing(lives, whole, make_disk, tmp_path, name, record_property):  # noqa: F811
    disk = make_disk(64, name)
    sizes, arguments = OUTPUTS[name]
    checkpoints = f"--trainer.callbacks.dirpath={tmp_path / 'checkpoints'}"
    arguments = (checkpoints, *(argument.format(tmp_path) for argument in arguments))
    named = full_lives(lives, tmp_path, disk, sizes, *arguments)
    record_property("full", str(named))
    assert named
    assert all(file.startswith(f"/{name}") for file in named)
    reference = whole(*ARGUMENTS)
    ours, theirs = (torch.load(path / "weights.pt", weights_only=True) for path in (tmp_path, reference))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    events = [newest(path.glob("run/*/events*")).parent for path in (tmp_path, reference)]
    assert_equal_points(*map(points_of_tensorboard, events))
    assert_equal_points(*(points_of_table(newest(path.glob("table/*/metrics.csv"))) for path in (tmp_path, reference)))


def test_both_of_two_ranks_end_when_the_disk_is_full(lives, make_disk, tmp_path):  # noqa: F811
    disk = make_disk(6000, "checkpoints")
    arguments = (
        "--trainer.strategy=ddp",
        f"--trainer.callbacks.dirpath={disk.folder}",
        "--trainer.callbacks.save_top_k=-1",
    )
    statuses, printed = lives.live(tmp_path, *ARGUMENTS, *arguments, num_ranks=2)
    assert statuses == [1, 1], printed[-3000:]
    assert printed.count("could not be written: the disk is full") == 2, "each rank says so"
    (path,) = (path for path in disk.folder.iterdir() if not path.is_symlink())
    verify_checkpoint(path)
