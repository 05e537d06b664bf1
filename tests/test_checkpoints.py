"""Checkpoints are whole or not there, and what is damaged is noticed."""

import os
import warnings

import pytest
import torch

from drpo_lightning import checkpoints
from drpo_lightning.callbacks import PolicyCheckpoint
from drpo_lightning.checkpoints import newest_checkpoint, verify_checkpoint


@pytest.fixture
def saved(make_run, tmp_path):
    """Three checkpoints of a small run: after 2, 4 and 6 updates."""
    folder = tmp_path / "checkpoints"
    checkpoint = PolicyCheckpoint(dirpath=folder, save_top_k=-1)
    make_run(checkpoint, trainer={"max_epochs": 3, "enable_checkpointing": True}).fit()
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.is_symlink())


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    age = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(age, age))


def test_whole_checkpoints_are_found_whole(saved):
    assert names(saved) == ["epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt", "epoch=2-step=6.ckpt"]
    for path in saved.iterdir():
        verify_checkpoint(path)
    assert newest_checkpoint(saved) == saved / "epoch=2-step=6.ckpt"


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_bit_that_has_changed_is_noticed_and_the_one_before_is_taken(saved, place):
    flip_a_bit(saved / "epoch=2-step=6.ckpt", place)
    with pytest.raises(ValueError, match=r"epoch=2-step=6.ckpt' is .*corrupt"):
        verify_checkpoint(saved / "epoch=2-step=6.ckpt")
    with pytest.warns(UserWarning, match=r"step=6.* It is left out, and the one before is looked at"):
        assert newest_checkpoint(saved) == saved / "epoch=1-step=4.ckpt"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_that_is_cut_off_is_noticed(saved, share):
    path = saved / "epoch=2-step=6.ckpt"
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match="is cut off or corrupt"):
        verify_checkpoint(path)


def test_without_a_whole_checkpoint_nothing_is_started_anew(saved):
    for path in saved.glob("*.ckpt"):
        if not path.is_symlink():
            flip_a_bit(path, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"there is no whole checkpoint: .*step=6.*step=4.*step=2"):
            newest_checkpoint(saved)


def test_without_any_checkpoint_there_is_none(tmp_path):
    assert newest_checkpoint(tmp_path, tmp_path / "missing") is None
    with pytest.raises(ValueError, match="missing' does not exist"):
        verify_checkpoint(tmp_path / "missing")


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_a_save_that_is_broken_off_leaves_the_one_before_and_is_cleaned_up_by_the_next(
    saved, make_run, monkeypatch, moment
):
    def broken_save(content, path):
        path.write_bytes(b"half of it")
        raise OSError("the disk is full")

    def broken_rename(new, path):
        raise OSError("the disk is full")

    resumed = {"max_epochs": 4, "enable_checkpointing": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(is not empty|is half written)")
        with monkeypatch.context() as patch:
            if moment == "write":
                patch.setattr(torch, "save", broken_save)
            else:
                patch.setattr(checkpoints, "_replace", broken_rename)
            run = make_run(PolicyCheckpoint(dirpath=saved, save_top_k=-1), trainer=resumed)
            with pytest.raises(OSError, match="the disk is full"):
                run.fit(ckpt_path=newest_checkpoint(saved))
        assert "epoch=3-step=8.ckpt.partial" in names(saved)
        assert newest_checkpoint(saved) == saved / "epoch=2-step=6.ckpt"
        run = make_run(PolicyCheckpoint(dirpath=saved, save_top_k=-1), trainer=resumed)
        run.fit(ckpt_path=newest_checkpoint(saved))
    assert names(saved)[-2:] == ["epoch=2-step=6.ckpt", "epoch=3-step=8.ckpt"]
    verify_checkpoint(saved / "epoch=3-step=8.ckpt")


@pytest.fixture
def shards(tmp_path):
    """A folder with checksums."""
    folder = tmp_path / "run.ckpt"
    folder.mkdir()
    for name in (".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"):
        (folder / name).write_bytes(name.encode() * 1000)
    checkpoints._write_checksums(folder, {path.name: checkpoints._checksum(path) for path in folder.iterdir()})
    verify_checkpoint(folder)
    return folder


def test_a_folder_that_lacks_a_shard_or_has_another_one_is_noticed(shards):
    flip_a_bit(shards / "__1_0.distcp", 0.7)
    with pytest.raises(ValueError, match=r"its __1_0.distcp has another checksum"):
        verify_checkpoint(shards)
    (shards / "__1_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"is incomplete: it lacks __1_0.distcp"):
        verify_checkpoint(shards)
    (shards / "checksums.json").write_text('{".metadata":')
    with pytest.raises(ValueError, match=r"its checksums.json is no JSON"):
        verify_checkpoint(shards)
    (shards / "checksums.json").unlink()
    with pytest.raises(ValueError, match=r"has no checksums.json: it is half written"):
        verify_checkpoint(shards)


def test_a_folder_whose_replacement_was_broken_off_is_kept_under_its_name(shards):
    replaced = shards.with_name("run.ckpt.replaced")
    shards.rename(replaced)
    assert newest_checkpoint(shards.parent) == replaced
    checkpoints.remove_leftovers(shards.parent)
    assert newest_checkpoint(shards.parent) == shards
