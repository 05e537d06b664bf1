"""Logprobs of given tokens, and of the distribution that a sampler draws from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import linear_token_logprobs, sampling_logprobs
from drpo_lightning.functional.logprobs import target_logprobs

TOKENS, WIDTH, VOCAB = 23, 8, 37


def head(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(VOCAB, (TOKENS,), generator=generator)


def test_token_logprobs_worked_by_hand():
    hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[math.log(3), 0.0], [0.0, math.log(4)]])
    # logits [log 3, 0] and [0, log 4]; at T = 1/2 they double, and 3 and 4 turn into 9 and 16
    got = linear_token_logprobs(hidden, weight, torch.tensor([0, 0]))
    torch.testing.assert_close(got, torch.tensor([3 / 4, 1 / 5]).log())
    got = linear_token_logprobs(hidden, weight, torch.tensor([0, 0]), temperature=0.5)
    torch.testing.assert_close(got, torch.tensor([9 / 10, 1 / 17]).log())
    got = linear_token_logprobs(hidden, weight, torch.tensor([0, 0]), bias=torch.tensor([0.0, math.log(2)]))
    torch.testing.assert_close(got, torch.tensor([3 / 5, 1 / 9]).log())


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_token_logprobs_equal_a_python_loop(temperature, with_bias):
    hidden, weight, bias, targets = head()
    got = linear_token_logprobs(
        hidden, weight, targets, bias=bias if with_bias else None, temperature=temperature, chunk_size=5
    )
    for t in range(TOKENS):
        logits = []
        for v in range(VOCAB):
            logit = math.fsum(h * w for h, w in zip(hidden[t].tolist(), weight[v].tolist(), strict=True))
            logits.append((logit + bias[v].item() * with_bias) / temperature)
        normaliser = math.log(math.fsum(math.exp(logit) for logit in logits))
        assert got[t].item() == pytest.approx(logits[targets[t].item()] - normaliser, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 5, 22, 23, 24, 1024])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_change_neither_value_nor_gradient(chunk_size, with_bias):
    upstream = torch.randn(TOKENS, generator=torch.Generator().manual_seed(9))
    results = []
    for size in (TOKENS, chunk_size):
        hidden, weight, bias, targets = head()
        leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
        got = linear_token_logprobs(
            hidden, weight, targets, bias=bias if with_bias else None, temperature=0.7, chunk_size=size
        )
        results.append([got.detach(), *torch.autograd.grad((got * upstream).sum(), leaves)])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_gradient_equals_that_of_log_softmax():
    hidden, weight, bias, targets = head(3)
    got = linear_token_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, chunk_size=4)
    grads = torch.autograd.grad(got.sum(), [hidden, weight, bias])
    naive = (((hidden @ weight.T + bias) / 0.7).log_softmax(-1))[torch.arange(TOKENS), targets]
    for grad, expected in zip(grads, torch.autograd.grad(naive.sum(), [hidden, weight, bias]), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [4, 1024])
def test_bfloat16_hidden_states_give_float32_logprobs(chunk_size):
    hidden, weight, _, targets = head(dtype=torch.bfloat16)
    got = linear_token_logprobs(hidden, weight, targets, chunk_size=chunk_size)
    assert got.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, weight)
    expected = logits.float().log_softmax(-1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert hidden.grad.isfinite().all()


SEVERAL = torch.randint(VOCAB, (TOKENS, 4), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("chunk_size", [1, 5, 22, 23, 1024])
@pytest.mark.parametrize("with_bias", [True, False])
def test_several_targets_equal_a_gather_from_log_softmax_gradients_included(chunk_size, with_bias):
    hidden, weight, bias, _ = head(3)
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    got = linear_token_logprobs(
        hidden, weight, SEVERAL, bias=bias if with_bias else None, temperature=0.7, chunk_size=chunk_size
    )
    logits = hidden @ weight.T + (bias if with_bias else 0)
    expected = (logits / 0.7).log_softmax(-1).gather(1, SEVERAL)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    upstream = torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(9))
    grads, naive = (torch.autograd.grad((value * upstream).sum(), leaves) for value in (got, expected))
    for grad, reference in zip(grads, naive, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-4)


def test_several_targets_are_each_what_they_are_alone():
    hidden, weight, bias, _ = head(3)
    together = linear_token_logprobs(hidden, weight, SEVERAL, bias=bias, chunk_size=5)
    for column in range(4):
        alone = linear_token_logprobs(hidden, weight, SEVERAL[:, column], bias=bias)
        torch.testing.assert_close(together[:, column], alone, rtol=1e-6, atol=1e-6)


def test_all_targets_sum_to_one():
    hidden, weight, _, _ = head()
    everything = torch.arange(VOCAB).expand(TOKENS, VOCAB)
    got = linear_token_logprobs(hidden, weight, everything, temperature=1.3, chunk_size=4)
    torch.testing.assert_close(got.exp().sum(1), torch.ones(TOKENS))


@pytest.mark.parametrize("shape", [(TOKENS,), (TOKENS, 3)])
def test_target_logprobs_are_float32_whatever_the_logits_are(shape):
    logits = torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))
    got = target_logprobs(logits, targets, temperature=0.7)
    expected = (logits.float() / 0.7).log_softmax(-1).gather(1, targets.view(TOKENS, -1)).view(shape)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_tokens_give_no_logprobs():
    hidden, weight, _, targets = head()
    assert linear_token_logprobs(hidden[:0], weight, targets[:0]).shape == (0,)
    assert linear_token_logprobs(hidden[:0], weight, SEVERAL[:0]).shape == (0, 4)


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
