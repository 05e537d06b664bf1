"""What computes the logprobs of tokens from the last hidden states: this package, PyTorch or cut-cross-entropy."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from drpo_lightning.errors import SettingError
from drpo_lightning.functional.linear_logprobs import factor_precision, linear_token_logprobs

Backend = Literal["auto", "chunked", "compiled", "linear_cross_entropy", "cut_cross_entropy"]
EXACT = "cce_exact"
"""Of cut-cross-entropy's kernels the one that leaves no gradient out and adds gradients up in float32."""
CUT_CROSS_ENTROPY = "git+https://github.com/apple/ml-cross-entropy.git@d42911f"


@dataclass(frozen=True)
class TokenLogprobs:
    """`log softmax((W h + b) / T)[target]` of tokens by one backend; never holds the logits of all tokens and ids.

    Several targets per token are always `chunked`'s, which alone has them.

    Args:
        backend: `chunked` is `drpo_lightning.functional.linear_token_logprobs`, `compiled` the same with its steps
            between the matrix products compiled, which takes a C compiler and half a minute at the start.

            `linear_cross_entropy` is PyTorch's, of 2.13 and later. It returns its results in the precision of its
            inputs, so they are float32 here: for a CPU, or for training in float32.

            `cut_cross_entropy` is Apple's, for CUDA and half precision, as `cce_exact`. Its default leaves out
            gradients where probabilities are below 2^-12 and adds up the rest in bfloat16. That is relative to 1 and
            not to the gradient that arrives, and the rows of rare tokens get none, which Adam would scale up like any
            other. A temperature other than 1 divides the hidden states before they are rounded.
        reason: why it was chosen, in a few words.
        chunk_bytes: logits that exist at a time; `cut_cross_entropy` holds none.
    """

    backend: Literal["chunked", "compiled", "linear_cross_entropy", "cut_cross_entropy"] = "chunked"
    reason: str = "default"
    chunk_bytes: int = 2**28

    def __call__(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        weight: Float[Tensor, "vocab hidden"],
        targets: Int[Tensor, "tokens ..."],
        *,
        bias: Float[Tensor, " vocab"] | None = None,
        temperature: float = 1.0,
    ) -> Float[Tensor, "tokens ..."]:
        """Logprobs in nats, float32; arguments as of `linear_token_logprobs`."""
        if self.backend in ("chunked", "compiled") or targets.ndim > 1 or len(targets) == 0:
            return linear_token_logprobs(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                chunk_bytes=self.chunk_bytes,
                compiled=self.backend == "compiled",
            )
        if self.backend == "cut_cross_entropy":
            return _cut_cross_entropy(hidden, weight, targets, bias, temperature)
        return self._linear_cross_entropy(hidden, weight, targets, bias, temperature)

    def describe(self) -> str:
        """One line: backend, memory, reason."""
        memory = (
            "no logits" if self.backend == "cut_cross_entropy" else f"{self.chunk_bytes >> 20} MiB of logits at a time"
        )
        return f"{self.backend}, {memory} ({self.reason})"

    def _linear_cross_entropy(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
    ) -> Tensor:
        factors, sums = factor_precision(hidden), torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight = (tensor.to(factors).to(sums) for tensor in (hidden, weight))
        num_tokens = max(1, self.chunk_bytes // (weight.shape[0] * weight.dtype.itemsize))
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=num_tokens, chunking_method=None)
        with torch.autocast(hidden.device.type, enabled=False):
            return -F.linear_cross_entropy(
                _divided(hidden, temperature),
                weight,
                targets,
                linear_bias=None if bias is None else _divided(bias.to(sums), temperature),
                reduction="none",
                options=options,
            )


def _cut_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    bias = None if bias is None else _divided(bias.float(), temperature)
    hidden = _divided(hidden, temperature)
    loss: Tensor = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none", impl=EXACT)
    return -loss


def _divided(tensor: Tensor, temperature: float) -> Tensor:
    return tensor if temperature == 1 else tensor / temperature


def choose_backend(setting: Backend, device: torch.device, *, chunk_mib: int = 256) -> TokenLogprobs:
    """The backend of a setting on a device.

    `auto` is `chunked` on all devices: measured as fast as PyTorch's on a CPU, and the one that spares tokens without
    a gradient the backward pass.

    Raises:
        SettingError: if the backend does not run here.
    """
    if setting == "auto":
        reason = "auto: exact gradients on any device, none computed for tokens without one"
        return TokenLogprobs("chunked", reason, chunk_mib * 2**20)
    if setting in CHECKS:
        CHECKS[setting](device)
    return TokenLogprobs(setting, "set", chunk_mib * 2**20)


def _check_linear_cross_entropy(device: torch.device) -> None:  # noqa: ARG001
    if not hasattr(F, "linear_cross_entropy"):
        raise SettingError(
            f"`model.logprob_backend: linear_cross_entropy` needs PyTorch 2.13 or later, this is {torch.__version__}; "
            "take `chunked`"
        )


def _check_cut_cross_entropy(device: torch.device) -> None:
    name = "`model.logprob_backend: cut_cross_entropy`"
    if device.type != "cuda":
        raise SettingError(f"{name} needs a CUDA device, this is {device.type}; take `chunked`")
    if importlib.util.find_spec("cut_cross_entropy") is None or not _has_exact_kernels():
        raise SettingError(
            f"{name} needs Apple's own version, whose gradients are exact; the release on PyPI has not got them: "
            f"pip install 'cut-cross-entropy @ {CUT_CROSS_ENTROPY}'"
        )


def _has_exact_kernels() -> bool:
    from cut_cross_entropy import LinearCrossEntropyImpl

    return EXACT.upper() in LinearCrossEntropyImpl.__members__


CHECKS: dict[str, Callable[[torch.device], Any]] = {
    "linear_cross_entropy": _check_linear_cross_entropy,
    "cut_cross_entropy": _check_cut_cross_entropy,
}
