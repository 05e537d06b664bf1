"""Rollouts by transformers: slower than vLLM, in the trainer's process, wherever PyTorch runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.functional.logprobs import sampling_logprobs
from drpo_lightning.rollout.adapters import merged_weight, paired_factors
from drpo_lightning.rollout.engine import RolloutEngine, SleepMode


class TransformersEngine(RolloutEngine):
    """Samples with a replica of the model in plain PyTorch, in batches, with a KV cache.

    Args:
        dtype: precision of the replica. `fp8` computes in float32 with the weights of its linear layers, except the
            head, rounded to 8 bits, see `round_to_fp8`: an engine that does not match the trainer, as one with a
            quantised model does not.
        max_batch_size: sequences generated at a time.
        sleep: see `RolloutEngine`.
    """

    def __init__(
        self,
        dtype: Literal["float32", "bfloat16", "float16", "fp8"] = "float32",
        max_batch_size: int = 512,
        sleep: SleepMode = "auto",
    ) -> None:
        super().__init__(sleep)
        if max_batch_size < 1:
            raise ValueError(f"`max_batch_size` must be at least 1, got {max_batch_size}")
        self.dtype_name = dtype
        self.max_batch_size = max_batch_size
        self._model: Any = None
        self._generator: torch.Generator | None = None
        self._device = torch.device("cpu")
        self._quantized: frozenset[str] = frozenset()
        self._unmerged: dict[str, Tensor] = {}

    def check_available(self) -> None:
        """Always available: transformers is a dependency of the package."""

    @property
    def is_started(self) -> bool:
        """True between `start` and `close`."""
        return self._model is not None

    @property
    def supports_adapters(self) -> bool:
        """True: they are merged into the replica, which keeps a copy of its linear layers without them."""
        return True

    @property
    def can_sleep(self) -> bool:
        """True on an accelerator: the replica moves to the host's memory."""
        return self._device.type != "cpu"

    def start(
        self,
        model: str,
        *,
        device: torch.device,
        num_ranks: int,  # noqa: ARG002
        seed: int,
        trust_remote_code: bool = False,
        adapter_rank: int | None = None,
    ) -> None:
        """Loads the replica."""
        from transformers import AutoModelForCausalLM

        self._device = device
        self.check_sleep()
        dtype = torch.float32 if self.dtype_name == "fp8" else getattr(torch, self.dtype_name)
        replica = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=trust_remote_code)
        self.context_tokens = replica.config.get_text_config().max_position_embeddings
        self._generator = torch.Generator().manual_seed(seed)
        self._model = replica.to(device).eval().requires_grad_(False)
        linear, weights = _linear_weights(replica), replica.state_dict()
        self._unmerged = {} if adapter_rank is None else {name: weights[name].clone() for name in linear}
        self._quantized = linear if self.dtype_name == "fp8" else frozenset()
        for name in self._quantized:
            weights[name].copy_(round_to_fp8(weights[name]))

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        num_samples: int,
        stop_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        num_topk: int = 0,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        if num_topk > vocabulary:
            raise SettingError(
                f"`model.objective.k` must be at most the vocabulary's {vocabulary} tokens, got {num_topk}"
            )
        noise = self._uniform_noise(len(prompt_ids), num_samples, sampling.max_tokens, seeds)
        stop = torch.tensor(list(stop_token_ids), device=self._device)
        prompts_at_a_time = max(1, self.max_batch_size // num_samples)
        result: list[list[Completion]] = []
        for start in range(0, len(prompt_ids), prompts_at_a_time):
            chunk = slice(start, start + prompts_at_a_time)
            rows = self._sample(prompt_ids[chunk], sampling, noise[chunk].flatten(0, 1), num_samples, stop, num_topk)
            result.extend(rows[i : i + num_samples] for i in range(0, len(rows), num_samples))
        return result

    def _uniform_noise(
        self, num_prompts: int, num_samples: int, max_tokens: int, seeds: Sequence[int] | None
    ) -> Tensor:
        """Uniform numbers `[prompts, samples, max_tokens]`; a sample's row depends on its seed and number alone."""
        shape = (num_prompts, num_samples, max_tokens)
        if seeds is None:
            return torch.rand(shape, generator=self._generator, dtype=torch.float64)
        noise = torch.empty(shape, dtype=torch.float64)
        generator = torch.Generator()
        for i, seed in enumerate(seeds):
            for j in range(num_samples):
                torch.rand(max_tokens, generator=generator.manual_seed(seed + j), dtype=torch.float64, out=noise[i, j])
        return noise

    @torch.inference_mode()
    def _sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        noise: Tensor,
        num_samples: int,
        stop: Tensor,
        num_topk: int,
    ) -> list[Completion]:
        """Samples `num_samples` completions of each prompt of one batch, in the order of the prompts."""
        noise = noise.to(self._device)
        longest = max(map(len, prompt_ids))
        padding = [longest - len(ids) for ids in prompt_ids]
        input_ids = torch.tensor(
            [[0] * pad + list(ids) for pad, ids in zip(padding, prompt_ids, strict=True)], device=self._device
        )
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=self._device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = self._model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        cache.batch_repeat_interleave(num_samples)
        logits = output.logits[:, -1].repeat_interleave(num_samples, 0)
        mask = mask.repeat_interleave(num_samples, 0)
        position = positions[:, -1:].repeat_interleave(num_samples, 0)

        running = torch.ones(len(logits), dtype=torch.bool, device=self._device)
        tokens, logprobs, alive, likely = [], [], [], []
        for step in range(sampling.max_tokens):
            distribution = sampling_logprobs(
                logits, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
            )
            token = _inverse_cdf(distribution, noise[:, step])
            tokens.append(token)
            logprobs.append(distribution.gather(1, token[:, None])[:, 0])
            alive.append(running)
            if num_topk:
                likely.append(distribution.topk(num_topk if num_topk > 0 else distribution.shape[1]))
            running = running & ~torch.isin(token, stop)
            if step + 1 == sampling.max_tokens or not running.any():
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = position + 1
            output = self._model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]
        lengths = torch.stack(alive, 1).sum(1).tolist()
        completions = [
            Completion(row_tokens[:length], row_logprobs[:length], "length" if still_running else "stop")
            for row_tokens, row_logprobs, length, still_running in zip(
                torch.stack(tokens, 1).tolist(),
                torch.stack(logprobs, 1).tolist(),
                lengths,
                running.tolist(),
                strict=True,
            )
        ]
        return _with_topk(completions, likely) if num_topk else completions

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies the weights into the replica, in its precision."""
        own = self._model.state_dict()
        for name, tensor in weights:
            own[name].copy_(round_to_fp8(tensor) if name in self._quantized else tensor)
            if name in self._unmerged:
                self._unmerged[name].copy_(tensor)
            del tensor  # it may be a gathered one, and the next is gathered before this name is bound again

    def load_adapter(self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
        """Merges the adapters into the replica, in its precision."""
        scale = config["lora_alpha"] / config["r"]
        factors = {name: (factor_a, factor_b) for name, factor_a, factor_b in paired_factors(weights)}
        if unknown := sorted(factors.keys() - self._unmerged.keys()):
            raise ValueError(f"the adapters do not fit the engine's model: no linear layer has the weight {unknown[0]}")
        own = self._model.state_dict()
        for name, weight in self._unmerged.items():
            merged = weight
            if name in factors:
                factor_a, factor_b = (factor.to(weight.device) for factor in factors[name])
                merged = merged_weight(weight, factor_a, factor_b, scale)
            own[name].copy_(round_to_fp8(merged) if name in self._quantized else merged)

    def _sleep(self) -> None:
        self._model.to("cpu")

    def _wake(self) -> None:
        self._model.to(self._device)

    def close(self) -> None:
        """Frees the replica."""
        self._model = None
        self._unmerged = {}


def round_to_fp8(weight: Tensor) -> Tensor:
    """The nearest of the numbers that float8 e4m3 can tell apart, with one scale for the whole tensor.

    The scale takes the largest absolute value to the format's, 448: a number keeps 4 significant bits.
    """
    scale = weight.abs().max().clamp(min=torch.finfo(torch.float32).tiny) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale


def _linear_weights(model: Any) -> frozenset[str]:  # noqa: ANN401
    """Names of the weights of all linear layers but the head."""
    head = model.get_output_embeddings()
    return frozenset(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )


def _with_topk(completions: list[Completion], likely: list[Any]) -> list[Completion]:
    """Completions with the most likely tokens, `likely` being `torch.topk` of all rows, step by step."""
    ids = torch.stack([step.indices for step in likely], 1).cpu()
    logprobs = torch.stack([step.values for step in likely], 1).cpu()
    return [
        replace(
            completion,
            topk_ids=ids[i, : len(completion.token_ids)].clone(),
            topk_logprobs=logprobs[i, : len(completion.token_ids)].clone(),
        )
        for i, completion in enumerate(completions)
    ]


def _inverse_cdf(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability first exceeds a uniform number, per row.

    Cumulated in float64: in float32 the tail of a large vocabulary is lost to rounding.
    """
    cumulative = logprobs.double().exp().cumsum(1)
    # Scaled by the total, which differs from 1 by rounding, so that a number close to 1 still hits a possible token.
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0].clamp(
        max=logprobs.shape[1] - 1
    )
