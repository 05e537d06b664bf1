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

    Args:
        pass_threshold: reward from which on a sample has passed.
    """

    SUMS = ("prompts", "samples", "reward", "tokens", "truncated")
    MAX_LOG2_K = 16

    def __init__(self, pass_threshold: float = 1.0) -> None:
        super().__init__(len(self.SUMS) + self.MAX_LOG2_K, 1)
        self.pass_threshold = pass_threshold

    def update(self, rollout: Rollout) -> None:
        """Adds this rank's completions."""
        groups = rollout.group_rewards
        passed = (groups >= self.pass_threshold).sum(dim=1).tolist()
        values = [
            len(groups),
            len(rollout),
            rollout.rewards.double().sum().item(),
            rollout.num_completion_tokens,
            sum(completion.is_truncated for completion in rollout.completions),
        ]
        values += [
            sum(pass_at_k(rollout.group_size, count, 2**i) for count in passed) if 2**i <= rollout.group_size else 0
            for i in range(self.MAX_LOG2_K)
        ]
        self.sums += torch.tensor(values, dtype=torch.float64, device=self.sums.device)
        self.maxima.clamp_(min=float(rollout.group_size))

    def compute(self) -> dict[str, float]:
        """`reward/mean`, `pass@k`, `completions/mean_length` and `completions/truncated_fraction`."""
        prompts, samples, reward, tokens, truncated, *passes = self.sums.tolist()
        if not samples:
            return {}
        group_size = self.maxima.item()
        return {
            "reward/mean": reward / samples,
            "completions/mean_length": tokens / samples,
            "completions/truncated_fraction": truncated / samples,
            **{f"pass@{2**i}": value / prompts for i, value in enumerate(passes) if 2**i <= group_size},
        }
