"""The DataModule whose data are rollouts: sampled by the engine with the current weights, scored, and split."""

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from drpo_lightning.batch import Completion, Rollout, RolloutBatch, Sampling, ValidationBatch
from drpo_lightning.datamodules.prompt_encoder import PromptEncoder, PromptFormat
from drpo_lightning.datamodules.prompts import PromptSource
from drpo_lightning.errors import SettingError
from drpo_lightning.functional.advantages import group_advantages
from drpo_lightning.rewards.base import Reward, RewardBatch, combine_rewards, score_rewards
from drpo_lightning.rollout.engine import EngineError, RolloutEngine
from drpo_lightning.rollout.hooks import RolloutHooks
from drpo_lightning.rollout.policy import RolloutPolicy
from drpo_lightning.rollout.weights import WeightSource, check_weights, model_weight_shapes


class RolloutDataModule(LightningDataModule):
    """Samples completions from an engine, scores them, and serves them as micro-batches.

    One epoch is one rollout: `num_prompts` prompts, `group_size` completions of each, `num_updates` optimizer updates
    on them. The completions of a rollout are split evenly over updates, ranks and, within an update,
    `trainer.accumulate_grad_batches` micro-batches.

    Args:
        engine: what samples the completions.
        prompts: prompts of the training.
        model: folder or hub name of the policy, for the tokenizer and the engine. The command line takes it from
            `model.model`.
        val_prompts: prompts of the validation; none by default.
        num_prompts: prompts per rollout, over all ranks.
        group_size: completions per prompt, at least 2.
        num_updates: optimizer updates per rollout.
        sampling: how completions are drawn.
        val_num_samples: completions per validation prompt.
        val_sampling: how they are drawn; by default as in training.
        advantage: `group_mean` (the paper's), `group_mean_std` or `leave_one_out`.
        prompt_format: `raw` takes a prompt as it is, `chat` as a user's message in the model's chat template. A
            prompt that is a list of messages always goes through the chat template.
        system_prompt: first message of a chat.
        seed: of the order of prompts, of the split into micro-batches, and of seeded requests.
        seeded_requests: gives every prompt a seed made of `seed`, the rollout and the prompt, so that a run can be
            repeated exactly. By default on a CPU only: on a GPU it slows vLLM down.
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
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        val_num_samples: int = 1,
        val_sampling: Sampling | None = None,
        advantage: Literal["group_mean", "group_mean_std", "leave_one_out"] = "group_mean",
        prompt_format: PromptFormat = "raw",
        system_prompt: str | None = None,
        seed: int = 0,
        seeded_requests: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if group_size < 2:
            raise ValueError(
                f"`data.group_size` must be at least 2, got {group_size}: an advantage compares the samples of a prompt"
            )
        for name, value in (
            ("num_prompts", num_prompts),
            ("num_updates", num_updates),
            ("val_num_samples", val_num_samples),
        ):
            if value < 1:
                raise ValueError(f"`data.{name}` must be at least 1, got {value}")
        self.engine = engine
        self.prompts = prompts
        self.model_name = os.path.expanduser(model)
        self.val_prompts = val_prompts
        self.num_prompts = num_prompts
        self.group_size = group_size
        self.num_updates = num_updates
        self.sampling = sampling
        self.val_num_samples = val_num_samples
        self.val_sampling = val_sampling or sampling
        self.advantage = advantage
        self.prompt_format = prompt_format
        self.system_prompt = system_prompt
        self.seed = seed
        self.seeded_requests = seeded_requests
        self.trust_remote_code = trust_remote_code

        self.iteration = 0
        """Rollouts made so far."""
        self.rollout: Rollout | None = None
        """The rollout in use, of this rank."""
        self.staleness = 0
        """Weight syncs between the weights that sampled the rollout and the newest synced ones: none comes between."""
        self.phase_seconds: dict[str, float] = {}
        """What the last rollout took, in seconds: `sync`, `generate` and `reward`."""
        self._position = 0
        self._served: RolloutBatch | None = None
        self._order: tuple[int, list[int]] = (-1, [])
        self._resumed = False
        self._rows: list[dict[str, Any]] = []
        self._val_rows: list[dict[str, Any]] = []
        self._encoder: PromptEncoder | None = None
        self._expected_weights: dict[str, torch.Size] = {}

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Loads tokenizer and prompts and checks that everything fits, before anything heavy starts."""
        self.engine.check_available()
        if stage == "fit":
            self._check_batch_sizes()
        if not self._rewards:
            raise SettingError(
                "`trainer.callbacks` has no reward: list a `RewardCallback`, such as "
                "drpo_lightning.callbacks.ExactMatchReward"
            )
        if stage == "fit" and not self._rows:
            self._rows = self._load(self.prompts, self.sampling, "data.prompts")
        if self.val_prompts is not None and not self._val_rows:
            self._val_rows = self._load(self.val_prompts, self.val_sampling, "data.val_prompts")
        if stage == "validate" and self.val_prompts is None:
            raise SettingError("`data.val_prompts` must be set to validate")
        if self.val_prompts is None:
            self._trainer.limit_val_batches = 0

    def _check_batch_sizes(self) -> None:
        ranks, micro_batches = self._trainer.world_size, self._num_micro_batches
        if self.num_prompts % ranks:
            raise SettingError(f"`data.num_prompts` {self.num_prompts} must be a multiple of the {ranks} ranks")
        samples = self.num_prompts * self.group_size // ranks
        if samples % micro_batches:
            raise SettingError(
                f"`data.num_prompts` x `data.group_size` = {samples} completions on each of {ranks} ranks cannot be "
                f"split evenly into `data.num_updates` {self.num_updates} x `trainer.accumulate_grad_batches` "
                f"{micro_batches // self.num_updates} = {micro_batches} micro-batches"
            )
        rank_zero_info(
            f"Rollout: {self.num_prompts} prompts x {self.group_size} samples = {samples * ranks} completions -> "
            f"{self.num_updates} updates of {samples * ranks // self.num_updates}, each in "
            f"{micro_batches // self.num_updates} micro-batches of {samples // micro_batches} on {ranks} rank(s)"
        )

    def _load(self, prompts: PromptSource, sampling: Sampling, key: str) -> list[dict[str, Any]]:
        """The rows of a data set, encoded and checked."""
        rows = prompts.load()
        for reward in self._rewards:
            for i, row in enumerate(rows):
                if missing := [name for name in reward.required_columns if name not in row]:
                    raise SettingError(
                        f"`{key}`: row {i} has no column {missing[0]!r}, which the reward {reward.name!r} needs; "
                        f"it has {sorted(row)}"
                    )
        context = min(self.encoder.context_tokens, self.engine.max_context_tokens or self.encoder.context_tokens)
        return self.encoder.encode(rows, max_tokens=sampling.max_tokens, context_tokens=context, key=key)

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
    def _trainer(self) -> Any:  # noqa: ANN401
        assert self.trainer is not None, "the data module needs a trainer"
        return self.trainer

    @property
    def _rewards(self) -> list[Reward]:
        return [callback for callback in self._trainer.callbacks if isinstance(callback, Reward)]

    @property
    def _hooks(self) -> list[RolloutHooks]:
        return [callback for callback in self._trainer.callbacks if isinstance(callback, RolloutHooks)]

    @property
    def _num_micro_batches(self) -> int:
        """Micro-batches of a rollout on each rank."""
        return self.num_updates * int(self._trainer.accumulate_grad_batches)

    @property
    def _num_trained_batches(self) -> int:
        """Those of them that are trained on: all, unless `trainer.limit_train_batches` says otherwise."""
        return int(min(self._num_micro_batches, self._trainer.num_training_batches))

    # ---------------------------------------------------------------- engine

    def refresh_engine(self) -> None:
        """Gives the engine the trainer's current weights, starting it if need be. Collective over ranks.

        Raises:
            EngineError: if the engine does not start or take the weights.
            ValueError: if the weights do not fit the engine's model, or one is NaN or infinite.
        """
        source = self._trainer.lightning_module
        if not isinstance(source, WeightSource):
            raise TypeError(f"the LightningModule must be a `WeightSource`, got {type(source).__name__}")
        # Lightning validates in inference mode: an engine started in it could not take weights outside of it, and a
        # sharded policy would keep tensors that it cannot train with.
        with torch.inference_mode(mode=False), torch.no_grad():
            if self._trainer.strategy.root_device.type == "cuda":
                torch.cuda.empty_cache()  # what the last update's activations took is the engine's now
            if self.engine.is_started:
                self.engine.wake()
            else:
                self._start_engine()
            self._load_weights(source)
            for hook in self._hooks:
                hook.on_engine_refresh(self._trainer, self._trainer.lightning_module, self.engine)

    def _start_engine(self) -> None:
        self._expected_weights = model_weight_shapes(self.model_name, trust_remote_code=self.trust_remote_code)
        self.engine.start(
            self.model_name,
            device=self._trainer.strategy.root_device,
            num_ranks=self._trainer.world_size,
            seed=self.seed + self._trainer.global_rank,
            trust_remote_code=self.trust_remote_code,
        )

    def _load_weights(self, source: WeightSource) -> None:
        """Sends the weights, after checking names, shapes and finiteness."""
        started = time.perf_counter()
        check_weights(source.weight_shapes(), self._expected_weights)
        if not source.weights_are_finite():
            raise ValueError(
                "a weight of the policy is NaN or infinite: it is not sent to the engine, whose cache would keep the "
                "damage. Lower the learning rate, or clip gradients (`trainer.gradient_clip_val`)"
            )
        self.engine.load_weights(source.named_weights())
        self.phase_seconds["sync"] = time.perf_counter() - started

    def teardown(self, stage: str) -> None:  # noqa: ARG002
        """Ends the engine."""
        self.engine.close()

    def on_exception(self, exception: BaseException) -> None:  # noqa: ARG002
        """Ends the engine, also on Ctrl-C."""
        self.engine.close()

    # ---------------------------------------------------------------- rollouts

    def train_dataloader(self) -> "RolloutLoader":
        """The micro-batches of one rollout after the other."""
        return RolloutLoader(self)

    def val_dataloader(self) -> "ValidationLoader":
        """The scored completions of the validation prompts, as one batch."""
        return ValidationLoader(self)

    def next_rollout(self) -> None:
        """Synchronises the engine, samples and scores the next rollout."""
        module = self._trainer.lightning_module
        self.rollout = None
        for hook in self._hooks:
            hook.on_rollout_start(self._trainer, module)
        self.refresh_engine()
        positions = self._positions
        numbers = [self._prompt_number(position) for position in positions]
        # Of the place in the stream of prompts: a prompt that comes twice gets other samples the second time.
        seeds = [_hash(self.seed, position) for position in positions]
        policy = module if isinstance(module, RolloutPolicy) else None
        num_topk = policy.num_topk if policy else 0
        self.rollout = self._sample(self._rows, numbers, seeds, self.sampling, self.group_size, num_topk)
        self.engine.sleep()
        if policy and policy.needs_proximal_logprobs:
            batch_size = len(self.rollout) // self._num_micro_batches
            pad_token_id = self.encoder.pad_token_id
            self.rollout.proximal_logprobs = policy.score(
                self.rollout, batch_size=batch_size, pad_token_id=pad_token_id
            )
        self.iteration += 1
        self._position = 0
        for hook in self._hooks:
            hook.on_rollout_end(self._trainer, module, self.rollout)

    def validation_rollout(self) -> Rollout:
        """Samples and scores this rank's validation prompts with the current weights."""
        self.refresh_engine()
        numbers = list(range(self._trainer.global_rank, len(self._val_rows), self._trainer.world_size))
        seeds = [_hash(self.seed, "validation", number) for number in numbers]
        rollout = self._sample(self._val_rows, numbers, seeds, self.val_sampling, self.val_num_samples)
        self.engine.sleep()
        return rollout

    @property
    def _positions(self) -> range:
        """Where this rank's prompts of the next rollout stand in the stream of prompts."""
        per_rank = self.num_prompts // self._trainer.world_size
        first = self.iteration * self.num_prompts + self._trainer.global_rank * per_rank
        return range(first, first + per_rank)

    def upcoming_prompt_ids(self, num_prompts: int) -> list[list[int]]:
        """Token ids of the first prompts of this rank's next rollout."""
        return [self._rows[self._prompt_number(p)]["prompt_ids"] for p in self._positions[:num_prompts]]

    def _prompt_number(self, position: int) -> int:
        """Which prompt stands at a position of the endless stream of shuffled passes over the data set."""
        epoch, place = divmod(position, len(self._rows))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_hash(self.seed, "prompts", epoch))
            self._order = (epoch, torch.randperm(len(self._rows), generator=generator).tolist())
        return self._order[1][place]

    def _sample(
        self,
        data: list[dict[str, Any]],
        numbers: list[int],
        seeds: list[int],
        sampling: Sampling,
        num_samples: int,
        num_topk: int = 0,
    ) -> Rollout:
        """Samples completions of some rows of a data set, decodes and scores them."""
        rows = [data[number] for number in numbers]
        seeded = self.seeded_requests
        if seeded is None:
            seeded = self._trainer.strategy.root_device.type == "cpu"
        started = time.perf_counter()
        groups = self.engine.generate(
            [row["prompt_ids"] for row in rows],
            sampling,
            num_samples=num_samples,
            stop_token_ids=self.encoder.stop_token_ids,
            seeds=seeds if seeded else None,
            num_topk=num_topk,
        )
        self.phase_seconds["generate"] = time.perf_counter() - started
        completions = [completion for group in groups for completion in group]
        if len(completions) != len(rows) * num_samples:
            raise EngineError(f"the engine returned {len(completions)} completions for {len(rows) * num_samples}")
        repeated = [row for row in rows for _ in range(num_samples)]
        texts = self.encoder.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        columns = sorted(set().union(*rows) - {"prompt", "prompt_ids"})
        batch = RewardBatch(
            prompts=[row["prompt"] for row in repeated],
            completions=texts,
            completion_ids=[completion.token_ids for completion in completions],
            finish_reasons=[completion.finish_reason for completion in completions],
            columns={name: [row.get(name) for row in repeated] for name in columns},
        )
        started = time.perf_counter()
        parts = score_rewards(self._rewards, batch)
        self.phase_seconds["reward"] = time.perf_counter() - started
        return Rollout(
            prompts=list(batch.prompts),
            prompt_ids=[row["prompt_ids"] for row in repeated],
            completions=completions,
            texts=texts,
            columns={name: list(values) for name, values in batch.columns.items()},
            group_size=num_samples,
            rewards=combine_rewards(parts, {reward.name: reward.weight for reward in self._rewards}),
            reward_parts=parts,
            prompt_numbers=[number for number in numbers for _ in range(num_samples)],
        )

    def micro_batches(self, rollout: Rollout, num_batches: int) -> list[RolloutBatch]:
        """Splits a rollout at random into its micro-batches and counts every update's tokens. Collective.

        Args:
            rollout: this rank's rollout.
            num_batches: how many of the micro-batches will be trained on; an update at the end may be incomplete.
        """
        generator = torch.Generator().manual_seed(_hash(self.seed, "split", self.iteration, self._trainer.global_rank))
        chunks = torch.randperm(len(rollout), generator=generator).chunk(self._num_micro_batches)[:num_batches]
        window = int(self._trainer.accumulate_grad_batches)
        lengths = torch.tensor([len(completion.token_ids) for completion in rollout.completions])
        counts = torch.tensor([[int(lengths[rows].sum()), len(rows)] for rows in chunks], dtype=torch.float64)
        updates = torch.stack([counts[i : i + window].sum(0) for i in range(0, len(counts), window)])
        device = self._trainer.strategy.root_device
        totals = self._trainer.strategy.reduce(updates.to(device), reduce_op="sum").long().tolist()
        advantages = group_advantages(rollout.rewards, rollout.group_size, kind=self.advantage)
        return [
            RolloutBatch.collate(
                rollout,
                rows.tolist(),
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

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Iteration, and the rollout in use with the position in it, of every rank. Collective over ranks."""
        # Not `_position`: a micro-batch that was handed out may have been interrupted before it was trained on.
        trained = int(self._trainer.fit_loop.epoch_loop.batch_progress.current.processed)
        mine: dict[str, Any] = {"iteration": self.iteration, "position": trained, "rollout": None}
        if self.rollout is not None and trained < self._num_trained_batches:
            # Rewards are taken by now: the columns, which may hold anything, have served.
            mine["rollout"] = {**asdict(self.rollout), "columns": {}}
        if mine["rollout"] and trained % int(self._trainer.accumulate_grad_batches):
            rank_zero_warn(
                "this checkpoint is in the middle of an optimizer update: the gradient accumulated so far is not in "
                "it, and a run that is resumed from it will differ from one that goes on"
            )
        ranks: list[Any] = [mine]
        if self._trainer.world_size > 1:
            ranks = [None] * self._trainer.world_size
            torch.distributed.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up this rank's part of `state_dict`, to go on training."""
        if self._trainer.state.fn not in (None, "fit"):
            return
        ranks = state_dict["ranks"]
        if len(ranks) != self._trainer.world_size:
            raise SettingError(
                f"the checkpoint is of {len(ranks)} ranks and this run has {self._trainer.world_size}: "
                "resume it with as many"
            )
        mine = ranks[self._trainer.global_rank]
        self.iteration, self._position = mine["iteration"], mine["position"]
        self.rollout = None if mine["rollout"] is None else _rollout_from_state(mine["rollout"])
        self._resumed = self.rollout is not None


class RolloutLoader:
    """Yields the micro-batches of a new rollout each time it is iterated over.

    It has a length, since Lightning fetches ahead from a loader without one, and would make the next rollout before
    the last update on this one. Nothing runs before the first batch is asked for.
    """

    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data._num_micro_batches

    def __iter__(self) -> Iterator[RolloutBatch]:
        data = self.data
        resumed, data._resumed = data._resumed, False
        if not resumed:
            data.next_rollout()
        assert data.rollout is not None
        batches = data.micro_batches(data.rollout, data._num_trained_batches)
        while data._position < len(batches):
            data._position += 1  # before the batch is given away: what stands after the last `yield` never runs
            data._served = batches[data._position - 1]
            yield data._served

    def state_dict(self) -> dict[str, Any]:
        """Empty: the state is the data module's, which Lightning restores at the end of an epoch too."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see `state_dict`."""


class ValidationLoader:
    """Yields the scored completions of all validation prompts as one batch."""

    def __init__(self, data: RolloutDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[ValidationBatch]:
        yield ValidationBatch(self.data.validation_rollout())


def _hash(*parts: object) -> int:
    """A number below 2^62 made of some values: a seed that differs wherever one of them does."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _rollout_from_state(state: dict[str, Any]) -> Rollout:
    completions = [Completion(**completion) for completion in state["completions"]]
    return Rollout(**{**state, "completions": completions})
