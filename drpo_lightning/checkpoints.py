"""Checkpoints that are whole or not there: written under another name, renamed, verified, found again.

One file, or a folder of shards. A file of PyTorch's is a zip archive with a CRC-32 of every record; a folder gets
`checksums.json` with size and CRC-32 of every file in it.
"""

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

from drpo_lightning.disk import DiskFullError, told_if_full, why_no_room, why_no_room_at
from drpo_lightning.ranks import of_all_ranks

CHECKSUMS = "checksums.json"
SUFFIX = ".ckpt"
PARTIAL = ".partial"
"""Ends the name of a checkpoint while it is written; a killed run leaves it, and the next save removes it."""
REPLACED = ".replaced"
"""Ends the name of a folder while another takes its place, which the file system cannot do in one step."""
META_FILES = (".metadata", "meta.pt")
"""Files of a folder of shards that rank 0 writes, besides its shards."""
BLOCK_BYTES = 4 * 2**20

Checksums = Mapping[str, Mapping[str, int]]
"""`bytes` and `crc32` by file name."""


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight into its file.

    Lightning builds it in memory, writes it to the folder for temporary files, where a killed run leaves it, and
    copies it from there.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: list[BaseException] | None = None
    ) -> None:
        """See `TorchCheckpointIO`; of local paths.

        Args:
            checkpoint: what is saved.
            path: where to.
            storage_options: takes a failure instead of raising it here, where the other ranks would wait for ever.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(checkpoint, path)
        except (RuntimeError, OSError) as error:
            if storage_options is None:
                raise
            storage_options.append(error)


def save_checkpoint(trainer: Trainer, path: str | Path, *, weights_only: bool = False) -> None:
    """Saves a checkpoint, so that at any moment its name stands for a whole one: this or the one before. Collective.

    Args:
        trainer: whose state is saved.
        path: local file, or folder for a strategy that saves shards; ends in `.ckpt`.
        weights_only: leaves out what only a resumed run needs.

    Raises:
        DiskFullError: on every rank, if there is no room. What was written is removed, and the one before stays.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(path.name + PARTIAL)
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
    trainer.strategy.barrier()
    failures, mine = _write(trainer, partial, weights_only=weights_only)
    _raise_on_all_ranks(trainer, failures, path, partial)
    checksums = of_all_ranks(mine, trainer.world_size)
    if trainer.is_global_zero:
        if partial.is_dir():
            _write_checksums(partial, {name: entry for part in checksums for name, entry in part.items()})
        _replace(partial, path)
    trainer.strategy.barrier()


def _write(trainer: Trainer, partial: Path, *, weights_only: bool) -> tuple[list[BaseException], Checksums]:
    """Writes this rank's part; what went wrong, and the checksums of its files in a folder of shards."""
    failures: list[BaseException] = []
    is_streamed = isinstance(trainer.strategy.checkpoint_io, StreamedCheckpointIO)
    try:
        trainer.save_checkpoint(partial, weights_only, failures if is_streamed else None)
    except CheckpointException as error:  # on all ranks
        failures.append(error)
    if failures:
        return failures, {}
    try:
        return [], _write_through(partial, trainer.global_rank)
    except OSError as error:
        return [error], {}


def _raise_on_all_ranks(trainer: Trainer, failures: list[BaseException], path: Path, partial: Path) -> None:
    """Raises what went wrong on any rank. Collective."""
    reasons = [why_no_room(error) or why_no_room_at(partial) or "" for error in failures]
    is_failed, reason = bool(failures), reasons[0] if reasons else ""
    everywhere = of_all_ranks((is_failed, reason), trainer.world_size)
    if not any(is_failed for is_failed, _ in everywhere):
        return
    reason = next((reason for _, reason in everywhere if reason), "")
    if reason:
        if trainer.is_global_zero:
            _remove(partial)
        raise DiskFullError(
            f"the checkpoint {str(path)!r} could not be written: {reason}. The one before stays: make room, and go on "
            "with `--ckpt_path last`"
        )
    raise failures[0] if failures else OSError(f"the checkpoint {str(path)!r} could not be written on another rank")


