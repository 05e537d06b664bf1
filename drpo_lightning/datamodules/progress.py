"""Lightning's progress in a checkpoint, put to where a resumed run goes on.

Lightning counts micro-batches, and goes on from the last one, whichever update it was in. Here an update that was
begun is begun again, an update may have other micro-batches than before, and every moment between two rollouts is put
as the same one, after which Lightning begins an epoch.
"""

from typing import Any

Progress = dict[str, Any]
"""The entry `fit_loop` of a checkpoint's `loops`."""
BATCHES = "epoch_loop.batch_progress"
OPTIMIZER = "epoch_loop.automatic_optimization.optim_progress"
COUNTS = ("ready", "started", "processed", "completed")


def align_progress(
    progress: Progress,
    *,
    updates: int,
    is_rollout_done: bool,
    micro_batches: tuple[int, int],
    num_batches: int,
    has_max_steps: bool,
) -> None:
    """Changes a checkpoint's progress to that of a run that is at the end of an update.

    Args:
        progress: is changed.
        updates: optimizer updates done on the rollout that was in use.
        is_rollout_done: whether those were all.
        micro_batches: of an update, in the run that saved the checkpoint and in this one.
        num_batches: micro-batches of a rollout that this run trains on.
        has_max_steps: whether `trainer.max_steps` is set: Lightning then takes every epoch for one that was broken off.
    """
    saved, present = micro_batches
    batches = progress[BATCHES]
    over = batches["total"]["processed"] - (0 if is_rollout_done else batches["current"]["processed"])
    total = over * present // saved  # as if the whole run had had this run's micro-batches
    epoch = progress["epoch_progress"]["current"]
    if is_rollout_done and _is_epoch_open(progress):
        _set_batches(progress, num_batches, total, is_last=True)
    elif is_rollout_done or not updates:
        _set_epochs(progress, epoch["started"] if is_rollout_done else epoch["processed"], is_open=False)
        _begin_optimizer_counts(progress)
        _go_on_after(progress, 0, total, is_restart=has_max_steps)
    else:
        _set_epochs(progress, epoch["started"], is_open=True)
        _go_on_after(progress, updates * present, total + updates * present, is_restart=True)


def _is_epoch_open(progress: Progress) -> bool:
    """True if Lightning is at, or after, the validation that follows a rollout's last micro-batch."""
    epoch, batches = progress["epoch_progress"]["current"], progress[BATCHES]["current"]
    is_open: bool = epoch["ready"] == epoch["started"] > epoch["processed"]
    return is_open and bool(batches["completed"] == batches["processed"])


def _set_epochs(progress: Progress, started: int, *, is_open: bool) -> None:
    counts = {"ready": started, "started": started, "processed": started - is_open, "completed": started - is_open}
    progress["epoch_progress"] = {"current": dict(counts), "total": dict(counts)}


def _begin_optimizer_counts(progress: Progress) -> None:
    for counts in progress[OPTIMIZER]["optimizer"].values():
        counts["current"] = dict.fromkeys(counts["current"], 0)


def _set_batches(progress: Progress, current: int, total: int, *, is_last: bool) -> None:
    progress[BATCHES] = {
        "total": dict.fromkeys(COUNTS, total),
        "current": dict.fromkeys(COUNTS, current),
        "is_last_batch": is_last,
    }


def _go_on_after(progress: Progress, current: int, total: int, *, is_restart: bool) -> None:
    """Sets the micro-batches that are done; on a restart Lightning itself counts the last one, and its step, as done.

    It does so since most checkpoints are written in `on_train_batch_end`.
    """
    _set_batches(progress, current, total, is_last=False)
    if is_restart:
        for part in ("total", "current"):
            progress[BATCHES][part]["completed"] -= 1
    steps = progress[OPTIMIZER]["optimizer"]["step"]["total"]["completed"]
    progress["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - is_restart
