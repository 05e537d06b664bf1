"""Logprobs and entropies under a linear head against float64 references, gradients included."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from drpo_lightning.functional import linear_logprobs, linear_token_entropies, linear_token_logprobs

TOKENS, WIDTH, VOCAB = 23, 8, 37


@pytest.fixture
def chunks_of(monkeypatch):
    """Sets how many ids a chunk of the vocabulary has where its memory is as small as it can be."""
    return lambda num_ids: monkeypatch.setattr(linear_logprobs, "COLUMN_MULTIPLE", num_ids)


def head(seed=0, dtype=torch.float32, tokens=TOKENS, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, WIDTH, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(vocab, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(vocab, (tokens,), generator=generator)


def reference(hidden, weight, bias, targets, upstream, temperature=1.0):
    """Logprobs in float64, and by the formula the gradients of `sum(upstream * logprob)`."""
    hidden, weight, upstream = hidden.detach().double(), weight.detach().double(), upstream.double()
    logits = hidden @ weight.T + (0 if bias is None else bias.detach().double())
    logprobs = (logits / temperature).log_softmax(1)
    targets, upstream = (value if value.ndim == 2 else value[:, None] for value in (targets, upstream))
    of_logits = -logprobs.exp() * upstream.sum(1, keepdim=True)
    for token in range(len(hidden)):
        for target, factor in zip(targets[token], upstream[token], strict=True):
            of_logits[token, target] += factor
    of_logits /= temperature
    grads = [of_logits @ weight, of_logits.T @ hidden] + ([] if bias is None else [of_logits.sum(0)])
    return logprobs.gather(1, targets), grads


def random_upstream(shape, seed=9):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_token_logprobs_worked_by_hand():
    hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[math.log(3), 0.0], [0.0, math.log(4)]])
    # logits [log 3, 0] and [0, log 4]; at T = 1/2 they double, and 3 and 4 turn into 9 and 16
    got = linear_token_logprobs(hidden, weight, torch.tensor([0, 0]))
    torch.testing.assert_close(got, torch.tensor([3 / 4, 1 / 5]).log())
    got = linear_token_logprobs(hidden, weight, torch.tensor([0, 0]), temperature=0.5)
    torch.testing.assert_close(got, torch.tensor([9 / 10, 1 / 17]).log())
    got = linear_token_logprobs(hidden, weight, torch.tensor([0, 0]), bias=torch.tensor([0.0, math.log(2)]))
    torch.testing.assert_close(got, torch.tensor([3 / 5, 1 / 9]).log())


def test_entropies_worked_by_hand():
    hidden, weight = torch.eye(2), torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    got = linear_token_entropies(hidden, weight)
    first = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    torch.testing.assert_close(got, torch.tensor([first, math.log(2)]))


SHAPES = {
    "seed": st.integers(0, 10_000),
    "tokens": st.sampled_from([0, 1, 2, 7]),
    "vocab": st.sampled_from([1, 2, 12, 13]),
    "num_ids": st.sampled_from([1, 4, 6, 12, 13, 14]),
    "num_targets": st.sampled_from([None, 1, 4]),
    "temperature": st.sampled_from([1.0, 0.6, 2.0]),
    "with_bias": st.booleans(),
    "dropped": st.sampled_from([0.0, 0.5, 1.0]),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(**SHAPES)
def test_values_and_gradients_equal_the_formula_in_float64(
    seed, tokens, vocab, num_ids, num_targets, temperature, with_bias, dropped
):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias, targets = head(seed, tokens=tokens, vocab=vocab)
    bias = bias if with_bias else None
    if num_targets is not None:
        targets = torch.randint(vocab, (tokens, num_targets), generator=generator)
    upstream = torch.randn(targets.shape, generator=generator)
    upstream[torch.rand(tokens, generator=generator) < dropped] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_logprobs, "COLUMN_MULTIPLE", num_ids)
        got = linear_token_logprobs(hidden, weight, targets, bias=bias, temperature=temperature, chunk_bytes=1)
        leaves = [hidden, weight] + [bias] * with_bias
        grads = torch.autograd.grad((got * upstream).sum(), leaves)
    expected, expected_grads = reference(hidden, weight, bias, targets, upstream, temperature)
    assert (got.shape, got.dtype) == (targets.shape, torch.float32)
    torch.testing.assert_close(got.double(), expected.view(targets.shape), rtol=1e-5, atol=1e-5)
    for grad, leaf, formula in zip(grads, leaves, expected_grads, strict=True):
        assert grad.dtype == leaf.dtype
        torch.testing.assert_close(grad.double(), formula, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**{name: SHAPES[name] for name in ("seed", "tokens", "vocab", "num_ids", "temperature", "with_bias")})
def test_entropies_equal_the_formula_in_float64(seed, tokens, vocab, num_ids, temperature, with_bias):
    hidden, weight, bias, _ = head(seed, tokens=tokens, vocab=vocab)
    bias = bias if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_logprobs, "COLUMN_MULTIPLE", num_ids)
        got = linear_token_entropies(hidden, weight, bias=bias, temperature=temperature, chunk_bytes=1)
    logits = (hidden.double() @ weight.double().T + (0 if bias is None else bias.double())) / temperature
    expected = -(logits.log_softmax(1) * logits.softmax(1)).sum(1)
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_pass_autograds_own_check_in_float64(chunks_of):
    chunks_of(10)
    hidden, weight, bias, _ = head(dtype=torch.float64, tokens=4)
    targets = torch.randint(VOCAB, (4, 3), generator=torch.Generator().manual_seed(5))

    def logprobs(hidden, weight, bias):
        return linear_token_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, chunk_bytes=1)

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))


def test_the_memory_of_chunks_changes_nothing():
    hidden, weight, bias, targets = head(tokens=9, vocab=700)
    results = []
    for chunk_bytes in (1, 4 * 9 * 300, 4 * 9 * 700, 2**28):
        got = linear_token_logprobs(hidden, weight, targets, bias=bias, chunk_bytes=chunk_bytes)
        results.append([got, *torch.autograd.grad((got * random_upstream(9)).sum(), [hidden, weight, bias])])
    for other in results[1:]:
        for value, first in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, first, rtol=1e-5, atol=1e-5)


def test_all_targets_sum_to_one(chunks_of):
    chunks_of(4)
    hidden, weight, _, _ = head()
    everything = torch.arange(VOCAB).expand(TOKENS, VOCAB)
    got = linear_token_logprobs(hidden, weight, everything, temperature=1.3, chunk_bytes=1)
    torch.testing.assert_close(got.exp().sum(1), torch.ones(TOKENS))


def test_backward_passes_add_up_and_repeat(chunks_of):
    chunks_of(10)
    hidden, weight, bias, targets = head()
    got = linear_token_logprobs(hidden, weight, targets, bias=bias, chunk_bytes=1)
    (got * random_upstream(TOKENS)).sum().backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in (hidden, weight, bias)]
    (got * random_upstream(TOKENS)).sum().backward()
    for tensor, grad in zip((hidden, weight, bias), once, strict=True):
        assert torch.equal(tensor.grad, 2 * grad)


def test_a_second_derivative_is_refused():
    hidden, weight, _, targets = head()
    got = linear_token_logprobs(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(got.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_the_logprobs_are_the_same(mode):
    hidden, weight, bias, targets = head()
    with mode():
        got = linear_token_logprobs(hidden, weight, targets, bias=bias)
    assert not got.requires_grad
    assert torch.equal(got, linear_token_logprobs(hidden, weight, targets, bias=bias))


def test_frozen_tensors_get_no_gradient_and_change_none():
    hidden, weight, bias, targets = head()
    upstream = random_upstream(TOKENS)
    (expected,) = torch.autograd.grad(
        (linear_token_logprobs(hidden, weight, targets, bias=bias) * upstream).sum(), hidden
    )
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    (linear_token_logprobs(hidden, weight, targets, bias=bias) * upstream).sum().backward()
    assert torch.equal(hidden.grad, expected)
    assert weight.grad is None
    assert bias.grad is None


def test_a_weight_that_is_the_embedding_too_gets_both_gradients():
    _, weight, _, targets = head()
    inputs = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3))
    upstream = random_upstream(TOKENS)
    (linear_token_logprobs(weight[inputs], weight, targets) * upstream).sum().backward()
    _, (of_hidden, of_weight) = reference(weight[inputs], weight, None, targets, upstream)
    expected = of_weight.index_add(0, inputs, of_hidden)
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_backward_pass_leaves_tokens_without_a_gradient_out():
    hidden, weight, bias, targets = head()
    upstream = random_upstream(TOKENS)
    upstream[::3] = 0
    hidden.data[::3] = torch.nan
    got = linear_token_logprobs(hidden, weight, targets, bias=bias)
    got.backward(upstream)
    kept = upstream != 0
    _, expected = reference(hidden[kept], weight, bias, targets[kept], upstream[kept])
    assert not hidden.grad[~kept].any()
    for grad, formula in zip((hidden.grad[kept], weight.grad, bias.grad), expected, strict=True):
        torch.testing.assert_close(grad.double(), formula, rtol=1e-4, atol=1e-5)


class MatrixProducts(TorchDispatchMode):
    """Counts the matrix products that are computed in it."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_targets", [None, 3])
