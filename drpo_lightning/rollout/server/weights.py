"""Weights on their way to vLLM servers: in buckets, in the body of a request or by NCCL."""

import base64
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

HTTP_BACKEND = "drpo_http"
"""vLLM's name of a transfer in the body of the request, which `worker` adds to vLLM."""
NCCL_BACKEND = "nccl"
BUCKET_BYTES = 64 * 2**20
"""Weights travel in buckets of at most this size; a larger tensor has a bucket of its own."""

Bucket = list[tuple[str, Tensor]]


def buckets(weights: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[Bucket]:
    """Collects copies of tensors.

    Args:
        weights: name and tensor; a tensor is valid until the next one is asked for.
        device: where the copies are.
    """
    bucket: Bucket = []
    used = 0
    for name, tensor in weights:
        if bucket and used + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, used = [], 0
        bucket.append((name, tensor.detach().to(device, copy=True).contiguous()))
        used += tensor.nbytes
        del tensor  # it may be a gathered one, and the next is gathered before this name is bound again
    if bucket:
        yield bucket


def announcement(bucket: Bucket) -> dict[str, Any]:
    """What vLLM has to know of a bucket: names, types and shapes."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def update_message(bucket: Bucket, *, with_content: bool) -> bytes:
    """The body of `/update_weights`.

    Args:
        bucket: what is sent.
        with_content: whether the tensors go with it, or by another way.
    """
    message = json.dumps({"update_info": announcement(bucket)}).encode()
    if not with_content:
        return message
    parts = [tensor.cpu().reshape(-1).view(torch.uint8) for _, tensor in bucket]
    data = base64.b64encode(torch.cat(parts).numpy().data)
    return message[:-2] + b', "data": "' + data + b'"}}'  # nothing in it is to be escaped, which JSON would look for


def unpacked(
    names: list[str], dtype_names: list[str], shapes: list[list[int]], data: str
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a bucket that has come in the body of a request.

    Args:
        names: of the tensors.
        dtype_names: their types, as `float32`.
        shapes: their shapes.
        data: their bytes, one after the other, in base64.

    Raises:
        ValueError: if there are not as many bytes as the shapes say.
    """
    content = torch.frombuffer(bytearray(base64.b64decode(data, validate=True)), dtype=torch.uint8)
    dtypes = [getattr(torch, name) for name in dtype_names]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    if sum(sizes) != len(content):
        raise ValueError(f"a bucket of {len(content)} bytes for tensors of {sum(sizes)}")
    for name, dtype, shape, part in zip(names, dtypes, shapes, torch.split(content, sizes), strict=True):
        # A copy, since an item of this type may not start where the last tensor ended.
        yield name, part.clone().view(dtype).view(shape)
