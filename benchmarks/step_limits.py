"""How fast this machine multiplies and copies: python step_limits.py DEVICE PRECISION THREADS; prints JSON."""

import json
import sys
import time
from collections.abc import Callable

import torch

REPEATS = 7


def best_seconds(work: Callable[[], object], device: str) -> float:
    """The shortest of several runs."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Multiplies and copies large matrices, and prints operations and bytes per second."""
    device, precision, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    size = 1024 if device == "cpu" else 8192
    dtype = torch.float32 if precision == "32-true" else torch.bfloat16
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(2**25 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    limits = {
        "matmul_flops_per_second": 2 * size**3 / best_seconds(lambda: left @ right, device),
        "copied_bytes_per_second": source.nbytes / best_seconds(lambda: target.copy_(source), device),
    }
    print(json.dumps(limits))


if __name__ == "__main__":
    main()
