"""Mean reward, pass@k, avg@k and majority@k of validation prompts."""

import math
from collections import defaultdict
from collections.abc import Sequence

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


def majority_at_k(answers: Sequence[str | None], passed: Sequence[bool], k: int) -> float:
    """Estimate of the chance that the answer which most of k samples give is right.

    The mean over the disjoint runs of k samples. Samples without an answer do not vote, answers with as many votes
    share the decision, and k samples that give no answer are wrong.

    Args:
        answers: final answer of each sample, equal texts for equal answers; None where there is none.
        passed: whether each sample passed.
        k: samples that vote, at most as many as there are.

    Source: Wang et al., *Self-Consistency Improves Chain of Thought Reasoning*, arXiv 2203.11171, section 2.
    """
    starts = range(0, len(answers) - k + 1, k)
    return sum(_share_of_winners(answers[i : i + k], passed[i : i + k]) for i in starts) / len(starts)


def _share_of_winners(answers: Sequence[str | None], passed: Sequence[bool]) -> float:
    """Share of samples that passed among those of the most frequent answers."""
    votes = defaultdict(list)
    for answer, has_passed in zip(answers, passed, strict=True):
        if answer is not None:
            votes[answer].append(has_passed)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    winners = [sum(group) / most for group in votes.values() if len(group) == most]
    return sum(winners) / len(winners)


class ValidationStatistics(PackedMetric):
    """Mean reward, pass@k, majority@k for k = 1, 2, 4, ..., completion length and truncation of validation prompts.

    Dropped samples have no reward and count neither as passed nor as failed: pass@k is the mean over the prompts with
    at least k others. majority@k, for k >= 4, is there if a reward says what a completion's final answer is
    (`Reward.answers`).

    Args:
        pass_threshold: reward from which on a sample has passed.
    """

    SUMS = ("completions", "samples", "reward", "tokens", "truncated")
    MAX_LOG2_K = 16
    MIN_VOTES = 4
    """Two samples cannot outvote each other."""

    def __init__(self, pass_threshold: float = 1.0) -> None:
        super().__init__(len(self.SUMS) + 4 * self.MAX_LOG2_K, num_maxima=1)
        self.pass_threshold = pass_threshold

    def update(self, rollout: Rollout, prompts: Sequence[int] | None = None) -> None:
        """Adds this rank's completions.

        Args:
            rollout: completions of this rank's prompts.
            prompts: which of its prompts count; by default all.
        """
        size = rollout.group_size
        chosen = range(len(rollout) // size) if prompts is None else prompts
        samples = [i for prompt in chosen for i in range(prompt * size, (prompt + 1) * size)]
        rewards = rollout.rewards[samples].double()
        groups = [self._votes(rollout, prompt) for prompt in chosen]
        values: list[float] = [
            len(samples),
            int((~rewards.isnan()).sum()),
            rewards.nansum().item(),
            sum(len(rollout.completions[i].token_ids) for i in samples),
            sum(rollout.completions[i].is_truncated for i in samples),
        ]
        for k in (2**i for i in range(self.MAX_LOG2_K)):
            large = [(answers, passed) for answers, passed in groups if len(passed) >= k]
            values += [len(large), sum(pass_at_k(len(passed), sum(passed), k) for _, passed in large)]
            voting = large if rollout.answers is not None and k >= self.MIN_VOTES else []
            values += [len(voting), sum(majority_at_k(*group, k) for group in voting)]
        # Not in place: the sums of an earlier validation may belong to its inference mode.
        self.sums = self.sums + torch.tensor(values, dtype=torch.float64, device=self.sums.device)
        if chosen:
            self.maxima = self.maxima.clamp(min=float(size))

    def _votes(self, rollout: Rollout, prompt: int) -> tuple[list[str | None], list[bool]]:
        """Answers of a prompt's samples and whether they passed; without those that are dropped."""
        first = prompt * rollout.group_size
        rewards = rollout.group_rewards[prompt].tolist()
        answers = rollout.answers or [None] * len(rollout)
        kept = [i for i, reward in enumerate(rewards) if not math.isnan(reward)]
        return [answers[first + i] for i in kept], [rewards[i] >= self.pass_threshold for i in kept]

    def compute(self) -> dict[str, float]:
        """`reward/mean`, `avg@n`, `pass@k`, `maj@k`, `completions/mean_length`, `completions/truncated_fraction`.

        And `reward/dropped_fraction` if samples are dropped; what has no samples to be taken of is absent. avg@n
        is pass@1 under the name that says how many samples of each prompt it is the mean of.
        """
        completions, samples, reward, tokens, truncated, *by_k = self.sums.tolist()
        if not completions:
            return {}
        metrics = {
            "completions/mean_length": tokens / completions,
            "completions/truncated_fraction": truncated / completions,
        }
        for name, (counts, totals) in (("pass", (by_k[::4], by_k[1::4])), ("maj", (by_k[2::4], by_k[3::4]))):
            metrics |= {
                f"{name}@{2**i}": total / count
                for i, (count, total) in enumerate(zip(counts, totals, strict=True))
                if count
            }
        if samples:
            metrics["reward/mean"] = reward / samples
            metrics[f"avg@{int(self.maxima[0])}"] = metrics["pass@1"]
        if samples < completions:
            metrics["reward/dropped_fraction"] = 1 - samples / completions
        return metrics
