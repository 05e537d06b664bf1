"""Time and memory of a head's logprobs, forward and backward, by backend.

    python benchmarks/head.py
    python benchmarks/head.py --device cuda --precision bfloat16 --tokens 16384 --hidden 2048 --vocabulary 151936

Backends run in turns; the ratios are to the first. `plain` is log_softmax of all logits; `half` is `chunked` where
every second token has no gradient, as if its group had equal rewards. Memory is the peak above what stands before,
gradients included, whose size is printed. Errors are those against float32 on the same rounded numbers: of the logprobs
the largest in nats, of the gradients the norm of the difference over the norm.
"""

import argparse
import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from drpo_lightning.errors import SettingError
from drpo_lightning.functional.logprobs import target_logprobs
from drpo_lightning.modules.logprob_backends import choose_backend

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
MIB = 2**20


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logprobs from all logits."""
    return target_logprobs(hidden @ weight.T, targets)


def heads(names: list[str], device: torch.device, chunk_mib: int) -> dict[str, Head]:
    """What is measured, by name; says which of the names do not run here."""
    found: dict[str, Head] = {}
    for name in names:
        try:
            setting = "chunked" if name == "half" else name
            found[name] = plain if name == "plain" else choose_backend(setting, device, chunk_mib=chunk_mib)  # type: ignore[arg-type]
        except SettingError as error:
            print(f"{name}: {error}")
    return found


def peak_bytes(device: torch.device, *, reset: bool = False) -> int:
    """Highest memory since the last reset, of the GPU's allocator or of the process."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # gives what is free back, which would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def measured(device: torch.device, figures: dict[str, list[float]]) -> Iterator[None]:
    """Adds the seconds and the peak of the block to the figures."""
    before = peak_bytes(device, reset=True)
    started = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    figures["ms"].append(1e3 * (time.perf_counter() - started))
    figures["MiB"].append((peak_bytes(device) - before) / MIB)


def float32_reference(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Logprobs and gradients by autograd in float32, some tokens at a time."""
    hidden, weight = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    logprobs = []
    for tokens in torch.split(torch.arange(len(targets), device=targets.device), 512):
        part = plain(hidden[tokens], weight, targets[tokens])
        (part * upstream[tokens]).sum().backward()  # type: ignore[no-untyped-call]
        logprobs.append(part.detach())
    assert hidden.grad is not None
    assert weight.grad is not None
    return torch.cat(logprobs), hidden.grad, weight.grad


def errors(logprobs: Tensor, tensors: tuple[Tensor, Tensor], reference: tuple[Tensor, ...]) -> list[float]:
    """Of the logprobs, the gradient of the hidden states and that of the weight."""
    found = [float((logprobs.detach() - reference[0]).abs().max())]
    for tensor, expected in zip(tensors, reference[1:], strict=True):
        assert tensor.grad is not None
        found.append(float((tensor.grad.float() - expected).norm() / expected.norm()))
    return found


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16", "mixed"], default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-mib", type=int, default=256)
    names = ["plain", "chunked", "half", "compiled", "linear_cross_entropy", "cut_cross_entropy"]
    parser.add_argument("--backends", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if arguments.precision == "bfloat16" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.hidden, device=device).bfloat16().to(dtype)
    weight = (3 * torch.randn(arguments.vocabulary, arguments.hidden, device=device) / arguments.hidden**0.5).bfloat16()
    weight = weight.to(dtype)
    targets = torch.randint(arguments.vocabulary, (arguments.tokens,), device=device)
    upstream = torch.randn(arguments.tokens, device=device)
    is_odd = torch.arange(arguments.tokens, device=device) % 2
    backends = heads(arguments.backends, device, arguments.chunk_mib)
    figures: dict[str, dict[str, list[float]]] = {name: {"ms": [], "MiB": []} for name in backends}
    for repeat in range(arguments.repeats + 1):
        for name, head in backends.items():
            weights = upstream * is_odd if name == "half" else upstream
            tensors = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            with (
                measured(device, figures[name]),
                torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "mixed"),
            ):
                logprobs = head(*tensors, targets)
                (logprobs * weights).sum().backward()  # type: ignore[no-untyped-call]
            if repeat == 0:  # the first call compiles and imports
                reference = float32_reference(hidden, weight, targets, weights)
                figures[name] = {"ms": [], "MiB": [], "errors": errors(logprobs, tensors, reference)}
                del reference
            del tensors, logprobs
    gradients = (hidden.nbytes + weight.nbytes) / MIB
    print(f"torch {torch.__version__} on {device}, {arguments.precision}, {torch.get_num_threads()} thread(s)")
    print(f"{arguments.tokens} x {arguments.hidden} x {arguments.vocabulary}; gradients take {gradients:.0f} MiB")
    print(f"{'':22}{'median ms':>10}{'min..max':>18}{'ratio':>7}{'peak MiB':>10}{'ratio':>7}   errors: logprob, dh, dW")
    first = next(iter(figures.values()))
    for name, values in figures.items():
        ms, mib = statistics.median(values["ms"]), max(values["MiB"])
        spread = f"{min(values['ms']):.1f}..{max(values['ms']):.1f}"
        ratios = ms / statistics.median(first["ms"]), mib / (max(first["MiB"]) or math.nan)  # pages may be there
        accuracy = "  ".join(f"{error:.1e}" for error in values["errors"])
        print(f"{name:22}{ms:10.1f}{spread:>18}{ratios[0]:7.2f}{mib:10.0f}{ratios[1]:7.2f}   {accuracy}")


if __name__ == "__main__":
    main()
