"""Which scalars belong together on a chart, in TensorBoard and in `drpo report`, and which say what a run came to."""

import re
from collections.abc import Iterable

Layout = dict[str, dict[str, str]]
"""Charts by section and title: the regular expression that the names of a chart's scalars match as a whole."""

COMPARED = "(mismatch|staleness|drift)"
SIGNED = "(_(positive|negative)_adv)?"
BY_PROBABILITY = "_(rare|middle|common)"

LAYOUT: Layout = {
    "Reward": {
        "mean reward": r"reward/([^/]+/)?mean",
        "held-out reward": r"val/reward/mean",
        "held-out avg@k, pass@k and maj@k": r"val/(avg|pass|maj)@\d+",
        "held-out reward by subset": r"val/.+/reward/mean",
        "held-out avg@k, pass@k and maj@k by subset": r"val/.+/(avg|pass|maj)@\d+",
        "prompts whose samples have equal rewards": r"group/zero_std_fraction",
        "standard deviation of the reward": r"reward/std",
        "completions that a reward applies to": r"reward/[^/]+/applies_fraction",
        "failures of rewards, of all completions": r"reward/(.+/(error|timeout)|dropped)_fraction",
        "failures of rewards, of held-out completions": r"val/(.+/)?reward/(.+/(error|timeout)_|dropped_)fraction",
    },
    "Trust region": {
        "mean |pi - mu|": r"policy_shift/abs_mean",
        "99th percentile and largest |pi - mu|": r"policy_shift/abs_(p99|max)",
        "mean pi - mu": r"policy_shift/mean",
        "tokens with |pi - mu| above 0.05, 0.1, 0.2, 0.5": r"policy_shift/beyond_[\d.]+_fraction",
        "tokens above 0.2 in the direction of A": rf"region/outside_fraction{SIGNED}",
        "tokens above 0.2 in the direction of A, by mu": rf"region/outside_fraction{BY_PROBABILITY}",
        "mean importance ratio": r"importance_ratio/mean",
        "largest importance ratio": r"importance_ratio/max",
        "tokens beyond the clamp of the log-ratio": r"log_ratio/beyond_clamp_fraction",
        "radius delta": r"adaptive/delta",
        "what delta is adapted to": r"adaptive/(abs_shift_p[\d.]+|corrective_fraction)",
        "guardrail triggered": r"guardrail/triggered",
    },
    "Divergence of pi from mu": {
        "KL(mu || pi) in nats, k1 and k3": r"divergence/k[13]_kl",
        "largest of a token in nats, k1 and k3": r"divergence/k[13]_kl_max",
        "binary KL in nats": r"divergence/binary_kl",
        "largest binary KL of a token in nats": r"divergence/binary_kl_max",
        "binary TV": r"divergence/binary_tv",
        "largest binary TV of a token": r"divergence/binary_tv_max",
        "mean |log pi - log mu| in nats": r"log_ratio/abs_mean",
        "largest |log pi - log mu| in nats": r"log_ratio/abs_max",
        "TV of the sampled token, the top k, all tokens": r"proxy/(binary|topk|exact)_tv",
        "KL of the sampled token, the top k, all tokens, in nats": r"proxy/(binary|topk|exact)_kl",
    },
    "Divergence from the reference": {
        "KL(pi || reference) in nats, k1 and k3": r"reference/k[13]_kl",
        "mean |log pi - log reference| in nats": r"reference/log_ratio_abs_mean",
        "largest |log pi - log reference| in nats": r"reference/log_ratio_abs_max",
        "tokens beyond the clamp": r"reference/beyond_clamp_fraction",
        "penalty in the loss": r"optim/reference_penalty",
    },
    "Mismatch and drift": {
        "probe: mean |log pi - log mu| in nats": r"sync/probe_logprob_diff",
        "KL in nats, k3": rf"{COMPARED}/k3_kl",
        "KL in nats, k1": rf"{COMPARED}/k1_kl",
        "chi-squared": rf"{COMPARED}/chi2",
        "mean |log-ratio| in nats": rf"{COMPARED}/log_ratio_abs_mean",
        "99th percentile and largest |log-ratio| in nats": rf"{COMPARED}/log_ratio_abs_(p99|max)",
        "mean |shift|": rf"{COMPARED}/shift_abs_mean",
        "99th percentile and largest |shift|": rf"{COMPARED}/shift_abs_(p99|max)",
        "effective sample size": rf"{COMPARED}/effective_sample_size",
        "correlation of the probabilities": rf"{COMPARED}/pearson",
        "ratio of the perplexities": rf"{COMPARED}/perplexity_ratio",
    },
    "Gradient weights": {
        "attenuated tokens, 0 <= w < 1": rf"grad_weight/attenuated_fraction{SIGNED}",
        "corrective tokens, w < 0": rf"grad_weight/corrective_fraction{SIGNED}",
        "amplified tokens, w > 1": rf"grad_weight/amplified_fraction{SIGNED}",
        "attenuated tokens by mu": rf"grad_weight/attenuated_fraction{BY_PROBABILITY}",
        "corrective tokens by mu": rf"grad_weight/corrective_fraction{BY_PROBABILITY}",
        "amplified tokens by mu": rf"grad_weight/amplified_fraction{BY_PROBABILITY}",
        "percentiles of w": r"grad_weight/p\d+",
        "least, mean and largest w": r"grad_weight/(mean|min|max)",
        "mean w by the sign of A": r"grad_weight/mean_(positive|negative)_adv",
        "mean w by mu": rf"grad_weight/mean{BY_PROBABILITY}",
    },
    "Masks": {
        "masked tokens": rf"mask/fraction{SIGNED}",
        "masked tokens by mu": rf"mask/fraction{BY_PROBABILITY}",
    },
    "Optimization": {
        "loss": r"optim/loss",
        "gradient norm before clipping": r"optim/grad_norm",
        "learning rate": r"optim/learning_rate",
        "updates left out": r"optim/skipped_updates",
    },
    "Completions": {
        "tokens per completion": r"completions/(mean|max)_length",
        "truncated completions": r"completions/truncated_fraction",
        "tokens per held-out completion": r"val/(.+/)?completions/mean_length",
        "truncated held-out completions": r"val/(.+/)?completions/truncated_fraction",
        "entropy in nats: of mu, estimated, and of pi": r"entropy/(rollout|mean)",
        "entropy of pi in the first and last quarter, in nats": r"entropy/mean_(first|last)_quarter",
        "percentiles of the entropy of pi in nats": r"entropy/p\d+",
        "largest entropy of pi in nats": r"entropy/max",
        "rare, middle and common tokens by mu": r"tokens/(rare|middle|common)_fraction",
    },
    "Prompts": {
        "passes over the prompts": r"data/passes",
        "prompts left out": r"data/(skipped|too_easy|too_hard|unjudged)_fraction",
        "prompts left out for their length": r"data/overlong_prompts",
        "mean reward by data set": r"data/.+/reward_mean",
        "share of each data set": r"data/.+/fraction",
        "replaced for lack of a signal, of the sampled prompts": r"dynamic_sampling/discarded_fraction",
        "rounds of replacement": r"dynamic_sampling/rounds",
        "mean reward of all that was sampled": r"dynamic_sampling/reward_mean",
        "tokens of the replaced": r"dynamic_sampling/discarded_tokens",
        "seconds of replacement": r"dynamic_sampling/seconds",
    },
    "Speed": {
        "sampled tokens per second": r"perf/tokens_per_second",
        "tokens per second of generation and updates": r"perf/(generate|update)_tokens_per_second",
        "share of the device's peak in the updates": r"perf/mfu",
        "most tokens of a rank over their mean": r"perf/token_imbalance",
        "share of padding in what is computed": r"perf/padding_fraction",
        "seconds": r"perf/(start|generate|sync|reward|update|iteration)_seconds",
        "rollout": r"rollout/number",
        "seconds since the start": r"perf/elapsed_seconds",
        "most memory of a rank in GiB": r"perf/peak_memory_gib",
        "share of the time: trainer waits, engine computes": r"perf/(idle|engine_busy)_fraction",
    },
    "Engine": {
        "weight syncs since the weights of the samples": r"rollout/staleness_(mean|max)",
        "updates since the weight sync": r"rollout/updates_since_sync",
        "restarts of the engine": r"engine/restarts",
        "rollout servers": r"engine/(servers|lost_servers)",
        "requests asked again": r"engine/retried_requests",
    },
}
"""Every scalar is on one chart, and the scalars of a chart have one unit.

Sections have at most 12 charts: TensorBoard shows as many on a page.
"""

