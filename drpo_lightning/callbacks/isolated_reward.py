"""Another reward, run in worker processes."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from drpo_lightning.callbacks.fallible_reward import FallibleReward, OnFailure
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import Reward, RewardBatch, RewardError
from drpo_lightning.rewards.base import RewardOutcome
from drpo_lightning.rewards.isolation import IsolatedScorer
from drpo_lightning.rewards.isolation_worker import WorkerLimits


class IsolatedReward(FallibleReward):
    """Scores by another reward in worker processes: what goes wrong there costs one completion, not the run.

    An exception, `sys.exit`, a crash, an infinite loop, too much memory, a flood of output or a result that is no score
    becomes a failure of the completion that was scored, which is counted, stored and treated by `on_failure`. A worker
    that is lost is killed with its process group, for what it has started, and replaced. The workers are fresh
    processes, apart from the trainer's threads and GPU, stay from rollout to rollout, and end with the trainer,
    however it ends. Not a sandbox: see docs/rewards.md for what is not promised. Needs Linux.

    ```yaml
    - class_path: drpo_lightning.callbacks.IsolatedReward
      init_args:
        reward: {class_path: my_rewards.RunsTests, init_args: {column: tests}}
        timeout_seconds: 10
        memory_limit_gib: 2
        on_failure: drop_sample
    ```

    The reward gets completions one at a time, on any of the workers, and its hooks as a callback are not called. Its
    name and weight are those of the isolated reward. Its `answers`, for majority votes, run in the trainer, on a copy
    that scores nothing. A reward with a `state_dict` needs `num_workers: 1` and a single rank: its state outlives its
    worker and is in the checkpoints, as that of other rewards; a completion that it fails on leaves no trace in it.

    Args:
        reward: what scores; it must be picklable.
        num_workers: completions that each rank scores at the same time.
        timeout_seconds: for one completion.
        memory_limit_gib: address space of a worker, and of each process that it starts, on top of what the loaded
            reward takes; no limit by default.
        max_processes: processes and threads of this user on the whole machine from which on a worker can start no more,
            as `ulimit -u`; of no effect for root. No limit by default.
        start_timeout_seconds: for starting the processes and loading the reward.
        on_failure: see `FallibleReward`.
        failure_score: see `FallibleReward`.
        max_stored_failures: see `FallibleReward`.

    Raises:
        ValueError: if a setting is out of range.
        SettingError: if the reward cannot be pickled, or has a state that cannot be kept.
    """

    def __init__(
        self,
        reward: Reward,
        num_workers: int = 2,
        timeout_seconds: float = 10.0,
        memory_limit_gib: float | None = None,
        max_processes: int | None = None,
        start_timeout_seconds: float = 120.0,
        on_failure: OnFailure = "raise",
        failure_score: float | None = None,
        max_stored_failures: int = 100,
    ) -> None:
        super().__init__(reward.weight, reward.name, on_failure, failure_score, max_stored_failures)
        for name, value in (
            ("num_workers", num_workers),
            ("timeout_seconds", timeout_seconds),
            ("memory_limit_gib", memory_limit_gib),
            ("max_processes", max_processes),
            ("start_timeout_seconds", start_timeout_seconds),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be positive and finite, got {value}")
        if reward.failure_policy is not None:
            raise ValueError(f"`reward` {type(reward).__name__} treats failures itself; list it without IsolatedReward")
        self.required_columns = reward.required_columns
        limits = WorkerLimits(
            timeout_seconds=timeout_seconds,
            start_timeout_seconds=start_timeout_seconds,
            memory_bytes=None if memory_limit_gib is None else int(memory_limit_gib * 2**30),
            max_processes=max_processes,
        )
        self._reward = reward
        self._scorer = IsolatedScorer(reward, num_workers=num_workers, limits=limits)

    def outcomes(self, batch: RewardBatch) -> Sequence[RewardOutcome]:
        """Scores in the workers, which are started if they do not run."""
        return self._scorer.score(batch)

    def check_row(self, row: Mapping[str, Any]) -> None:
        """See the reward."""
        self._reward.check_row(row)

    def answers(self, batch: RewardBatch) -> Sequence[str | None] | None:
        """The reward's.

        Raises:
            RewardError: if it raises.
        """
        try:
            return self._reward.answers(batch)
        except (Exception, SystemExit) as error:
            raise RewardError(f"reward {self.name!r} raised {error!r} in `answers`") from error

    def close(self) -> None:
        """Ends the workers."""
        self._scorer.close()

    def state_dict(self) -> dict[str, Any]:
        """The reward's, in the worker."""
        return {} if self._scorer.state is None else dict(self._scorer.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Gives the reward its state, with the next completion.

        Raises:
            ValueError: if the reward has none.
        """
        if self._scorer.state is None:
            raise ValueError(f"the checkpoint has a state for the reward {self.name!r}, which has none")
        self._scorer.state = dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the workers, which load the reward while the trainer and the engine start. Collective.

        Raises:
            SettingError: if there are several ranks and the reward has a state, of which each would have its own.
        """
        if trainer.world_size > 1 and self._scorer.state is not None:
            raise SettingError(
                f"the reward {self.name!r} has a state (`state_dict`), and each of {trainer.world_size} ranks would "
                "have its own, of which checkpoints keep that of the first; train on one, or give it no `state_dict`"
            )
        super().setup(trainer, pl_module, stage)
        self._scorer.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Ends the workers."""
        self._scorer.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Ends the workers, also on Ctrl-C."""
        self._scorer.close()
