"""Metrics whose states are two vectors, one that is added up over ranks and one whose maximum is taken."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class PackedMetric(Metric):
    """Base of metrics with float64 sums and maxima, each in one vector: two small collectives to synchronise.

    The states stay float64 when the module is moved to another precision: in bfloat16 a count stops at 256.

    Args:
        num_sums: entries of `sums`.
        num_maxima: entries of `maxima`, which start at minus infinity.
    """

    full_state_update = False
    sums: Tensor
    maxima: Tensor

    def __init__(self, num_sums: int, num_maxima: int = 0) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(num_sums, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("maxima", torch.full((num_maxima,), -torch.inf, dtype=torch.float64), dist_reduce_fx="max")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> "PackedMetric":  # noqa: ANN401
        """Follows the module to another device, not to another precision."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, device=tensor.device)).device)

        return super()._apply(move, exclude_state)  # type: ignore[return-value]
