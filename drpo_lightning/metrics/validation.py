"""Mean reward and pass@k of validation prompts."""

import math

import torch

from drpo_lightning.batch import Rollout
from drpo_lightning.metrics.packed import PackedMetric


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples passes: `1 - C(n - c, k) / C(n, k)`.

    Args:
        num_samples: samples n of the prompt, at least k.
        num_passed: samples c that passed.
        k: samples that may be tried.

    Source: Chen et al., *Evaluating Large Language Models Trained on Code*, arXiv 2107.03374, eq. 1.
    """
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


class ValidationStatistics(PackedMetric):
    """Mean reward, pass@k for k = 1, 2, 4, ..., completion length and truncation over validation prompts.

    Dropped samples have no reward and count neither as passed nor as failed: pass@k is the mean over the prompts with
    at least k others.

    Args:
        pass_threshold: reward from which on a sample has passed.
    """

    SUMS = ("completions", "samples", "reward", "tokens", "truncated")
    MAX_LOG2_K = 16

    def __init__(self, pass_threshold: float = 1.0) -> None:
        super().__init__(len(self.SUMS) + 2 * self.MAX_LOG2_K)
        self.pass_threshold = pass_threshold

    def update(self, rollout: Rollout) -> None:
        """Adds this rank's completions."""
        groups = rollout.group_rewards
        kept = (~groups.isnan()).sum(dim=1).tolist()
        passed = (groups >= self.pass_threshold).sum(dim=1).tolist()
        values = [
            len(rollout),
            sum(kept),
            rollout.rewards.double().nansum().item(),
            rollout.num_completion_tokens,
            sum(completion.is_truncated for completion in rollout.completions),
        ]
        for k in (2**i for i in range(self.MAX_LOG2_K)):
            chances = [pass_at_k(n, c, k) for n, c in zip(kept, passed, strict=True) if n >= k]
            values += [len(chances), sum(chances)]
        self.sums += torch.tensor(values, dtype=torch.float64, device=self.sums.device)

    def compute(self) -> dict[str, float]:
        """`reward/mean`, `pass@k`, `completions/mean_length`, `completions/truncated_fraction`.

        And `reward/dropped_fraction` if samples are dropped; what has no samples to be taken of is absent.
        """
        completions, samples, reward, tokens, truncated, *passes = self.sums.tolist()
        if not completions:
            return {}
        metrics = {
            "completions/mean_length": tokens / completions,
            "completions/truncated_fraction": truncated / completions,
            **{f"pass@{2**i}": passes[2 * i + 1] / prompts for i, prompts in enumerate(passes[::2]) if prompts},
        }
        if samples:
            metrics["reward/mean"] = reward / samples
        if samples < completions:
            metrics["reward/dropped_fraction"] = 1 - samples / completions
        return metrics
