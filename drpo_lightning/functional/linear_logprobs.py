"""Logprobs and entropies under a linear head over a vocabulary, without the logits of all tokens and ids at a time."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

COLUMN_MULTIPLE = 128
"""Chunks of a vocabulary start at multiples of it, which the matrix products of GPUs are fastest at."""


def linear_token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "tokens ..."],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = 2**28,
    compiled: bool = False,
) -> Float[Tensor, "tokens ..."]:
    """`log softmax((W h + b) / T)[target]` of each token, one chunk of the vocabulary at a time.

    The forward pass keeps the log of each token's normaliser; the backward pass computes the logits again, of those
    tokens alone whose gradient is not 0: masked tokens and those without an advantage cost nothing there. The
    gradient of the weight is written once and nothing is added up in half precision.

    The matrix products take their factors as autocast would; half-precision factors give float32 logits, which are
    divided by the temperature and normalised as such. Memory beside the gradients: `chunk_bytes` of logits, and half of
    that again where factors are of half precision, whatever the vocabulary.

    Args:
        hidden: last hidden states h, one row per predicted token.
        weight: the head's weight W.
        targets: token ids whose logprob is asked, one or several per token.
        bias: the head's bias b, if it has one.
        temperature: sampling temperature T.
        chunk_bytes: logits that exist at a time, in bytes; at least 128 ids of all tokens.
        compiled: makes one kernel each of what is between the matrix products, by `torch.compile`, if one logprob is
            asked per token.

    Returns:
        Logprobs in nats, float32 (float64 if the hidden states are); NaN for an id that the vocabulary has not.

    Raises:
        RuntimeError: in a backward pass with `create_graph`: there is no second derivative.
    """
    columns = targets if targets.ndim == 2 else targets[:, None]
    settings = (temperature, chunk_bytes, factor_precision(hidden))
    logprobs = _LinearLogprobs.apply(hidden, weight, bias, columns, settings, compiled and columns.shape[1] == 1)  # type: ignore[no-untyped-call]
    return logprobs.view(targets.shape)  # type: ignore[no-any-return]


@torch.no_grad()
def linear_token_entropies(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = 2**28,
) -> Float[Tensor, " tokens"]:
    """Entropy of `softmax((W h + b) / T)` at each token, in nats, without a gradient.

    Args: see `linear_token_logprobs`.
    """
    precision = factor_precision(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        chunks = _Chunks(hidden, weight, bias, temperature, chunk_bytes, precision)
        top, total = chunks.no_normaliser()
        moment = torch.zeros_like(total)  # sum of w log w, where w = exp(logit - largest)
        for _, _, logits in chunks:
            new_top = torch.maximum(top, logits.amax(1))
            shrink = (top - new_top).exp()
            weights = logits.sub_(new_top[:, None]).exp_()
            moment = (moment + total * (top - new_top)) * shrink - torch.special.entr(weights).sum(1)
            total = total * shrink + weights.sum(1)
            top = new_top
        return total.log() - moment / total


def factor_precision(hidden: Tensor) -> torch.dtype:
    """Precision that the factors of a matrix product are rounded to: autocast's, or that of the hidden states."""
    device = hidden.device.type
    is_cast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else hidden.dtype