HELD_OUT = {"val/pass@1": "held-out pass@1", "val/reward/mean": "held-out reward"}
"""Scalars of which the largest value counts, with their titles."""
FIGURES = HELD_OUT | {
    "reward/mean": "reward",
    "policy_shift/beyond_0.2_fraction": "beyond |pi - mu| = 0.2",
    "region/outside_fraction": "outside the region",
    "divergence/k3_kl": "KL(mu || pi), nats",
    "mismatch/k3_kl": "mismatch, nats",
    "grad_weight/corrective_fraction": "corrective tokens",
    "completions/mean_length": "tokens per completion",
    "perf/tokens_per_second": "tokens per second",
}
"""Scalars whose last value says what a run came to, with their titles."""
BEST_PREFIX = "best/"
"""What stands before the name of a scalar that holds the largest value so far of another one."""


def charts_with(tags: Iterable[str]) -> Layout:
    """The charts that at least one of the scalars is on; no section without a chart.

    Args:
        tags: names of scalars.
    """
    tags = list(tags)
    layout = {
        section: {
            title: pattern for title, pattern in charts.items() if any(re.fullmatch(pattern, tag) for tag in tags)
        }
        for section, charts in LAYOUT.items()
    }
    return {section: charts for section, charts in layout.items() if charts}
