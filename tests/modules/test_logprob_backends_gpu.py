"""Logprobs under a linear head on a CUDA GPU: right to the rounding of bfloat16, in bounded memory."""

import contextlib

import pytest
import torch

from drpo_lightning.errors import SettingError
from drpo_lightning.functional import linear_token_entropies
from drpo_lightning.modules.logprob_backends import TokenLogprobs, choose_backend

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
TOKENS, WIDTH, VOCAB = 777, 256, 5000
MIB = 2**20


@pytest.fixture(params=["chunked", "compiled", "linear_cross_entropy", "cut_cross_entropy"])
def backend(request):
    try:
        return TokenLogprobs(choose_backend(request.param, torch.device("cuda")).backend, chunk_bytes=4 * MIB)
    except SettingError as error:
        pytest.skip(str(error))


def head(dtype, tokens=TOKENS, vocab=VOCAB):
    """A head that is sure of half of the tokens and unsure of the others."""
    generator = torch.Generator("cuda").manual_seed(0)
    sure = torch.arange(tokens, device="cuda") % 2
    hidden = torch.randn(tokens, WIDTH, generator=generator, device="cuda") * (0.5 + 4 * sure)[:, None]
    weight = torch.randn(vocab, WIDTH, generator=generator, device="cuda") / WIDTH**0.5
    likely = (hidden @ weight.T).argmax(1)
    any_id = torch.randint(vocab, (tokens,), generator=generator, device="cuda")
    upstream = torch.randn(tokens, generator=generator, device="cuda") * torch.logspace(-4, 0, tokens, device="cuda")
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
    return leaves, torch.where(sure.bool(), likely, any_id), upstream


def reference(leaves, targets, upstream, temperature, precision):
    """Logprobs and gradients by autograd in float64, of rounded factors."""
    hidden, weight = (leaf.detach().to(precision).double().requires_grad_() for leaf in leaves)
    logprobs = (hidden @ weight.T / temperature).log_softmax(1).gather(1, targets[:, None])[:, 0]
    return logprobs.detach(), torch.autograd.grad((logprobs * upstream).sum(), [hidden, weight])


def relative_error(value, expected):
    """By row, so that rare ids and tokens of small gradient count as much as others."""
    distance = (value.double() - expected).norm(dim=1)
    return float((distance / expected.norm(dim=1).clamp(min=1e-12)).quantile(0.99))


@pytest.mark.parametrize("temperature", [1.0, 2.0])  # dividing by 2 rounds nothing
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_logprobs_and_gradients_are_within_the_rounding_of_bfloat16(backend, precision, temperature):
    factors = torch.float32 if precision == "32-true" else torch.bfloat16
    leaves, targets, upstream = head(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    with torch.autocast("cuda", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext():
        logprobs = backend(*leaves, targets, temperature=temperature)
    (logprobs * upstream).sum().backward()
    expected, grads = reference(leaves, targets, upstream, temperature, factors)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-4, atol=1e-4)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert relative_error(leaf.grad, grad) < 2**-7


def test_several_targets_and_no_tokens(backend):
    (hidden, weight), _, _ = head(torch.bfloat16)
    several = torch.randint(VOCAB, (TOKENS, 5), device="cuda")
    got = backend(hidden, weight, several)
    expected = (hidden.double() @ weight.double().T).log_softmax(1)
    torch.testing.assert_close(got.double(), expected.gather(1, several), rtol=1e-4, atol=1e-4)
    assert backend(hidden[:0], weight, several[:0, 0]).shape == (0,)
    entropies = linear_token_entropies(hidden, weight, chunk_bytes=4 * MIB)
    torch.testing.assert_close(entropies.double(), -(expected * expected.exp()).sum(1), rtol=1e-3, atol=1e-3)


def test_memory_beside_the_gradients_does_not_grow_with_the_vocabulary(backend):
    extra = []
    for vocab in (8192, 65536):
        (hidden, weight), targets, upstream = head(torch.bfloat16, tokens=2048, vocab=vocab)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        (backend(hidden, weight, targets) * upstream).sum().backward()
        extra.append((torch.cuda.max_memory_allocated() - before - hidden.nbytes - weight.nbytes) / MIB)
    if backend.backend in ("chunked", "compiled"):
        assert extra[1] < extra[0] + 4
    # All logits would be 512 MiB; the others may hold the weight and its gradient once more, in float32.
    assert extra[1] < 64 + 3 * 65536 * WIDTH * 4 / MIB