def test_without_a_gradient_anywhere_the_backward_pass_computes_nothing_and_gives_zeros(dtype, num_targets):
    hidden, weight, bias, targets = head(dtype=dtype)
    if num_targets is not None:
        targets = torch.randint(VOCAB, (TOKENS, num_targets), generator=torch.Generator().manual_seed(5))
    got = linear_token_logprobs(hidden, weight, targets, bias=bias)
    with MatrixProducts() as products:
        got.backward(torch.zeros_like(got))
    assert products.number == 0
    for tensor in (hidden, weight, bias):
        assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, dtype)
        assert not tensor.grad.any()


def test_without_tokens_nothing_is_computed():
    hidden, weight, bias, targets = head(tokens=0)
    with MatrixProducts() as products:
        got = linear_token_logprobs(hidden, weight, targets, bias=bias)
        got.sum().backward()
        entropies = linear_token_entropies(hidden, weight, bias=bias)
    assert products.number == 0
    assert got.shape == entropies.shape == (0,)
    for tensor in (hidden, weight, bias):
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_a_token_with_a_gradient_takes_matrix_products():
    hidden, weight, _, targets = head()
    with MatrixProducts() as products:
        linear_token_logprobs(hidden, weight, targets).sum().backward()
    assert products.number == 4  # logits, twice; the gradients of the weight and of the hidden states


