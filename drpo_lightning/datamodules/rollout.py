"""The DataModule whose data are rollouts: sampled by the engine with the current weights, scored, and split."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any, Literal

import torch

from drpo_lightning.batch import Rollout, RolloutBatch, Sampling, ValidationBatch
from drpo_lightning.datamodules.curriculum import PassRateCurriculum
from drpo_lightning.datamodules.loaders import BatchLoader
from drpo_lightning.datamodules.micro_batches import check_batch_sizes, split_rollout, update_sizes
from drpo_lightning.datamodules.prompt_encoder import PromptFormat
from drpo_lightning.datamodules.prompt_lengths import OverlongPolicy, without_overlong
from drpo_lightning.datamodules.prompts import PromptSource
from drpo_lightning.datamodules.rollout_queue import check_max_staleness
from drpo_lightning.datamodules.sampled_rollouts import SampledRollouts
from drpo_lightning.datamodules.scored_rollout import check_columns
from drpo_lightning.datamodules.subsets import subsets
from drpo_lightning.errors import SettingError
from drpo_lightning.functional.advantages import group_advantages
from drpo_lightning.logs import announce
from drpo_lightning.rollout.engine import InFlight, RolloutEngine


class RolloutDataModule(SampledRollouts):
    """Samples completions from an engine, scores them, and serves them as micro-batches.

    One epoch is one rollout: `num_prompts` prompts, `group_size` completions of each, `num_updates` optimizer updates
    on them. The prompts are split evenly over the ranks and the samples of every prompt at random over the updates, and
    an update's on a rank over `trainer.accumulate_grad_batches` micro-batches of about as many tokens. Which samples an
    update takes depends on the seed alone: not on the number of ranks or micro-batches, which may both change when a
    run is resumed.

    `trainer.overfit_batches` takes the same prompts for every rollout, the first of the stream, samples them anew each
    time, and trains on as many of the micro-batches as it says; 1.0 is all of them.

    Args:
        engine: what samples the completions.
        prompts: prompts of the training.
        model: folder or hub name of the policy, for the tokenizer and the engine. The command line takes it from
            `model.model`.
        val_prompts: prompts of the validation; none by default.
        num_prompts: prompts per rollout, over all ranks.
        group_size: completions per prompt, at least 2.
        num_updates: optimizer updates per rollout.
        max_tokens_per_batch: most tokens of a micro-batch, prompts and completions, on a rank; beyond it the run stops,
            and says how many `trainer.accumulate_grad_batches` it takes. No limit by default.
        sampling: how completions are drawn.
        val_num_samples: completions per validation prompt.
        val_sampling: how they are drawn; by default as in training.
        advantage: `group_mean` (the paper's), `group_mean_std` or `leave_one_out`.
        prompt_format: `raw` takes a prompt as it is, `chat` as a user's message in the model's chat template. A
            prompt that is a list of messages always goes through the chat template.
        system_prompt: first message of a chat that does not begin with a system message of its own.
        max_prompt_tokens: most tokens of a prompt; by default as many as the context has room for beside a completion.
        overlong_prompts: `raise` stops at a prompt that is too long, `drop` leaves such prompts out, in training and
            validation, and says how many there are.
        curriculum: leaves out prompts that the policy passes too often or too rarely; by default all are taken.
            `trainer.overfit_batches` takes its prompts all the same.
        max_staleness: how many rollouts are sampled ahead, while others are trained on: the most weight syncs between
            the weights that a sample is begun with and the newest ones when it is trained on. 0 samples and trains one
            after the other. More needs a `VLLMEngine` in a process of its own, or a `VLLMServerEngine`.
        dynamic_sampling_rounds: how often prompts whose samples have equal rewards, and so no gradient, are replaced by
            the next ones of the stream before the rollout is trained on (DAPO's dynamic sampling); what has no signal
            after that stays. 0 replaces none. `trainer.overfit_batches` takes its prompts all the same.
        mask_truncated_completions: leaves completions that were cut off out of the loss; their rewards still count in
            the mean of their group. (A softer penalty is `OverlongReward`.)
        in_flight: what becomes of unfinished samples at a weight sync: `continue` draws their next tokens with the new
            weights, `drop` throws away what they have and begins them anew; rollout servers can only `drop`. Without
            meaning if `max_staleness` is 0.
        balance_ranks: exchanges prompts, with their samples, among the ranks before they are trained on, so that each
            has about as many tokens; where micro-batches are packed. It does not change what an update is made of.
        offload_optimizer: keeps the optimizer's state in the host's memory while the engine samples: for a GPU that an
            engine which sleeps between rollouts shares with the training.
        seed: of the order of prompts, of the split into micro-batches, and of seeded requests.
        seeded_requests: gives every prompt a seed made of `seed`, the rollout and the prompt, so that a run can be
            repeated exactly. By default on a CPU only: it slows vLLM down, there by a tenth (`benchmarks/README.md`).
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: PromptSource,
        model: str,
        val_prompts: PromptSource | None = None,
        num_prompts: int = 64,
        group_size: int = 8,
        num_updates: int = 4,
        max_tokens_per_batch: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        val_num_samples: int = 1,
        val_sampling: Sampling | None = None,
        advantage: Literal["group_mean", "group_mean_std", "leave_one_out"] = "group_mean",
        prompt_format: PromptFormat = "raw",
        system_prompt: str | None = None,
        max_prompt_tokens: int | None = None,
        overlong_prompts: OverlongPolicy = "raise",
        curriculum: PassRateCurriculum | None = None,
        max_staleness: int = 0,
        in_flight: InFlight = "continue",
        dynamic_sampling_rounds: int = 0,
        mask_truncated_completions: bool = False,
        balance_ranks: bool = True,
        offload_optimizer: bool = False,
        seed: int = 0,
        seeded_requests: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_max_staleness(max_staleness, curriculum=curriculum, dynamic_sampling_rounds=dynamic_sampling_rounds)
        super().__init__(
            engine=engine,
            model=model,
            num_prompts=num_prompts,
            group_size=group_size,
            num_updates=num_updates,
            sampling=sampling,
            prompt_format=prompt_format,
            system_prompt=system_prompt,
            max_staleness=max_staleness,
            in_flight=in_flight,
            dynamic_sampling_rounds=dynamic_sampling_rounds,
            mask_truncated_completions=mask_truncated_completions,
            balance_ranks=balance_ranks,
            offload_optimizer=offload_optimizer,
            seed=seed,
            seeded_requests=seeded_requests,
            trust_remote_code=trust_remote_code,
        )
        if group_size < 2:
            raise ValueError(
                f"`data.group_size` must be at least 2, got {group_size}: an advantage compares the samples of a prompt"
            )
        for name, value in (
            ("num_prompts", num_prompts),
            ("num_updates", num_updates),
            ("val_num_samples", val_num_samples),
            ("max_tokens_per_batch", 1 if max_tokens_per_batch is None else max_tokens_per_batch),
            ("max_prompt_tokens", 1 if max_prompt_tokens is None else max_prompt_tokens),
        ):
            if value < 1:
                raise ValueError(f"`data.{name}` must be at least 1, got {value}")
        self.prompts = prompts
        self.val_prompts = val_prompts
        self.max_tokens_per_batch = max_tokens_per_batch
        self.val_num_samples = val_num_samples
        self.val_sampling = val_sampling or sampling
        self.advantage = advantage
        self.max_prompt_tokens = max_prompt_tokens
        self.overlong_prompts = overlong_prompts
        self.curriculum = curriculum
        self.num_overlong_prompts = 0
        """Training prompts that are left out, see `overlong_prompts`."""

        self.split_statistics: dict[str, float] = {}
        """What is lost by the way that the rollout in use is split, see `split_rollout`."""
        self._served: RolloutBatch | None = None
        self._limit_val_batches: int | float | None = None
        self._val_rows: list[dict[str, Any]] = []

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Loads tokenizer and prompts and checks that everything fits, before anything heavy starts."""
        self.engine.check_available()
        if stage == "fit":
            announce(self._trainer, f"Rollout: {self.describe_rollout()}")
            if self._queue is not None:
                self._queue.prepare()
        if not self._rewards:
            raise SettingError(
                "`trainer.callbacks` has no reward: list a `RewardCallback`, such as "
                "drpo_lightning.callbacks.ExactMatchReward"
            )
        if stage == "fit":
            rows = self.schedule.rows if self.schedule else self._load(self.prompts, self.sampling, "data.prompts")
            self._begin_schedule(rows, weights=self.prompts.weights, curriculum=self.curriculum)
        if self.val_prompts is not None and not self._val_rows:
            self._val_rows = self._load(self.val_prompts, self.val_sampling, "data.val_prompts")
        if stage == "validate" and self.val_prompts is None:
            raise SettingError("`data.val_prompts` must be set to validate")
        self._limit_validation()

    def _limit_validation(self) -> None:
        """Leaves validation out where it has no prompts, and lets no fraction of its one batch be taken."""
        self._limit_val_batches = self._trainer.limit_val_batches
        if self.val_prompts is None:
            self._trainer.limit_val_batches = 0
        elif self._trainer.overfit_batches:
            self._trainer.limit_val_batches = 1

    def _end(self) -> None:
        """Ends the engine, and leaves the trainer as it was."""
        self._sampler.engine.close()
        if self._queue is not None:
            self._queue.stop()
        if self._limit_val_batches is not None:
            self._trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def describe_rollout(self) -> str:
        """The sizes of a rollout in words.

        Raises:
            SettingError: if it cannot be split evenly into updates.
        """
        return check_batch_sizes(
            num_prompts=self.num_prompts,
            group_size=self.group_size,
            num_updates=self.num_updates,
            window=int(self._trainer.accumulate_grad_batches),
            num_ranks=self._trainer.world_size,
        )

    def _load(self, prompts: PromptSource, sampling: Sampling, key: str) -> list[dict[str, Any]]:
        """The rows of a data set, encoded and checked."""
        rows = prompts.load()
        check_columns(rows, self._rewards, key)
        context = min(self.encoder.context_tokens, self.engine.max_context_tokens or self.encoder.context_tokens)
        encoded = self.encoder.encode(rows, key=key)
        kept = without_overlong(
            encoded,
            max_prompt_tokens=self.max_prompt_tokens,
            max_tokens=sampling.max_tokens,
            context_tokens=context,
            policy=self.overlong_prompts,
            key=key,
        )
        if prompts is self.prompts:
            self.num_overlong_prompts = len(encoded) - len(kept)
        return kept

    @property
    def val_subsets(self) -> dict[str, set[int]]:
        """Row numbers of the validation prompts by data set and category, where there is more than one of them."""
        return subsets(self._val_rows)

    @property
    def num_val_prompts(self) -> int:
        """Validation prompts of all ranks."""
        return len(self._val_rows)

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        """Ends the engine."""
        self._end()

    def on_exception(self, exception: BaseException) -> None:  # noqa: ARG002
        """Ends the engine, also on Ctrl-C."""
        self._end()

    # ---------------------------------------------------------------- rollouts

    def train_dataloader(self) -> BatchLoader[RolloutBatch]:
        """The micro-batches of a rollout, of a new one each time that it is iterated over."""
        return BatchLoader(self._num_micro_batches, self._training_batches)

    def val_dataloader(self) -> BatchLoader[ValidationBatch]:
        """The scored completions of the validation prompts, as one batch."""
        return BatchLoader(1, self._validation_batches)

    def _training_batches(self) -> Iterator[RolloutBatch]:
        resumed, self._resumed = self._resumed, False
        self._resume_random_state()
        if not resumed:
            self.next_rollout()
        assert self.rollout is not None
        if resumed:
            self._apply_settings(self.rollout)
        batches = self.micro_batches(self.rollout, self._num_trained_batches)
        window = int(self._trainer.accumulate_grad_batches)
        while self._position < len(batches):
            if self._position % window == 0:
                self._note_random_state()
            self._position += 1  # before the batch is given away: what stands after the last `yield` never runs
            self._served = batches[self._position - 1]
            yield self._served

    def _validation_batches(self) -> Iterator[ValidationBatch]:
        self._note_random_state()
        self.is_sampling = True
        rollout = self.validation_rollout()
        self.is_sampling = False
        numbers = rollout.prompt_numbers[:: rollout.group_size]
        yield ValidationBatch(
            rollout,
            {
                name: [i for i, number in enumerate(numbers) if number in members]
                for name, members in self.val_subsets.items()
            },
        )

    def validation_rollout(self) -> Rollout:
        """Samples and scores this rank's validation prompts with the current weights."""
        numbers = list(range(self._trainer.global_rank, len(self._val_rows), self._trainer.world_size))
        seeds = self._seeds(repeat("validation"), numbers)
        with self._engine_awake():
            return self._sample(self._val_rows, numbers, seeds, self.val_sampling, self.val_num_samples)

    def micro_batches(self, rollout: Rollout, num_batches: int) -> list[RolloutBatch]:
        """Splits the rollout in use into its micro-batches and counts every update's tokens. Collective.

        Args:
            rollout: this rank's rollout.
            num_batches: how many of the micro-batches will be trained on; an update at the end may be incomplete.

        Raises:
            SettingError: if a micro-batch has more than `max_tokens_per_batch`.
        """
        window = int(self._trainer.accumulate_grad_batches)
        chunks, self.split_statistics = split_rollout(
            self._split_of_samples,
            rollout.positions[:: rollout.group_size],
            rollout.lengths,
            self._trainer.strategy,
            max_tokens=self.max_tokens_per_batch,
        )
        chunks = chunks[:num_batches]
        sizes = update_sizes(rollout, chunks, window).to(self._trainer.strategy.root_device)
        totals = self._trainer.strategy.reduce(sizes, reduce_op="sum").long().tolist()
        advantages = group_advantages(rollout.penalized_rewards, rollout.group_size, kind=self.advantage)
        return [
            RolloutBatch.collate(
                rollout,
                rows,
                advantages,
                pad_token_id=self.encoder.pad_token_id,
                num_update_tokens=totals[i // window][0],
                num_update_sequences=totals[i // window][1],
            )
            for i, rows in enumerate(chunks)
        ]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401, ARG002
        """The micro-batch as it was made: under `bf16-true` Lightning has cast it by now, and log mu must not round."""
        return self._served if isinstance(batch, RolloutBatch) else batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ANN401
        """Moves tensors; scored validation completions are read on the host."""
        if isinstance(batch, ValidationBatch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)
