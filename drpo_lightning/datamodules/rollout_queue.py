"""The rollouts to come, sampled while the present one is trained on."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.datamodules.curriculum import PassRateCurriculum
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout.engine import EngineError, InFlight, Request, RolloutEngine

QueueState = dict[int, dict[str, Any]]
"""Requests and completions of prompts, by their numbers among those of all rollouts, as plain values and tensors."""


class _Group(NamedTuple):
    """Completions of a prompt, and what was asked for."""

    request: Request
    completions: list[Completion]


class RolloutQueue:
    """Has the engine sample rollouts before their turn, none of them with weights that are too old by then.

    Before a rollout is trained on, and when the engine has got the newest weights, those of the next `max_staleness`
    rollouts are asked for that are not under way: a rollout is asked for at most so many weight syncs before its turn.
    What a checkpoint has brought and is older, or answers another request than the present one, is sampled again.

    All is done in the calling thread: it is the engine that works in the background.

    Args:
        engine: samples ahead.
        max_staleness: most weight syncs from the one before a sample is begun to the one before it is trained on.
        in_flight: what becomes of unfinished requests at a weight sync, see `RolloutEngine.sample_ahead`.
        make_requests: this rank's requests of a rollout, by its number from 0. Their numbers are those of the
            prompts among the prompts of all rollouts.

    Raises:
        ValueError: if `max_staleness` is not positive, or `in_flight` is unknown.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        max_staleness: int,
        in_flight: InFlight,
        make_requests: Callable[[int], Sequence[Request]],
    ) -> None:
        if in_flight not in ("continue", "drop"):
            raise ValueError(f"`data.in_flight` must be `continue` or `drop`, got {in_flight!r}")
        self.max_staleness = max_staleness
        self.in_flight = in_flight
        self._engine = engine
        self._make_requests = make_requests
        self._under_way: dict[int, Request] = {}
        self._groups: dict[int, _Group] = {}

    def prepare(self) -> None:
        """Raises `SettingError` if the engine, which is not started yet, cannot sample ahead."""
        self._engine.sample_ahead(self.in_flight)

    def fill(self, iteration: int, num_rollouts: float) -> None:
        """Asks for a rollout and those after it, as far ahead as samples may be stale.

        Args:
            iteration: number of the rollout whose turn it is, and of the weights that the engine has.
            num_rollouts: how many rollouts will be trained on at most, this one included.
        """
        ahead = int(min(self.max_staleness + 1, num_rollouts))
        rollouts = [self._make_requests(iteration + i) for i in range(ahead)]
        first = rollouts[0][0].number
        self._groups = {number: group for number, group in self._groups.items() if number >= first}
        due = [r for i, requests in enumerate(rollouts) for r in requests if self._is_due(r, iteration + i)]
        if due:
            self._engine.submit(due)
            self._under_way |= {request.number: request for request in due}

    def _is_due(self, request: Request, iteration: int) -> bool:
        """True if a request of a rollout is neither under way nor answered by what may be trained on then."""
        if request.number in self._under_way:
            return False
        group = self._groups.get(request.number)
        return group is None or group.request != request or _staleness(group, iteration) > self.max_staleness

    def collect(self, iteration: int) -> list[list[Completion]]:
        """Waits for the completions of a rollout that was asked for.

        They are kept until the next `fill`, for a checkpoint from before they are scored.

        Raises:
            EngineError: if the engine fails, or returns a sample that is too old.
        """
        numbers = [request.number for request in self._make_requests(iteration)]
        self._keep(self._engine.collect([number for number in numbers if number in self._under_way]))
        groups = [self._groups[number] for number in numbers]
        if (oldest := max(_staleness(group, iteration) for group in groups)) > self.max_staleness:
            raise EngineError(
                f"the engine returned a completion from {oldest} weight syncs ago, more than `data.max_staleness` "
                f"{self.max_staleness}"
            )
        return [group.completions for group in groups]

    def _keep(self, completions: Mapping[int, list[Completion]]) -> None:
        self._groups |= {number: _Group(self._under_way.pop(number), group) for number, group in completions.items()}

    def stop(self) -> None:
        """Notes that the engine is closed: what is under way is lost, and is asked for again by `fill`."""
        self._under_way = {}

    def state_dict(self, first: int, *, is_idle: bool) -> QueueState:
        """What has finished, from a prompt on.

        Args:
            first: its number among the prompts of all rollouts.
            is_idle: whether nobody waits for the engine, so that it may be asked what has finished lately.
        """
        if is_idle and self._engine.is_started:
            with contextlib.suppress(EngineError):  # it is met again, and dealt with, where the engine is needed
                self._keep(self._engine.finished())
        return {
            number: {
                "request": group.request._replace(sampling=asdict(group.request.sampling))._asdict(),  # type: ignore[arg-type]
                "completions": [asdict(completion) for completion in group.completions],
            }
            for number, group in self._groups.items()
            if number >= first
        }

    def load_state_dict(self, state: QueueState) -> None:
        """Takes up `state_dict`."""
        self._groups = {}
        for number, group in state.items():
            request = Request(**{**group["request"], "sampling": Sampling(**group["request"]["sampling"])})
            self._groups[number] = _Group(request, [Completion(**fields) for fields in group["completions"]])


def _staleness(group: _Group, iteration: int) -> int:
    """Weight syncs from the one before a group was begun to the one before a rollout."""
    versions = [completion.weights_version for completion in group.completions]
    return max(0 if version is None else iteration - version for version in versions)


def check_max_staleness(
    max_staleness: int, *, curriculum: PassRateCurriculum | None, dynamic_sampling_rounds: int
) -> None:
    """Raises `ValueError` if rollouts cannot be sampled so far ahead."""
    if max_staleness < 0:
        raise ValueError(f"`data.max_staleness` must be 0 or positive, got {max_staleness}")
    if max_staleness and (curriculum is not None or dynamic_sampling_rounds):
        name = "dynamic_sampling_rounds" if curriculum is None else "curriculum"
        raise SettingError(
            f"`data.max_staleness` must be 0 with `data.{name}`, by which a rollout's prompts depend on the rewards "
            f"of those before, got {max_staleness}; leave one of them out"
        )