def test_half_precision_rounds_the_factors_and_the_gradients_and_nothing_between(chunks_of):
    chunks_of(10)
    hidden, weight, bias, targets = head(dtype=torch.bfloat16)
    upstream = random_upstream(TOKENS)
    got = linear_token_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, chunk_bytes=1)
    got.backward(upstream)
    expected, grads = reference(hidden, weight, bias, targets, upstream, 0.7)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected[:, 0], rtol=1e-5, atol=1e-5)
    for tensor, formula in zip((hidden, weight, bias), grads, strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.grad.double(), formula, rtol=2**-8, atol=1e-5)


def test_autocast_rounds_the_factors_alone(chunks_of):
    chunks_of(10)
    hidden, weight, bias, targets = head()
    upstream = random_upstream(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_token_logprobs(hidden, weight, targets, bias=bias, chunk_bytes=1)
        entropies = linear_token_entropies(hidden, weight, bias=bias, chunk_bytes=1)
    got.backward(upstream)
    rounded = hidden.bfloat16(), weight.bfloat16()
    expected, grads = reference(*rounded, bias, targets, upstream)
    torch.testing.assert_close(got.double(), expected[:, 0], rtol=1e-5, atol=1e-5)
    for tensor, formula in zip((hidden, weight, bias), grads, strict=True):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad.double(), formula, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropies, linear_token_entropies(*(t.float() for t in rounded), bias=bias))


def test_large_logits_and_ids_that_cannot_be_drawn_stay_finite(chunks_of):
    chunks_of(3)
    hidden, weight, _, targets = head()
    bias = torch.zeros(VOCAB).index_fill(0, torch.tensor([0, 1, 2, 30]), -torch.inf)
    targets = targets.clamp(3, 29)
    hidden = (1e4 * hidden).detach().requires_grad_()
    got = linear_token_logprobs(hidden, weight, targets, bias=bias, chunk_bytes=1)
    got.backward(random_upstream(TOKENS))
    logits = hidden.double() @ weight.double().T + bias
    torch.testing.assert_close(got.double(), logits.log_softmax(1).gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=0)
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert linear_token_entropies(hidden, weight, bias=bias, chunk_bytes=1).isfinite().all()


def test_an_id_outside_the_vocabulary_has_no_logprob():
    hidden, weight, _, _ = head()
    got = linear_token_logprobs(hidden[:3], weight, torch.tensor([0, VOCAB, -1]))
    assert got.isnan().tolist() == [False, True, True]


COMPILED_AND_NOT = """
import torch
from drpo_lightning.functional import linear_token_logprobs

for tokens, shape in ((23, (23,)), (40, (40,)), (40, (40, 3))):
    hidden, weight, bias = (torch.randn(size).requires_grad_() for size in ((tokens, 8), (300, 8), (300,)))
    targets, upstream = torch.randint(300, shape), torch.randn(shape)
    results = []
    for compiled in (False, True):
        got = linear_token_logprobs(
            hidden, weight, targets, bias=bias, temperature=0.7, chunk_bytes=1, compiled=compiled
        )
        results.append([got, *torch.autograd.grad((got * upstream).sum(), [hidden, weight, bias])])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(" " in sys.prefix, reason="torch.compile does not quote the paths that it hands to the compiler")
def test_compiled_steps_give_the_same():
    subprocess.run([sys.executable, "-c", COMPILED_AND_NOT], timeout=300, check=True)


MEMORY_OF_A_CALL = """
import ctypes, sys
from pathlib import Path
import torch
from drpo_lightning.functional import linear_token_logprobs

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

for vocab in (1000, 8192, 65536):
    hidden, weight = torch.randn(1024, 4).requires_grad_(), torch.randn(vocab, 4).requires_grad_()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    linear_token_logprobs(hidden, weight, torch.zeros(1024, dtype=torch.long), chunk_bytes=2**24).sum().backward()
    print(peak() - before)
"""


def test_memory_does_not_grow_with_the_vocabulary():
    command = [sys.executable, "-c", MEMORY_OF_A_CALL]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    _, small, large = map(float, output.split())  # MiB of logits in all: 4 to warm up, 32 and 256
    chunk, gradient_of_weight = 16, 1
    assert 0.9 * chunk < small < large < small + gradient_of_weight + 4
    assert large < 1.5 * chunk
