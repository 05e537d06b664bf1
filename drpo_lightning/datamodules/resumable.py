"""Where a run on rollouts is, and what a checkpoint holds of it."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule

from drpo_lightning.batch import Rollout
from drpo_lightning.datamodules.curriculum import PassRateCurriculum
from drpo_lightning.datamodules.progress import align_progress
from drpo_lightning.datamodules.prompt_schedule import PromptSchedule
from drpo_lightning.datamodules.prompt_stream import PromptStream
from drpo_lightning.datamodules.random_state import RandomState, random_state, set_random_state
from drpo_lightning.datamodules.rollout_queue import QueueState, RolloutQueue
from drpo_lightning.datamodules.rollout_state import check_same_split, dealt_out, rollout_from_state, rollout_to_state
from drpo_lightning.ranks import T, of_all_ranks


class ResumableRollouts(LightningDataModule):
    """Counts rollouts and the micro-batches of the one in use; a checkpoint of any number of ranks goes on on another.

    Args:
        num_prompts: prompts per rollout, over all ranks.
        group_size: completions per prompt.
        num_updates: optimizer updates per rollout.
        seed: of the split of a rollout.
    """

    def __init__(self, *, num_prompts: int, group_size: int, num_updates: int, seed: int) -> None:
        super().__init__()
        self.num_prompts = num_prompts
        self.group_size = group_size
        self.num_updates = num_updates
        self.seed = seed
        self.iteration = 0
        """Rollouts made so far."""
        self.rollout: Rollout | None = None
        """The rollout in use, of this rank."""
        self.schedule: PromptSchedule | None = None
        """Which prompts every rollout takes; None before a fit is set up."""
        self.is_sampling = False
        """True while completions are sampled and scored: a checkpoint of that time is one of before."""
        self._queue: RolloutQueue | None = None
        """The rollouts to come, where they are sampled ahead."""
        self._num_made = 0
        self._position = 0
        self._resumed = False
        self._random_before: RandomState | None = None
        self._random_resumed: RandomState | None = None

    @property
    def _trainer(self) -> Any:  # noqa: ANN401
        assert self.trainer is not None, "the data module needs a trainer"
        return self.trainer

    @property
    def _num_micro_batches(self) -> int:
        """Micro-batches of a rollout on each rank."""
        return self.num_updates * int(self._trainer.accumulate_grad_batches)

    @property
    def _num_trained_batches(self) -> int:
        """Those of them that are trained on: all, unless `trainer.limit_train_batches` says otherwise."""
        limit = self._trainer.limit_train_batches
        return min(self._num_micro_batches, limit if isinstance(limit, int) else int(limit * self._num_micro_batches))

    @property
    def _num_rollouts_left(self) -> float:
        """Rollouts that are still to be made at most, at the start of one, this one included."""
        limits = [math.inf]
        if self._trainer.max_epochs not in (None, -1):
            limits.append(self._trainer.max_epochs - self._trainer.current_epoch)
        if self._trainer.max_steps != -1:
            updates = -(-self._num_trained_batches // int(self._trainer.accumulate_grad_batches))
            limits.append(math.ceil((self._trainer.max_steps - self._trainer.global_step) / updates))
        return max(min(limits), 1)

    @property
    def _places(self) -> range:
        """Which of a rollout's prompts are this rank's."""
        per_rank = self.num_prompts // self._trainer.world_size
        first = self._trainer.global_rank * per_rank
        return range(first, first + per_rank)

    def _positions(self, iteration: int) -> range:
        """This rank's prompts of a rollout among those of all rollouts."""
        first = iteration * self.num_prompts
        return range(first + self._places.start, first + self._places.stop)

    def _begin_schedule(
        self, rows: list[dict[str, Any]], *, weights: Mapping[str, float], curriculum: PassRateCurriculum | None
    ) -> None:
        """Decides on the prompts of every rollout, going on with those of an earlier fit.

        Args:
            rows: the data set.
            weights: see `PromptSource.weights`.
            curriculum: which prompts are left out, unless `trainer.overfit_batches` has its own.
        """
        is_overfitting = bool(self._trainer.overfit_batches)
        period = self.num_prompts if is_overfitting else None
        schedule = PromptSchedule(
            PromptStream(rows, seed=self.seed, period=period, weights=weights),
            num_prompts=self.num_prompts,
            curriculum=None if is_overfitting else curriculum,
        )
        if self.schedule is not None:
            schedule.load_state_dict(self.schedule.state_dict(self._num_made), self._num_made)
        self.schedule = schedule

    @property
    def _schedule(self) -> PromptSchedule:
        assert self.schedule is not None, "setup comes first"
        return self.schedule

    def upcoming_prompt_ids(self, num_prompts: int) -> list[list[int]]:
        """Token ids of the first prompts of this rank's next rollout."""
        numbers = self._schedule.row_numbers(self.iteration, self._places[:num_prompts])
        return [self._schedule.rows[number]["prompt_ids"] for number in numbers]

    def state_dict(self) -> dict[str, Any]:
        """Iteration, each rank's rollout in use with the updates done on it, prompts, random states. Collective.

        A checkpoint in the middle of an update is one of before it: the update is begun again. One in the middle of a
        rollout is one of before it. Of rollouts that are sampled ahead it holds the prompts with all their samples.
        """
        window = int(self._trainer.accumulate_grad_batches)
        # Not `_position`: a micro-batch that was handed out may have been interrupted before it was trained on.
        optimizer = self._trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer
        updates = int(optimizer.step.current.completed)
        rollouts: list[Any] = []
        made = self.rollout if self.iteration == self._num_made else None
        if made is not None and updates * window < self._num_trained_batches:
            rollouts = self._of_all_ranks(rollout_to_state(made))
        return {
            "iteration": self._num_made,
            "updates": updates,
            "accumulate_grad_batches": window,
            "split": self._split,
            "rollouts": rollouts,
            "schedule": self.schedule.state_dict(self._num_made) if self.schedule else {},
            "random": self._of_all_ranks(self._random_state(is_update_begun=self._position > updates * window)),
            **({"queue": self._queued(self._queue)} if self._queue else {}),
        }

    def _queued(self, queue: RolloutQueue) -> QueueState:
        """What has been sampled of the rollouts to come, on all ranks. Collective."""
        state = queue.state_dict(self._num_made * self.num_prompts, is_idle=not self.is_sampling)
        return {place: group for part in self._of_all_ranks(state) for place, group in part.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up this rank's part of `state_dict`, to go on training.

        Raises:
            SettingError: if the rollout in use cannot be split as it was.
        """
        if self._trainer.state.fn not in (None, "fit"):
            return
        self.iteration = self._num_made = state_dict["iteration"]
        self.is_sampling = False
        if self.schedule is not None:
            self.schedule.load_state_dict(state_dict["schedule"], self._num_made)
        if self._queue is not None:
            queued = state_dict.get("queue", {}).items()
            self._queue.load_state_dict(
                {place: group for place, group in queued if place in self._positions(place // self.num_prompts)}
            )
        states = state_dict["random"]
        self._random_resumed = states[self._trainer.global_rank] if len(states) == self._trainer.world_size else None
        self._resumed = bool(state_dict["rollouts"])
        if not self._resumed:
            self.rollout = None
            return
        check_same_split(state_dict["split"], self._split)
        ranks = {"rank": self._trainer.global_rank, "num_ranks": self._trainer.world_size}
        self.rollout = rollout_from_state(dealt_out(state_dict["rollouts"], **ranks))
        self._position = state_dict["updates"] * int(self._trainer.accumulate_grad_batches)

    def align_progress(self, checkpoint: dict[str, Any]) -> None:
        """Makes the progress of Lightning in a checkpoint that of this data module, before it is restored.

        Args:
            checkpoint: the whole of it, as in `LightningModule.on_load_checkpoint`; is changed.
        """
        saved = checkpoint.get(type(self).__qualname__)
        if saved is None or self._trainer.state.fn != "fit":
            return
        align_progress(
            checkpoint["loops"]["fit_loop"],
            updates=saved["updates"],
            is_rollout_done=saved["updates"] > 0 and not saved["rollouts"],
            micro_batches=(saved["accumulate_grad_batches"], int(self._trainer.accumulate_grad_batches)),
            num_batches=self._num_trained_batches,
            has_max_steps=self._trainer.max_steps != -1,
        )

    def _note_random_state(self) -> None:
        """Keeps the random state of before a rollout, a validation or an update, for a checkpoint inside of it."""
        self._random_before = random_state(self._trainer.strategy.root_device)

    def _resume_random_state(self) -> None:
        """Takes up the random state of a checkpoint, of as many ranks, where the run goes on."""
        if self._random_resumed is not None:
            set_random_state(self._random_resumed, self._trainer.strategy.root_device)
            self._random_resumed = None

    def _random_state(self, *, is_update_begun: bool) -> RandomState:
        if self._random_resumed is not None:
            return self._random_resumed
        is_inside = self.is_sampling or is_update_begun or self.iteration != self._num_made
        if self._random_before is not None and is_inside:
            return self._random_before
        return random_state(self._trainer.strategy.root_device)

    @property
    def _split(self) -> dict[str, int]:
        """What the split of a rollout into updates depends on."""
        return {name: getattr(self, name) for name in ("num_prompts", "group_size", "num_updates", "seed")}

    def _of_all_ranks(self, value: T) -> list[T]:
        return of_all_ranks(value, self._trainer.world_size)
