"""Two sets of logprobs compared: equal to float64 numpy on the tokens themselves, however these are split."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drpo_lightning.metrics import LogprobComparison

NUM_TOKENS = 80
EXACT = {
    "k1_kl", "k3_kl", "chi2", "log_ratio_abs_mean", "log_ratio_abs_max", "shift_abs_mean", "shift_abs_max",
    "effective_sample_size", "perplexity_ratio", "pearson",
}  # fmt: skip
QUANTILES = {"log_ratio_abs_p99", "shift_abs_p99"}


def random_logprobs(seed, scale=0.5, num_tokens=NUM_TOKENS):
    generator = np.random.default_rng(seed)
    log_q = -4 * generator.random(num_tokens)
    log_p = np.minimum(log_q + scale * generator.normal(size=num_tokens), 0)
    return log_p.astype(np.float32), log_q.astype(np.float32)


def compared(*micro_batches):
    metric = LogprobComparison()
    for log_p, log_q in micro_batches:
        metric.update(torch.as_tensor(log_p), torch.as_tensor(log_q))
    return metric


def reference(log_p, log_q):
    """From the definitions, in float64, the log-ratio clamped."""
    log_p, log_q = np.asarray(log_p, dtype=np.float64), np.asarray(log_q, dtype=np.float64)
    log_r = (log_p - log_q).clip(-20, 20)
    r, p, q = np.exp(log_r), np.exp(log_p), np.exp(log_q)
    shift = abs(q * r - q)
    return {
        "k1_kl": -log_r.mean(),
        "k3_kl": (r - 1 - log_r).mean(),
        "chi2": (r**2).mean() - 1,
        "log_ratio_abs_mean": abs(log_r).mean(),
        "log_ratio_abs_p99": np.quantile(abs(log_r), 0.99, method="inverted_cdf"),
        "log_ratio_abs_max": abs(log_r).max(),
        "shift_abs_mean": shift.mean(),
        "shift_abs_p99": np.quantile(shift, 0.99, method="inverted_cdf"),
        "shift_abs_max": shift.max(),
        "effective_sample_size": r.sum() ** 2 / (len(r) * (r**2).sum()),
        "perplexity_ratio": np.exp(-log_r.mean()),
        "pearson": np.corrcoef(p, q)[0, 1],
    }


def assert_is_reference(found, log_p, log_q, rel=1e-9):
    expected = reference(log_p, log_q)
    assert found.keys() == EXACT | QUANTILES == expected.keys()
    for name in EXACT:
        assert found[name] == pytest.approx(expected[name], rel=rel, abs=1e-12), name
    for name in QUANTILES:
        assert found[name] == pytest.approx(expected[name], rel=0.024), name


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, NUM_TOKENS), max_size=5))
def test_equals_float64_numpy_however_the_tokens_are_split(seed, cuts):
    log_p, log_q = random_logprobs(seed)
    parts = np.split(np.arange(NUM_TOKENS), sorted(cuts))
    assert_is_reference(compared(*((log_p[part], log_q[part]) for part in parts)).compute(), log_p, log_q)


@given(st.integers(0, 2**32 - 1), st.integers(0, NUM_TOKENS))
def test_the_states_of_two_ranks_merge_to_the_state_of_one(seed, cut):
    log_p, log_q = random_logprobs(seed)
    whole = compared((log_p, log_q))
    first, second = compared((log_p[:cut], log_q[:cut])), compared((log_p[cut:], log_q[cut:]))
    for name, reduce in first._reductions.items():
        setattr(first, name, reduce(torch.stack([getattr(first, name), getattr(second, name)])))
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_the_two_tensors_of_the_state_are_all_that_is_synchronised():
    metric = LogprobComparison()
    assert {name: state.dtype for name, state in metric.metric_state.items()} == {
        "sums": torch.float64,
        "maxima": torch.float64,
    }


def test_worked_by_hand():
    """q = 1/2 and 1/4, p = 1/4 and 1/2: r = 1/2 and 2."""
    found = compared(([math.log(0.25), math.log(0.5)], [math.log(0.5), math.log(0.25)])).compute()
    assert found == {
        "k1_kl": pytest.approx(0, abs=1e-7),
        "k3_kl": pytest.approx((0.5 + 2 - 2) / 2),
        "chi2": pytest.approx((0.25 + 4) / 2 - 1),
        "log_ratio_abs_mean": pytest.approx(math.log(2)),
        "log_ratio_abs_p99": pytest.approx(math.log(2), rel=0.024),
        "log_ratio_abs_max": pytest.approx(math.log(2)),
        "shift_abs_mean": pytest.approx(0.25),
        "shift_abs_p99": pytest.approx(0.25, rel=0.024),
        "shift_abs_max": pytest.approx(0.25),
        "effective_sample_size": pytest.approx(2.5**2 / (2 * 4.25)),
        "perplexity_ratio": pytest.approx(1),
        "pearson": pytest.approx(-1),
    }


def test_equal_logprobs_differ_by_nothing():
    log_q = random_logprobs(0)[1]
    found = compared((log_q, log_q)).compute()
    ones = {"effective_sample_size": 1.0, "perplexity_ratio": 1.0, "pearson": pytest.approx(1.0, rel=1e-12)}
    assert found == dict.fromkeys(EXACT | QUANTILES, 0.0) | ones


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2])
def test_small_differences_keep_their_digits(scale):
    log_p, log_q = (x.astype(np.float64) for x in random_logprobs(1, scale))
    log_p = np.minimum(log_q + scale * np.random.default_rng(2).normal(size=NUM_TOKENS), 0)
    found = compared((log_p, log_q)).compute()
    log_r = log_p - log_q
    # Series: the definitions lose their digits here.
    assert found["k3_kl"] == pytest.approx((log_r**2 / 2 + log_r**3 / 6).mean(), rel=1e-3)
    assert found["chi2"] == pytest.approx((2 * log_r + 2 * log_r**2).mean(), rel=1e-2)
    assert found["shift_abs_mean"] == pytest.approx(abs(np.exp(log_q) * (log_r + log_r**2 / 2)).mean(), rel=1e-4)
    assert found["shift_abs_p99"] <= found["shift_abs_max"]


def test_perplexities_are_those_of_their_logprobs():
    log_p, log_q = random_logprobs(3)
    ratio = np.exp(-log_p.astype(np.float64).mean()) / np.exp(-log_q.astype(np.float64).mean())
    assert compared((log_p, log_q)).compute()["perplexity_ratio"] == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize("far", [25.0, 80.0, math.inf])
def test_the_log_ratio_is_clamped_so_that_everything_is_finite(far):
    log_p, log_q = random_logprobs(4)
    log_p[0], log_p[1], log_q[1] = -far, -0.1, -80.0
    found = compared((log_p, log_q)).compute()
    assert_is_reference(found, log_p, log_q)
    assert all(map(math.isfinite, found.values()))
    assert found["log_ratio_abs_max"] == 20


def test_nan_is_left_out():
    log_p, log_q = random_logprobs(5)
    dirty_p, dirty_q = np.append(log_p, [np.nan, -1, -np.inf]), np.append(log_q, [-1, np.nan, -np.inf])
    assert compared((dirty_p, dirty_q)).compute() == compared((log_p, log_q)).compute()


def test_without_tokens_there_is_nothing():
    nothing = np.zeros(0, dtype=np.float32)
    assert compared((nothing, nothing)).compute() == {}
    log_p, log_q = random_logprobs(6)
    assert compared((log_p, log_q), (nothing, nothing)).compute() == compared((log_p, log_q)).compute()


@pytest.mark.parametrize("constant", [-0.1, -1e-6, -15.0])
@pytest.mark.parametrize("num_tokens", [1, 7, 1000])
def test_a_constant_has_no_correlation(constant, num_tokens):
    other = random_logprobs(7, num_tokens=num_tokens)[0]
    same = np.full(num_tokens, constant, dtype=np.float32)
    for pair in ((same, other), (other, same), (same, same)):
        found = compared(pair).compute()
        assert found.keys() == (EXACT | QUANTILES) - {"pearson"}


@pytest.mark.parametrize("centre", [1e-6, 1e-3, 0.5, 1 - 1e-4])
def test_the_correlation_is_right_far_from_zero_mean(centre):
    generator = np.random.default_rng(8)
    spread = 0.5 * min(centre, 1 - centre)
    q = centre + spread * generator.uniform(-1, 1, 5000)
    p = centre + 0.6 * (q - centre) + 0.2 * spread * generator.uniform(-1, 1, 5000)
    found = compared(*zip(np.split(np.log(p), 10), np.split(np.log(q), 10), strict=True)).compute()
    assert found["pearson"] == pytest.approx(np.corrcoef(p, q)[0, 1], abs=1e-4)


@given(st.integers(0, 2**32 - 1), st.floats(0.001, 30))
def test_every_statistic_is_in_its_range(seed, scale):
    found = compared(random_logprobs(seed, scale)).compute()
    assert 0 < found["effective_sample_size"] <= 1
    assert -1 <= found.get("pearson", 0) <= 1
    assert found["k3_kl"] >= 0
    for name in ("log_ratio_abs", "shift_abs"):
        assert 0 <= found[f"{name}_p99"] <= found[f"{name}_max"]
        assert 0 <= found[f"{name}_mean"] <= found[f"{name}_max"]
    assert found["shift_abs_max"] <= 1


def test_low_precision_changes_neither_states_nor_counts():
    module = nn.Linear(1, 1)
    module.statistics = LogprobComparison()
    module.to(torch.bfloat16)
    zeros = torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(1000):
        module.statistics.update(zeros, zeros)
    assert module.statistics.sums.dtype == torch.float64
    assert module.statistics.sums[0] == 1000
