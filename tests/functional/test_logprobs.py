"""Logprobs of given tokens, and of the distribution that a sampler draws from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import sampling_logprobs
from drpo_lightning.functional.logprobs import target_logprobs

TOKENS, VOCAB = 23, 37


@pytest.mark.parametrize("shape", [(TOKENS,), (TOKENS, 3)])
def test_target_logprobs_are_float32_whatever_the_logits_are(shape):
    logits = torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))
    got = target_logprobs(logits, targets, temperature=0.7)
    expected = (logits.float() / 0.7).log_softmax(-1).gather(1, targets.view(TOKENS, -1)).view(shape)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def reference_sampling_probs(logits, temperature, top_p, top_k):
    """Top-k, then the fewest of the most likely tokens that reach top-p, one row as a list of floats."""
    if temperature == 0:
        best = logits.index(max(logits))
        return [float(i == best) for i in range(len(logits))]
    scaled = [logit / temperature for logit in logits]
    kept = sorted(range(len(logits)), key=lambda i: -scaled[i])
    if top_k:
        kept = kept[:top_k]
    weights = {i: math.exp(scaled[i] - max(scaled)) for i in kept}
    mass = sum(weights.values())
    nucleus, reached = [], 0.0
    for i in kept:
        if reached >= top_p:
            break
        nucleus.append(i)
        reached += weights[i] / mass
    mass = sum(weights[i] for i in nucleus)
    return [weights[i] / mass if i in nucleus else 0.0 for i in range(len(logits))]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 11, 50]),
)
def test_sampling_logprobs_equal_a_naive_reference_and_sum_to_one(seed, temperature, top_p, top_k):
    logits = 2 * torch.randn(2, 11, generator=torch.Generator().manual_seed(seed))
    got = sampling_logprobs(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    expected = [reference_sampling_probs(row, temperature, top_p, top_k) for row in logits.tolist()]
    torch.testing.assert_close(got.exp(), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert got.isneginf().tolist() == [[p == 0 for p in row] for row in expected]
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2))
    assert got.dtype == torch.float32


def test_without_settings_it_is_log_softmax():
    logits = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampling_logprobs(logits), logits.log_softmax(-1))


def test_top_p_stops_as_soon_as_the_share_is_reached():
    logits = torch.zeros(4)
    assert sampling_logprobs(logits, top_p=0.5).isfinite().sum() == 2
    assert sampling_logprobs(logits, top_p=0.51).isfinite().sum() == 3


def test_top_k_comes_before_top_p():
    # of [1/2, 1/4, 1/8, 1/8] top-2 leaves [2/3, 1/3]: top-p 0.6 then keeps one; top-p first would keep two
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert sampling_logprobs(logits, top_k=2, top_p=0.6).isfinite().tolist() == [True, False, False, False]
    assert sampling_logprobs(logits, top_p=0.6).isfinite().tolist() == [True, True, False, False]


def test_greedy_takes_the_first_of_the_most_likely_tokens():
    got = sampling_logprobs(torch.tensor([1.0, 3.0, 3.0, 0.0]), temperature=0.0)
    assert got.tolist() == [-math.inf, 0.0, -math.inf, -math.inf]


def test_bfloat16_logits_are_normalised_in_float32():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = sampling_logprobs(logits, temperature=0.7)
    torch.testing.assert_close(got, (logits.float() / 0.7).log_softmax(-1))
