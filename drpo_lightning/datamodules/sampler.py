"""The engine's side of a rollout: started when it is first needed, given the trainer's weights, asked for samples."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.utilities.exceptions import SIGTERMException

from drpo_lightning.batch import Completion, Rollout, Sampling
from drpo_lightning.datamodules.prompt_encoder import PromptEncoder
from drpo_lightning.datamodules.scored_rollout import column_names, scored_rollout
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards.base import Reward
from drpo_lightning.rollout.checks import check_completions
from drpo_lightning.rollout.engine import EngineError, RolloutEngine, WaitEnded
from drpo_lightning.rollout.hooks import rollout_hooks
from drpo_lightning.rollout.supervised import supervised
from drpo_lightning.rollout.weights import RepeatableWeights, WeightSource, check_weights, model_weight_shapes


class RolloutSampler:
    """Brings the trainer's weights into an engine, and samples and scores completions with it.

    Args:
        engine: what samples; restarted if it fails and can be.
        model: folder or hub name of the policy.
        seed: seeds requests that have no seed of their own.
        trust_remote_code: whether code that comes with the model may run.
    """

    def __init__(self, engine: RolloutEngine, model: str, *, seed: int, trust_remote_code: bool) -> None:
        self.engine = supervised(engine)
        self.model = model
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self.phase_seconds: dict[str, float] = {}
        """Seconds of the last rollout, see `RolloutDataModule.phase_seconds`."""
        self._expected_weights: dict[str, torch.Size] = {}
        self._profiler: Profiler = PassThroughProfiler()
        self._on_any_rank: Callable[[bool], bool] = bool
        self._end_run: Callable[[], object] = bool

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds to the time of a phase, for `phase_seconds` and for Lightning's profiler; may end the run.

        Args:
            name: of the phase.
        """
        started = time.perf_counter()
        try:
            with self._profiler.profile(f"[RolloutDataModule]{name}"):
                yield
        except WaitEnded:
            self._end_run()
            raise
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + time.perf_counter() - started

    def make_ready(self, trainer: Any) -> None:  # noqa: ANN401
        """Starts the engine, or wakes it."""
        self._end_run = partial(_end_run, trainer)
        self.engine.is_run_to_end = partial(_is_run_to_end, trainer)
        self._profiler = trainer.profiler
        self._on_any_rank = partial(trainer.strategy.reduce_boolean_decision, all=False)
        if trainer.strategy.root_device.type == "cuda" and (self.engine.sleeps or not self.engine.is_started):
            torch.cuda.empty_cache()  # what the last update's activations took is the engine's now
        if self.engine.is_started:
            with self._phase_of_sleep("wake"):
                self.engine.wake()
            return
        adapter = _weight_source(trainer.lightning_module).adapter_config
        if adapter is not None and not self.engine.supports_adapters:
            raise SettingError(
                f"`model.peft.sync: adapter` is not supported by {type(self.engine).__name__}; set it to `merged`"
            )
        self._expected_weights = model_weight_shapes(self.model, trust_remote_code=self.trust_remote_code)
        with self.phase("start"):
            self.engine.start(
                self.model,
                device=trainer.strategy.root_device,
                num_ranks=trainer.world_size,
                seed=self.seed + trainer.global_rank,
                trust_remote_code=self.trust_remote_code,
                adapter_rank=None if adapter is None else adapter["r"],
            )

    def rest(self) -> None:
        """Gives the engine's memory to the trainer, as far as it can and is to."""
        with self._phase_of_sleep("sleep"):
            self.engine.sleep()

    def _phase_of_sleep(self, name: str) -> AbstractContextManager[None]:
        """A phase, of an engine that sleeps."""
        return self.phase(name) if self.engine.sleeps else nullcontext()

    def load_weights(self, source: object) -> None:
        """Sends the weights, or the adapters where they alone are synced, after checking names, shapes and finiteness.

        Collective over ranks.

        Args:
            source: the LightningModule.

        Raises:
            ValueError: if the weights do not fit the engine's model, or one is NaN or infinite.
        """
        source = _weight_source(source)
        with self.phase("sync"):
            check_weights(source.weight_shapes(), self._expected_weights)
            if not source.weights_are_finite():
                raise ValueError(
                    "a weight of the policy is NaN or infinite: it is not sent to the engine, whose cache would keep "
                    "the damage. Lower the learning rate, or clip gradients (`trainer.gradient_clip_val`)"
                )
            if source.adapter_config is None:
                self.engine.load_weights(RepeatableWeights(source.named_weights))
            else:  # the engine has started with the other weights, which do not change
                self.engine.load_adapter(source.adapter_config, RepeatableWeights(source.named_adapter_weights))

    def sample(
        self,
        rows: Sequence[dict[str, Any]],
        numbers: Sequence[int],
        sampling: Sampling,
        *,
        num_samples: int,
        seeds: Sequence[int] | None,
        num_topk: int,
        encoder: PromptEncoder,
        rewards: Sequence[Reward],
        collect: Callable[[], list[list[Completion]]] | None = None,
    ) -> Rollout:
        """Samples completions, checks, decodes and scores them. Collective over ranks.

        Args:
            rows: a data set, encoded.
            numbers: the rows of it that are sampled.
            sampling: how completions are drawn.
            num_samples: completions per prompt.
            seeds: one per prompt; None leaves them to the engine.
            num_topk: how many of mu's most likely tokens are asked for at each place.
            encoder: the policy's tokenizer.
            rewards: what scores.
            collect: waits for what the engine has been asked for before; None asks it now.

        Raises:
            EngineError: on every rank, if the engine of one fails or returns what is impossible.
        """
        chosen = [rows[number] for number in numbers]
        with self.phase("generate"):
            groups = self._generate(
                [row["prompt_ids"] for row in chosen],
                sampling,
                num_samples=num_samples,
                seeds=seeds,
                num_topk=num_topk,
                encoder=encoder,
                collect=collect,
            )
        with self.phase("reward"):
            return scored_rollout(
                chosen,
                numbers,
                groups,
                columns=column_names(rows),
                num_samples=num_samples,
                tokenizer=encoder.tokenizer,
                rewards=rewards,
            )

    def _generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        num_samples: int,
        seeds: Sequence[int] | None,
        num_topk: int,
        encoder: PromptEncoder,
        collect: Callable[[], list[list[Completion]]] | None,
    ) -> list[list[Completion]]:
        """What the engine samples, checked. A rank that fails takes the others with it: they would wait for it."""
        failure, groups = None, []
        request: dict[str, Any] = {
            "num_samples": num_samples,
            "stop_token_ids": encoder.stop_token_ids,
            "num_topk": num_topk,
        }
        try:
            groups = collect() if collect else self.engine.generate(prompt_ids, sampling, seeds=seeds, **request)
            check_completions(
                groups, sampling, num_prompts=len(prompt_ids), vocabulary_size=encoder.vocabulary_size, **request
            )
        except EngineError as error:
            failure = error
        if self._on_any_rank(failure is not None):
            raise failure or EngineError("the engine of another rank has failed; that rank's output says why")
        return groups


def _weight_source(module: object) -> WeightSource:
    if not isinstance(module, WeightSource):
        raise TypeError(f"the LightningModule must be a `WeightSource`, got {type(module).__name__}")
    return module


def _is_run_to_end(trainer: Any) -> bool:  # noqa: ANN401
    return trainer.received_sigterm or any(hook.is_run_to_end for hook in rollout_hooks(trainer))


def _end_run(trainer: Any) -> None:  # noqa: ANN401
    """Ends a run whose engine has stopped waiting: as a callback does, or else with the status that SIGTERM has."""
    for hook in rollout_hooks(trainer):
        hook.on_wait_ended(trainer)
    raise SIGTERMException(128 + signal.SIGTERM)
