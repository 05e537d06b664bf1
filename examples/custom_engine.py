"""A rollout engine of one's own: it samples one token at a time, without a cache.

    python examples/custom_engine.py

An engine samples completions, and says log mu of every token, of the distribution that the token was drawn from. The
trainer sends it the whole state dict before every rollout. `SyncProbe` holds it against the trainer.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from transformers import AutoModelForCausalLM

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.callbacks import ExactMatchReward, RolloutProgress, RolloutStatistics, SyncProbe
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.modules import PolicyModule
from drpo_lightning.rollout import RolloutEngine

MODEL = "models/arithmetic"
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}


class PlainEngine(RolloutEngine):
    """Samples on the CPU. `RolloutEngine`'s constructor only keeps settings; `start` loads the model."""

    is_started = False
    can_sleep = False  # it has nothing to give back between rollouts
    dtype_name = "float32"

    def check_available(self) -> None:
        """All that it needs is installed."""

    def start(self, model: str, **_: Any) -> None:  # noqa: ANN401 - device, number of ranks, seed and so on
        """Loads the model."""
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.context_tokens, self.is_started = self.model.config.max_position_embeddings, True

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copies the trainer's weights."""
        self.model.load_state_dict({name: tensor.detach() for name, tensor in weights})

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, **asked: Any) -> list[list[Completion]]:  # noqa: ANN401
        """Equal seeds and weights give equal completions."""
        stop, seeds = set(asked["stop_token_ids"]), asked.get("seeds") or range(len(prompt_ids))
        sources = zip(prompt_ids, [torch.Generator().manual_seed(seed) for seed in seeds], strict=True)
        return [[self._sample(list(ids), sampling, stop, g) for _ in range(asked["num_samples"])] for ids, g in sources]

    def _sample(self, ids: list[int], sampling: Sampling, stop: set[int], generator: torch.Generator) -> Completion:
        tokens, logprobs = list[int](), list[float]()
        while len(tokens) < sampling.max_tokens and not stop.intersection(tokens[-1:]):
            logits = self.model(torch.tensor([ids + tokens])).logits[0, -1].float()
            log_mu = (logits / sampling.temperature).log_softmax(0)
            tokens.append(int(log_mu.exp().multinomial(1, generator=generator)))
            logprobs.append(float(log_mu[tokens[-1]]))
        return Completion(tokens, logprobs, "stop" if stop.intersection(tokens[-1:]) else "length")

    def _sleep(self) -> None: ...
    def _wake(self) -> None: ...

    def close(self) -> None:
        """Frees the model."""
        self.model, self.is_started = None, False


if __name__ == "__main__":
    seed_everything(0)
    callbacks = [ExactMatchReward(), SyncProbe(), RolloutStatistics(), RolloutProgress()]
    trainer = Trainer(accelerator="cpu", max_epochs=2, log_every_n_steps=1, callbacks=callbacks, **QUIET)
    samples: dict[str, Any] = {"num_prompts": 8, "group_size": 4, "sampling": Sampling(max_tokens=8)}
    trainer.fit(PolicyModule(MODEL), RolloutDataModule(PlainEngine(), ArithmeticPrompts(), MODEL, **samples))
    print(f"engine against trainer: {float(trainer.callback_metrics['sync/probe_logprob_diff']):.1e} nats")
