"""How much of the divergence the sampled token shows."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from drpo_lightning.batch import Sampling
from drpo_lightning.functional import (
    TopKLogprobs,
    binary_kl_divergence,
    binary_tv_divergence,
    topk_kl_divergence,
    topk_tv_divergence,
)
from drpo_lightning.logs import log_metrics
from drpo_lightning.metrics import TokenStatistics
from drpo_lightning.rollout.engine import RolloutEngine
from drpo_lightning.rollout.hooks import RolloutHooks

NAMES = [f"proxy/{divergence}_{kind}" for divergence in ("binary", "topk", "exact") for kind in ("tv", "kl")]


class FullSamples(NamedTuple):
    """Completions with mu of the whole vocabulary at each place.

    Attributes:
        input_ids: prompts and completions `[batch, seq]`, padded on the right.
        attention_mask: False on padding.
        completion_mask: True on sampled tokens.
        rollout_logprobs: log mu of the sampled tokens, 0 elsewhere.
        vocabulary_ids: all tokens `[tokens, vocab]`, most likely under mu first, a row for each sampled token.
        vocabulary_logprobs: their log mu, in nats.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    rollout_logprobs: Tensor
    vocabulary_ids: Tensor
    vocabulary_logprobs: Tensor


class DivergenceProxy(Callback, RolloutHooks):
    """Logs the binary, the top-K and the exact divergence of pi from mu side by side, on a few sequences.

    `proxy/binary_tv <= proxy/topk_tv <= proxy/exact_tv` (units of probability), and likewise `_kl` (nats). Objectives
    see the binary divergence, of the sampled token alone; how far it stays below the exact one tells what a threshold
    on it really bounds. mu is the engine's full distribution at the weights of the rollout, on completions sampled
    for this purpose; pi is the policy after the rollout's last update.

    Memory: `num_prompts * max_tokens` distributions over the vocabulary, of about 50 bytes an entry on the policy's
    device, and 130 on the host while vLLM hands them over: 1.2 GB for 64 tokens of a vocabulary of 150,000. A run
    resumed in the middle of a rollout leaves that one out.

    Args:
        num_prompts: sequences, per rank.
        max_tokens: most tokens of their completions.
        k: tokens of the top-K divergence.
        every_n_rollouts: does so for every n-th rollout, the first included.
        seed: of the samples.
    """

    def __init__(
        self, num_prompts: int = 4, max_tokens: int = 16, k: int = 20, every_n_rollouts: int = 5, seed: int = 0
    ) -> None:
        settings = {"num_prompts": num_prompts, "max_tokens": max_tokens, "k": k, "every_n_rollouts": every_n_rollouts}
        for name, value in settings.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.num_prompts = num_prompts
        self.max_tokens = max_tokens
        self.k = k
        self.every_n_rollouts = every_n_rollouts
        self.seed = seed
        self._is_due = False
        self._samples: FullSamples | None = None

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Decides whether this rollout is one to look at."""
        self._samples = None
        self._is_due = trainer.current_epoch % self.every_n_rollouts == 0

    def on_engine_refresh(self, trainer: Trainer, pl_module: LightningModule, engine: RolloutEngine) -> None:  # noqa: ARG002
        """Samples with the weights that the rollout is sampled with."""
        if not self._is_due:
            return
        self._is_due = False
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        sampling: Sampling = replace(data.sampling, max_tokens=min(self.max_tokens, data.sampling.max_tokens))
        prompts = data.upcoming_prompt_ids(self.num_prompts)
        groups = engine.generate(
            prompts,
            sampling,
            num_samples=1,
            stop_token_ids=data.encoder.stop_token_ids,
            seeds=[self.seed + trainer.global_rank * len(prompts) + i for i in range(len(prompts))],
            num_topk=-1,
        )
        self._samples = _collate(prompts, [group[0] for group in groups], data.encoder.pad_token_id)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        """Compares after the last update on the rollout, and logs."""
        if self._samples is None or batch_idx + 1 < trainer.num_training_batches:
            return
        samples = FullSamples(*(tensor.to(pl_module.device) for tensor in self._samples))
        self._samples = None
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            logprobs = pl_module(
                samples.input_ids, samples.attention_mask, samples.completion_mask, samples.vocabulary_ids
            )
        statistics = TokenStatistics(means=NAMES).to(pl_module.device)
        statistics.update(divergences(logprobs, samples, self.k))
        log_metrics(trainer, pl_module, statistics.compute()[0])


def divergences(policy_logprobs: Tensor, samples: FullSamples, k: int) -> dict[str, Tensor]:
    """The three divergences of each sampled token, of two kinds, by name.

    Args:
        policy_logprobs: log pi `[tokens, 1 + vocab]` of the sampled token and then of `samples.vocabulary_ids`.
        samples: the tokens and mu.
        k: tokens of the top-K divergence.
    """
    mask = samples.completion_mask
    pi, mu = policy_logprobs[:, 0], samples.rollout_logprobs[mask]
    ids, likely = samples.vocabulary_ids, samples.vocabulary_logprobs
    is_sampled = ids == samples.input_ids[mask][:, None]
    values = {"proxy/binary_tv": binary_tv_divergence(pi, mu), "proxy/binary_kl": binary_kl_divergence(pi, mu)}
    for name, size in (("topk", k), ("exact", ids.shape[1])):
        topk = TopKLogprobs(policy_logprobs[:, 1 : 1 + size], likely[:, :size], is_sampled[:, :size].any(1))
        values[f"proxy/{name}_tv"] = topk_tv_divergence(pi, mu, topk)
        values[f"proxy/{name}_kl"] = topk_kl_divergence(pi, mu, topk)
    return values


def _collate(prompts: list[list[int]], completions: list[Any], pad_token_id: int) -> FullSamples:
    """The samples as padded tensors."""
    lengths = [len(prompt) + len(c.token_ids) for prompt, c in zip(prompts, completions, strict=True)]
    shape = (len(prompts), max(lengths))
    samples = FullSamples(
        input_ids=torch.full(shape, pad_token_id),
        attention_mask=torch.zeros(shape, dtype=torch.bool),
        completion_mask=torch.zeros(shape, dtype=torch.bool),
        rollout_logprobs=torch.zeros(shape),
        vocabulary_ids=torch.cat([completion.topk_ids for completion in completions]),
        vocabulary_logprobs=torch.cat([completion.topk_logprobs for completion in completions]),
    )
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        sampled = slice(len(prompt), lengths[i])
        samples.input_ids[i, : lengths[i]] = torch.tensor(prompt + completion.token_ids)
        samples.attention_mask[i, : lengths[i]] = True
        samples.completion_mask[i, sampled] = True
        samples.rollout_logprobs[i, sampled] = torch.tensor(completion.logprobs)
    return samples
