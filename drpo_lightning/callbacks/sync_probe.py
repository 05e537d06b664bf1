"""Checks that the engine has the trainer's weights, by scoring the same tokens in both."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from drpo_lightning.batch import Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.logs import log_metrics
from drpo_lightning.rollout.engine import EngineError, RolloutEngine
from drpo_lightning.rollout.hooks import RolloutHooks

THRESHOLDS = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}
"""Largest mean |log pi - log mu| of the probe, in nats, by the engine's precision."""
QUANTIZED_THRESHOLD = 1.0
MIXED_PRECISION_THRESHOLD = THRESHOLDS["bfloat16"]
SPARE_TOKENS = 2
"""What a sequence leaves of the context: for the sampled token, and one more."""


class SyncProbe(Callback, RolloutHooks):
    """Stops the run if the engine's logprobs are not the trainer's after a weight sync.

    A few fixed token sequences, longer than one block of the engine's prefix cache, are continued by one sampled token
    each; its logprob is compared with the trainer's. A cache kept from older weights, a tied head left behind or a
    tensor that did not arrive shows in the difference, which is logged as `sync/probe_logprob_diff` (mean of
    |log pi - log mu|, nats).

    Small errors stay below the threshold: it is above the rounding differences of two engines, which are large in
    bfloat16. What is missed once adds up over syncs and is seen later.

    Args:
        threshold: largest mean difference in nats; by default 1e-3 for an engine in float32, 0.25 in bfloat16, 0.1 in
            float16 and 1.0 if it is quantised.
        num_sequences: token sequences in the probe.
        seed: of the sequences.
    """

    def __init__(self, threshold: float | None = None, num_sequences: int = 8, seed: int = 0) -> None:
        if threshold is not None and not threshold > 0:
            raise ValueError(f"`threshold` must be positive, in nats, got {threshold}")
        if num_sequences < 1:
            raise ValueError(f"`num_sequences` must be at least 1, got {num_sequences}")
        self.threshold = threshold
        self.num_sequences = num_sequences
        self.seed = seed
        self._difference: float | None = None

    def on_engine_refresh(self, trainer: Trainer, pl_module: LightningModule, engine: RolloutEngine) -> None:
        """Runs the probe."""
        sampling: Sampling = trainer.datamodule.sampling  # type: ignore[attr-defined]
        sequences = self._sequences(trainer.datamodule.encoder.tokenizer, engine)  # type: ignore[attr-defined]
        probe = Sampling(max_tokens=1, temperature=sampling.temperature or 1.0)
        groups = engine.generate(
            sequences.tolist(),
            probe,
            num_samples=1,
            stop_token_ids=[],
            seeds=[self.seed + i for i in range(len(sequences))],
        )
        tokens = torch.tensor([group[0].token_ids for group in groups])
        rollout_logprobs = torch.tensor([group[0].logprobs[0] for group in groups])
        input_ids = torch.cat([sequences, tokens], 1).to(pl_module.device)
        asked = torch.zeros_like(input_ids, dtype=torch.bool)
        asked[:, -1] = True
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            policy_logprobs = pl_module(input_ids, torch.ones_like(asked), asked)[:, -1]
        differences = (policy_logprobs.cpu() - rollout_logprobs).abs()
        worst = trainer.strategy.reduce(differences.mean().to(pl_module.device), reduce_op="max")
        self._difference = float(worst)
        self._check(self._difference, trainer, engine)

    def _sequences(self, tokenizer: object, engine: RolloutEngine) -> Tensor:
        """Fixed token sequences, two blocks of the prefix cache long if the context allows."""
        vocabulary = len(tokenizer)  # type: ignore[arg-type]
        block = engine.cache_block_tokens
        length = min(2 * max(block, 16), engine.context_tokens - SPARE_TOKENS)
        if length <= block:
            raise SettingError(
                f"`SyncProbe` needs sequences longer than a block of the prefix cache ({block} tokens) to notice a "
                f"stale one, and the context is {engine.context_tokens} tokens: raise {engine.context_setting} to "
                f"{block + 1 + SPARE_TOKENS} or more, or leave the probe out"
            )
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocabulary, (self.num_sequences, length), generator=generator)

    def _check(self, difference: float, trainer: Trainer, engine: RolloutEngine) -> None:
        threshold = self.threshold
        if threshold is None:
            threshold = THRESHOLDS.get(engine.dtype_name, QUANTIZED_THRESHOLD)
            if not trainer.precision.startswith("32"):
                threshold = max(threshold, MIXED_PRECISION_THRESHOLD)
        if not difference <= threshold:
            raise EngineError(
                f"after a weight sync the engine and the trainer differ by {difference:.3g} nats on the probe "
                f"(threshold {threshold:g} for an engine in {engine.dtype_name}): the engine does not generate with "
                "the trainer's weights, and the importance ratios would be wrong. Known causes: a tied head or another "
                "tensor that did not arrive, a prefix cache kept from older weights, another model in the engine. If "
                "the engine is right and only less precise, raise `SyncProbe.threshold`"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:  # noqa: ARG002
        """Logs the last probe: the loader, in which it runs, must not log."""
        if self._difference is not None:
            log_metrics(trainer, pl_module, {"sync/probe_logprob_diff": self._difference})
            self._difference = None
