"""The work that `step.py` measures, by name, and the least time that a machine can take for it."""

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from step_clock import Workload

from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.metrics.model_flops import ModelSize, model_size
from drpo_lightning.modules.language_model import empty_language_model

HERE = Path(__file__).parent
QUESTION = "Question: what is {a} + {b}? Answer:"
PRESETS: dict[str, dict[str, Any]] = {
    "quickstart": {
        "model": str(HERE.parent / "models" / "arithmetic"),
        "template": "{a}+{b}=",
        "num_prompts": 64,
        "group_size": 8,
        "max_tokens": 8,
        "num_updates": 1,
        "num_micro_batches": 4,
        "learning_rate": 1.5e-4,
        "device": "cpu",
        "precision": "32-true",
        "engine": "transformers",
    },
    "smollm2": {
        "model": "models/smollm2",
        "template": QUESTION,
        "num_prompts": 8,
        "group_size": 8,
        "max_tokens": 32,
        "num_updates": 1,
        "num_micro_batches": 4,
        "learning_rate": 1e-6,
        "device": "cpu",
        "precision": "32-true",
        "engine": "transformers",
    },
    "h100": {
        "model": None,  # made on the spot
        "template": QUESTION,
        "num_prompts": 64,
        "group_size": 8,
        "max_tokens": 256,
        "num_updates": 1,
        "num_micro_batches": 16,  # activations of 9.3k tokens, 3.3 MB each, beside 27 GB of parameters and the like
        "learning_rate": 1e-6,
        "device": "cuda",
        "precision": "bf16-mixed",
        "engine": "vllm",
        "gpu_memory_utilization": 0.5,  # 3.4 GB of weights and 133k tokens of 197 kB in the cache, while nothing trains
        "alternate": "runs",  # two trainers and two engines are too much for one GPU
        "turns": 1,
        "steps_per_turn": 5,
        "warmup": 1,
    },
}
"""One update per rollout: with more of them, and without vLLM, TRL needs a forward pass more than we do."""
PRESETS["quickstart-overlapped"] = PRESETS["quickstart"] | {
    "engine": "vllm",
    "max_staleness": 1,
    "alternate": "runs",
    "turns": 3,
    "steps_per_turn": 10,
    "warmup": 3,
}
PRESETS["h100-overlapped"] = PRESETS["h100"] | {
    "max_staleness": 1,
    "num_micro_batches": 32,  # 16 GB of activations: 47 GB in all, and the engine's 30 GB beside them
    "gpu_memory_utilization": 0.36,  # 3.4 GB of weights, 2 GB for computing, 25 GB or 125k tokens in the cache
    "warmup": 2,
}
DEFAULTS: dict[str, Any] = {
    "alternate": "steps",
    "turns": 7,
    "steps_per_turn": 1,
    "warmup": 2,
    "gpu_memory_utilization": 0.3,
    "max_staleness": 0,
}
"""Of what a preset does not say."""
SMOLLM2_1_7B: dict[str, int] = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
}
"""Shape of a Llama with 1.71 B parameters."""


def make_prompts(template: str, number: int) -> list[str]:
    """Different additions as texts."""
    return [row["prompt"] for row in ArithmeticPrompts(template=template).load()[:number]]


def make_random_llama(folder: Path, shape: Mapping[str, int] = SMOLLM2_1_7B) -> None:
    """Writes a Llama of random parameters in bfloat16 with tied embeddings, and a tokenizer of its size.

    The tokenizer splits texts into bytes; its other tokens, pairs of bytes, come from sampling alone.

    Args:
        folder: of model and tokenizer.
        shape: fields of its `LlamaConfig`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**shape, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = itertools.chain(["<end>"], letters, map("".join, itertools.product(letters, letters)))
    vocabulary = {word: i for i, word in enumerate(itertools.islice(words, config.vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)


class Limits(NamedTuple):
    """What was measured of the machine, and the least seconds that it needs for each phase of a step."""

    machine: dict[str, float]
    seconds: dict[str, float]


def measured_limits(workload: Workload, prompt_tokens: int) -> Limits:
    """The least time of each phase: its products at the speed of large ones, its bytes at the speed of a large copy.

    Generation computes each prompt once, and reads the weights once per token of a completion, which is the limit
    where it takes longer. The sync copies the weights once.

    Args:
        workload: what a step is.
        prompt_tokens: tokens of the prompts, each counted once per sample.
    """
    command = [sys.executable, str(HERE / "step_limits.py"), workload.device, workload.precision]
    answer = subprocess.run([*command, str(workload.threads)], capture_output=True, text=True, check=True)
    machine = json.loads(answer.stdout)
    twin = empty_language_model(workload.model)
    size = model_size(twin, {name: tensor.shape for name, tensor in twin.state_dict().items()})
    assert size is not None, "the presets are dense transformers"
    flops = step_flops(size, workload, prompt_tokens)
    engine_bytes = (size.body_parameters + size.head_parameters) * (4 if workload.precision == "32-true" else 2)
    multiplied = machine["matmul_flops_per_second"]
    copied = machine["copied_bytes_per_second"]
    seconds = {
        "generate": max(flops["generate"] / multiplied, workload.max_tokens * engine_bytes / (2 * copied)),
        "sync": engine_bytes / copied,
        "update": flops["update"] / multiplied,
    }
    return Limits(machine, seconds | {"step": sum(seconds.values())})


def step_flops(size: ModelSize, workload: Workload, prompt_tokens: int) -> dict[str, float]:
    """Operations of generation and of the updates, for prompts of about equal lengths."""
    sampled = workload.num_samples * workload.max_tokens
    squares = (prompt_tokens + sampled) ** 2 / workload.num_samples
    prefixes = prompt_tokens / workload.group_size
    return {
        "generate": size.forward_flops(num_tokens=prefixes + sampled, num_head_tokens=sampled, squared_lengths=squares),
        "update": size.training_flops(
            num_tokens=prompt_tokens + sampled, num_head_tokens=sampled, squared_lengths=squares
        ),
    }
