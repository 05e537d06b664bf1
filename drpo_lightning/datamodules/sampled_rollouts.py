"""How a rollout comes about: the engine gets the weights and samples, rewards score, prompts are exchanged."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import repeat
from typing import Any

import torch

from drpo_lightning.batch import Completion, Rollout, Sampling
from drpo_lightning.datamodules.dynamic_sampling import replace_groups
from drpo_lightning.datamodules.micro_batches import Split
from drpo_lightning.datamodules.optimizer_offload import OptimizerOffload
from drpo_lightning.datamodules.prompt_encoder import PromptEncoder, PromptFormat
from drpo_lightning.datamodules.rank_balance import balance_ranks
from drpo_lightning.datamodules.resumable import ResumableRollouts
from drpo_lightning.datamodules.rollout_queue import RolloutQueue
from drpo_lightning.datamodules.sampler import RolloutSampler
from drpo_lightning.datamodules.seeds import seed_of
from drpo_lightning.rewards.base import Reward
from drpo_lightning.rollout.engine import InFlight, Request, RolloutEngine
from drpo_lightning.rollout.hooks import RolloutHooks, rollout_hooks
from drpo_lightning.rollout.policy import RolloutPolicy


class SampledRollouts(ResumableRollouts):
    """Makes rollouts one after the other, with the weights of the moment.

    Its settings are those of `RolloutDataModule`.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        *,
        engine: RolloutEngine,
        model: str,
        num_prompts: int,
        group_size: int,
        num_updates: int,
        sampling: Sampling,
        prompt_format: PromptFormat,
        system_prompt: str | None,
        max_staleness: int,
        in_flight: InFlight,
        dynamic_sampling_rounds: int,
        mask_truncated_completions: bool,
        balance_ranks: bool,
        offload_optimizer: bool,
        seed: int,
        seeded_requests: bool | None,
        trust_remote_code: bool,
    ) -> None:
        super().__init__(num_prompts=num_prompts, group_size=group_size, num_updates=num_updates, seed=seed)
        if dynamic_sampling_rounds < 0:
            raise ValueError(f"`data.dynamic_sampling_rounds` must be 0 or positive, got {dynamic_sampling_rounds}")
        self.engine = engine
        self.model_name = os.path.expanduser(model)
        self.sampling = sampling
        self.prompt_format = prompt_format
        self.system_prompt = system_prompt
        self.max_staleness = max_staleness
        self.dynamic_sampling_rounds = dynamic_sampling_rounds
        self.mask_truncated_completions = mask_truncated_completions
        self.balance_ranks = balance_ranks
        self.offload_optimizer = offload_optimizer
        self.seeded_requests = seeded_requests
        self.trust_remote_code = trust_remote_code
        self.dynamic_sampling_statistics: dict[str, float] = {}
        """What it took to replace prompts without a signal in the last rollout, see `replace_groups`."""
        self._encoder: PromptEncoder | None = None
        self._offload = OptimizerOffload()
        self._sampler = RolloutSampler(engine, self.model_name, seed=seed, trust_remote_code=trust_remote_code)
        if max_staleness:
            self._queue = RolloutQueue(
                self._sampler.engine,
                max_staleness=max_staleness,
                in_flight=in_flight,
                make_requests=self._requests,
            )

    @property
    def encoder(self) -> PromptEncoder:
        """The policy's tokenizer and what belongs to it, loaded when it is first asked for."""
        if self._encoder is None:
            self._encoder = PromptEncoder(
                self.model_name,
                prompt_format=self.prompt_format,
                system_prompt=self.system_prompt,
                trust_remote_code=self.trust_remote_code,
            )
        return self._encoder

    @property
    def _rewards(self) -> list[Reward]:
        return [callback for callback in self._trainer.callbacks if isinstance(callback, Reward)]

    @property
    def _hooks(self) -> list[RolloutHooks]:
        return rollout_hooks(self._trainer)

    def refresh_engine(self) -> None:
        """Gives the engine the trainer's current weights, starting it if need be. Collective over ranks.

        Raises:
            EngineError: if the engine does not start or take the weights.
            ValueError: if the weights do not fit the engine's model, or one is NaN or infinite.
        """
        # Lightning validates in inference mode: an engine started in it could not take weights outside of it, and a
        # sharded policy would keep tensors that it cannot train with.
        with torch.inference_mode(mode=False), torch.no_grad():
            self._sampler.make_ready(self._trainer)
            self._sampler.load_weights(self._trainer.lightning_module)
            for hook in self._hooks:
                hook.on_engine_refresh(self._trainer, self._trainer.lightning_module, self._sampler.engine)

    @contextmanager
    def _engine_awake(self) -> Iterator[None]:
        """Gives the engine the newest weights, and the memory that the training can do without meanwhile."""
        self._sampler.phase_seconds = {}
        with self._offloaded_optimizers():
            self.refresh_engine()
            yield
            self._sampler.rest()

    def _offloaded_optimizers(self) -> AbstractContextManager[None]:
        """A block in which the optimizers' state is in the host's memory, if that is asked for."""
        if not self.offload_optimizer:
            return nullcontext()
        trainer, phase = self._trainer, partial(self._sampler.phase, "offload")
        return self._offload.offloaded(trainer.optimizers, trainer.strategy.root_device, phase)

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Seconds of the last rollout: `sync`, `generate` and `reward`.

        If there is such a thing, also `start` and `wake` of the engine, `sleep`, `offload` (of the optimizer's state to
        the host's memory, and back) and `score` (forward passes before the first update).
        """
        return self._sampler.phase_seconds

    def next_rollout(self) -> None:
        """Synchronises the engine, samples and scores the next rollout."""
        module = self._trainer.lightning_module
        self.rollout = None
        self._note_random_state()
        self.is_sampling = True
        for hook in self._hooks:
            hook.on_rollout_start(self._trainer, module)
        self._sampler.engine.weights_version = self.iteration  # a validation's, in between, count as those before
        with self._engine_awake():
            collect = None
            if self._queue is not None:
                self._queue.fill(self.iteration, self._num_rollouts_left)
                collect = partial(self._queue.collect, self.iteration)
            # Of the number of the prompt, not its row: one that comes twice gets other samples the second time.
            rollout = self._sample_places(self._places, self._seeds(self._positions(self.iteration)), collect)
            rollout = self._replace_groups(rollout)
        rollout.weights_version = self.iteration
        rollout.positions = [number for number in self._positions(self.iteration) for _ in range(self.group_size)]
        rollout = self._balance(rollout)
        if isinstance(module, RolloutPolicy):
            self._score(rollout, module)
        self._apply_settings(rollout)
        self.is_sampling = False
        self.iteration += 1
        self.rollout, self._position = rollout, 0
        for hook in self._hooks:
            hook.on_rollout_end(self._trainer, module, rollout)
        self._num_made = self.iteration

    def _sample_places(
        self,
        places: Sequence[int],
        seeds: list[int] | None,
        collect: Callable[[], list[list[Completion]]] | None = None,
    ) -> Rollout:
        """Samples and scores the prompts at some places of the rollout to come."""
        numbers = self._schedule.row_numbers(self.iteration, places)
        settings = (self.sampling, self.group_size, self._num_topk)
        rollout = self._sample(self._schedule.rows, numbers, seeds, *settings, collect)
        rollout.masks_truncated = self.mask_truncated_completions
        return rollout

    def _replace_groups(self, rollout: Rollout) -> Rollout:
        """Replaces prompts without a signal as far as the settings say, and notes how all have gone. Collective."""
        max_rounds = 0 if self._trainer.overfit_batches else self.dynamic_sampling_rounds
        if not max_rounds and self._schedule.curriculum is None:
            return rollout

        def sample(places: Sequence[int]) -> Rollout:
            return self._sample_places(places, self._seeds(repeat("replacement"), repeat(self.iteration), places))

        outcome = replace_groups(
            rollout,
            sample,
            num_prompts=self.num_prompts,
            max_rounds=max_rounds,
            rank=self._trainer.global_rank,
            of_all_ranks=self._of_all_ranks,
        )
        self._schedule.add(self.iteration, outcome.samples, num_taken=outcome.num_taken)
        self.dynamic_sampling_statistics = outcome.statistics if max_rounds else {}
        return outcome.rollout

    def _balance(self, rollout: Rollout) -> Rollout:
        """Exchanges prompts among ranks as far as the settings say. Collective."""
        num_ranks, split = self._trainer.world_size, self._split_of_samples
        if not (self.balance_ranks and num_ranks > 1 and split.is_packed):
            return rollout
        rank = self._trainer.global_rank
        balanced = balance_ranks(rollout, split, rank=rank, num_ranks=num_ranks, of_all_ranks=self._of_all_ranks)
        rows = [self._schedule.rows[number] for number in balanced.prompt_numbers]
        balanced.columns = {name: [row.get(name) for row in rows] for name in rollout.columns}
        return balanced

    @property
    def _split_of_samples(self) -> Split:
        """How a rollout's samples become updates and micro-batches."""
        policy = self._trainer.lightning_module
        return Split(
            seed=self.seed,
            group_size=self.group_size,
            num_updates=self.num_updates,
            window=int(self._trainer.accumulate_grad_batches),
            is_packed=isinstance(policy, RolloutPolicy) and policy.is_packed,
        )

    def _requests(self, iteration: int) -> list[Request]:
        """What this rank asks the engine for where it is asked before a rollout's turn."""
        positions = self._positions(iteration)
        rows = [self._schedule.rows[number] for number in self._schedule.row_numbers(iteration, self._places)]
        seeds: Iterable[int | None] = self._seeds(positions) or repeat(None, len(rows))
        settings = (self.sampling, self.group_size, self.encoder.stop_token_ids)
        return [
            Request(position, row["prompt_ids"], *settings, seed, self._num_topk)
            for position, row, seed in zip(positions, rows, seeds, strict=True)
        ]

    @property
    def _num_topk(self) -> int:
        """Most likely tokens under mu that the objective asks for."""
        module = self._trainer.lightning_module
        return module.num_topk if isinstance(module, RolloutPolicy) else 0

    def _seeds(self, *parts: Iterable[object]) -> list[int] | None:
        """Seeds made of what tells requests apart, a value of each part; None where requests have none."""
        seeded = self.seeded_requests
        if seeded is None:
            seeded = self._trainer.strategy.root_device.type == "cpu"
        return [seed_of(self.seed, *values) for values in zip(*parts, strict=False)] if seeded else None

    def _score(self, rollout: Rollout, policy: RolloutPolicy) -> None:
        """Adds what the trainer's own models say of a rollout, as far as it is asked for."""
        batch_size = max(1, len(rollout) // self._num_micro_batches)
        score = partial(policy.score, rollout, batch_size=batch_size, pad_token_id=self.encoder.pad_token_id)
        if policy.needs_proximal_logprobs:
            with self._sampler.phase("score"):
                rollout.proximal_logprobs = score()
        if policy.needs_reference_logprobs:
            with self._sampler.phase("score"):
                rollout.reference_logprobs = score(by_reference=True)

    def _apply_settings(self, rollout: Rollout) -> None:
        """Notes what the settings of now make of a rollout, which may come from a checkpoint."""
        rollout.masks_truncated = self.mask_truncated_completions
        policy = self._trainer.lightning_module
        is_scored = isinstance(policy, RolloutPolicy) and rollout.reference_logprobs is not None
        rollout.reference_penalties = policy.reference_penalties(rollout) if is_scored else None

    def _sample(
        self,
        rows: list[dict[str, Any]],
        numbers: list[int],
        seeds: list[int] | None,
        sampling: Sampling,
        num_samples: int,
        num_topk: int = 0,
        collect: Callable[[], list[list[Completion]]] | None = None,
    ) -> Rollout:
        """Samples completions of some rows of a data set, decodes and scores them; see `RolloutSampler.sample`."""
        return self._sampler.sample(
            rows,
            numbers,
            sampling,
            num_samples=num_samples,
            seeds=seeds,
            num_topk=num_topk,
            encoder=self.encoder,
            rewards=self._rewards,
            collect=collect,
        )