class _Chunks:
    """The logits of tokens, some ids of the vocabulary at a time; each chunk takes the memory of the one before.

    Iterating yields the ids as a slice, the factors `[ids, hidden]` and the logits `[tokens, ids]` of a chunk; without
    tokens there is nothing to compute, and no chunk.

    Args:
        precision: what the factors are rounded to.
        others: see `linear_token_logprobs`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        chunk_bytes: int,
        precision: torch.dtype,
    ) -> None:
        self.precision = precision
        self.hidden = self.factor(hidden)
        self.weight = weight
        self.bias = bias
        self.temperature = temperature
        self.sum_precision = torch.promote_types(precision, torch.float32)
        num_bytes = self.sum_precision.itemsize * max(1, len(hidden))
        fitting = chunk_bytes // num_bytes // COLUMN_MULTIPLE * COLUMN_MULTIPLE
        self.num_ids = min(len(weight), max(COLUMN_MULTIPLE, fitting))

    def factor(self, tensor: Tensor) -> Tensor:
        """A factor of a matrix product. CUDA alone has products of half precision whose results are float32."""
        rounded = tensor.to(self.precision)
        return rounded if rounded.is_cuda else rounded.to(torch.promote_types(self.precision, torch.float32))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        if not len(self.hidden):
            return
        memory = self.hidden.new_empty(len(self.hidden) * self.num_ids, dtype=self.sum_precision)
        for start in range(0, len(self.weight), self.num_ids):
            ids = slice(start, start + self.num_ids)
            factors = self.factor(self.weight[ids])
            logits = memory[: len(self.hidden) * len(factors)].view(len(self.hidden), len(factors))
            _multiply(self.hidden, factors.T, out=logits)
            if self.bias is not None:
                logits.add_(self.bias[ids])
            if self.temperature != 1:
                logits.div_(self.temperature)
            yield ids, factors, logits

    def no_normaliser(self) -> tuple[Tensor, Tensor]:
        """A lower bound of the largest logit, and the sum of `exp(logit - largest)`, of no ids."""
        total = self.hidden.new_zeros(len(self.hidden), dtype=self.sum_precision)
        return torch.full_like(total, torch.finfo(total.dtype).min), total


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: tuple[float, int, torch.dtype],
        compiled: bool,
    ) -> Tensor:
        ctx.settings, ctx.compiled = settings, compiled
        extended = _compiled(_extended) if compiled else _extended_
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = _Chunks(hidden, weight, bias, *ctx.settings)
            top, total = chunks.no_normaliser()
            target_logits = torch.full(targets.shape, torch.nan, dtype=total.dtype, device=total.device)
            for ids, _, logits in chunks:
                index, is_here = _within(targets, ids)
                target_logits = torch.where(is_here, logits.gather(1, index), target_logits)
                top, total = extended(logits, top, total)
        normaliser = top + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        return target_logits - normaliser[:, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        if torch.is_grad_enabled():
            raise RuntimeError("the gradient of `linear_token_logprobs` cannot be differentiated again")
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        tokens = grad.ne(0).any(1).nonzero()[:, 0]
        grad, targets, normaliser = grad[tokens], targets[tokens], normaliser[tokens, None]
        with torch.autocast(hidden.device.type, enabled=False):
            chunks = _Chunks(hidden[tokens], weight, bias, *ctx.settings)
            sums = chunks.hidden.new_zeros(chunks.hidden.shape, dtype=chunks.sum_precision)
            grad = grad / chunks.temperature
            grad_sum = grad.sum(1, keepdim=True)
            logit_gradient = _compiled(_logit_gradient) if ctx.compiled else _logit_gradient_
            for ids, factors, logits in chunks:
                index, is_here = _within(targets, ids)
                grad_logits = logit_gradient(logits, normaliser, grad_sum, index, grad * is_here, factors.dtype)
                if grad_bias is not None:
                    grad_bias[ids] = grad_logits.sum(0, dtype=sums.dtype)
                if grad_weight is not None:
                    _multiply(grad_logits.T, chunks.hidden, out=grad_weight[ids])
                if grad_hidden is not None:
                    _add_product(sums, grad_logits, factors)
        if grad_hidden is not None:
            grad_hidden[tokens] = sums.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _within(targets: Tensor, ids: slice) -> tuple[Tensor, Tensor]:
    """Columns of target ids in a chunk, and whether they are in it; the column of one that is not is any."""
    index = targets - ids.start
    is_here = (index >= 0) & (targets < ids.stop)
    return index.where(is_here, 0), is_here


def _extended_(logits: Tensor, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Largest logit and sum of `exp(logit - largest)`, a chunk taken in whose memory is overwritten."""
    new_top = torch.maximum(top, logits.amax(1))
    return new_top, total * (top - new_top).exp() + logits.sub_(new_top[:, None]).exp_().sum(1)


def _extended(logits: Tensor, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """`_extended_` for the compiler, which keeps nothing between."""
    new_top = torch.maximum(top, logits.amax(1))
    return new_top, total * (top - new_top).exp() + (logits - new_top[:, None]).exp().sum(1)


def _logit_gradient_(
    logits: Tensor, normaliser: Tensor, grad_sum: Tensor, index: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """`grad (1[id = target] - p)`, summed over the targets of a token; the memory of the logits is overwritten."""
    logits.sub_(normaliser).exp_().mul_(-grad_sum)
    return logits.scatter_add_(1, index, grad).to(dtype)


def _logit_gradient(
    logits: Tensor, normaliser: Tensor, grad_sum: Tensor, index: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """`_logit_gradient_` for the compiler, of one target per token."""
    of_others = -grad_sum * (logits - normaliser).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == index
    return torch.where(is_target, of_others + grad, of_others).to(dtype)


_COMPILED: dict[Callable[..., Any], Callable[..., Any]] = {}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for tensors of any size, once in a process."""
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function, dynamic=True)
    return _COMPILED[function]


def _multiply(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Writes a matrix product, added up in float32 at least, in the precision of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.dtype.itemsize < out.dtype.itemsize:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a matrix product in the precision of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