def remove_leftovers(folder: Path) -> None:
    """Removes what a run that was killed while it saved has left in a folder of checkpoints."""
    for path in folder.glob(f"*{SUFFIX}{PARTIAL}"):
        _remove(path)
    for path in folder.glob(f"*{SUFFIX}{REPLACED}"):
        if path.with_suffix("").exists():
            _remove(path)
        else:
            path.rename(path.with_suffix(""))


def _write_through(partial: Path, rank: int) -> Checksums:
    """Sends what a rank has written of a checkpoint to the disk; the checksums of its files in a folder of shards."""
    if not partial.is_dir():
        if rank == 0:
            _sync(partial)
        return {}
    mine = [*partial.glob(f"__{rank}_*"), *(partial / name for name in META_FILES if rank == 0)]
    for path in mine:
        _sync(path)
    return {path.name: _checksum(path) for path in mine}


def _write_checksums(folder: Path, checksums: Checksums) -> None:
    with told_if_full(folder / CHECKSUMS):
        (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
    _sync(folder / CHECKSUMS)
    _sync(folder)


def _replace(new: Path, path: Path) -> None:
    """Renames `new` to `path`, which may exist, and sends the folder's entries to the disk."""
    if new.is_dir() or (path.is_dir() and not path.is_symlink()):
        replaced = path.with_name(path.name + REPLACED)
        if os.path.lexists(path):
            path.rename(replaced)
        new.rename(path)
        _remove(replaced)
    else:
        new.replace(path)
    _sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> dict[str, int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}


def verify_checkpoint(path: str | Path) -> None:
    """Reads a checkpoint and compares it with its checksums.

    Args:
        path: a file, or a folder of shards.

    Raises:
        ValueError: if it is not there, is cut off, lacks a file or has changed since it was written.
    """
    path = Path(path)
    if path.is_dir():
        _verify_folder(path)
    elif path.is_file():
        _verify_file(path)
    else:
        raise ValueError(f"the checkpoint {str(path)!r} does not exist")


def _verify_file(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"the checkpoint {str(path)!r} is cut off or corrupt: {error}") from error
    if broken is not None:
        raise ValueError(f"the checkpoint {str(path)!r} is corrupt: its record {broken!r} has another checksum")


def _verify_folder(path: Path) -> None:
    try:
        checksums: Checksums = json.loads((path / CHECKSUMS).read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"the checkpoint {str(path)!r} has no {CHECKSUMS}: it is half written, or not `PolicyCheckpoint`'s"
        ) from error
    except ValueError as error:
        raise ValueError(f"the checkpoint {str(path)!r} is corrupt: its {CHECKSUMS} is no JSON") from error
    missing = [name for name in checksums if not (path / name).is_file()]
    if missing:
        raise ValueError(f"the checkpoint {str(path)!r} is incomplete: it lacks {missing[0]}")
    with ThreadPoolExecutor() as threads:
        found = threads.map(_checksum, [path / name for name in checksums])
    for name, checksum in zip(checksums, found, strict=True):
        if checksum != checksums[name]:
            raise ValueError(f"the checkpoint {str(path)!r} is corrupt: its {name} has another checksum")


def newest_checkpoint(*folders: str | Path) -> Path | None:
    """The newest whole checkpoint in some folders; a warning names every newer one that is not.

    Args:
        folders: where `PolicyCheckpoint` writes; they need not exist.

    Returns:
        Its path, or None if there are no checkpoints at all.

    Raises:
        ValueError: if there are some, and none is whole.
    """
    _warn_of_leftovers(Path(folder) for folder in folders)
    errors = []
    for path in _newest_first(Path(folder) for folder in folders):
        try:
            verify_checkpoint(path)
        except ValueError as error:
            errors.append(str(error))
            rank_zero_warn(f"{error}. It is left out, and the one before is looked at")
        else:
            return path
    if errors:
        raise ValueError(f"there is no whole checkpoint: {'; '.join(errors)}")
    return None


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    found = {path for folder in folders for end in ("", REPLACED) for path in folder.glob(f"*{SUFFIX}{end}")}
    checkpoints = [path for path in found if not path.is_symlink()]  # `last.ckpt` is a link to one of them
    return sorted(checkpoints, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def _warn_of_leftovers(folders: Iterable[Path]) -> None:
    for folder in folders:
        for path in sorted(folder.glob(f"*{SUFFIX}{PARTIAL}")):
            rank_zero_warn(f"{str(path)!r} is half written: a run was killed while it saved. It is left out")
