"""A policy network spread over the ranks by FSDP1 or FSDP2: how it is sharded, filled, read and clipped.

No rank ever holds the whole network: it is built without memory, sharded layer by layer, and filled from rank 0 one
tensor at a time; it is read the same way.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, wrap
from torch.distributed.tensor import DTensor, distribute_tensor

from drpo_lightning.modules.language_model import layers
from drpo_lightning.modules.policy_network import PolicyNetwork

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What wrapped modules put into the names of their parameters."""


def is_sharded(strategy: Strategy) -> bool:
    """True for the strategies that spread the parameters over the ranks."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def shard(network: PolicyNetwork, strategy: Strategy) -> PolicyNetwork:
    """Shards a network layer by layer and gives its parameters memory on the rank's device, without a value.

    Args:
        network: with parameters on the meta device.
        strategy: Lightning's FSDP strategy, which has set up its process group. FSDP1 is called inside
            `configure_model`, where Lightning has its settings at hand.

    Returns:
        The sharded network; under FSDP1 a wrapper around it.
    """
    classes = {type(layer) for layer in layers(network.language_model)}
    materialize = _Materializer(strategy.root_device)
    if isinstance(strategy, ModelParallelStrategy):
        mesh = strategy.device_mesh["data_parallel"]
        for layer in layers(network.language_model):
            fully_shard(layer, mesh=mesh)
        fully_shard(network, mesh=mesh)
        for module in network.modules():
            materialize(module)
        return network
    # Autocast takes care of mixed precision, as it does in every other strategy: parameters and gradients travel in
    # float32. FSDP's own would also round buffers, such as the frequencies of rotary embeddings.
    return wrap(  # type: ignore[return-value]
        network,
        auto_wrap_policy=ModuleWrapPolicy(classes),
        param_init_fn=materialize,
        mixed_precision=None,
    )


class _Materializer:
    """Gives a module's own parameters memory on a device and moves its buffers there; tied parameters stay one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[nn.Parameter, nn.Parameter] = {}

    def __call__(self, module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter not in self._made:
                    empty = torch.empty_like(parameter, device=self.device)
                    self._made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module.register_parameter(name, self._made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(self.device))


@torch.no_grad()
def fill(network: nn.Module, source: Mapping[str, Tensor] | None) -> None:
    """Copies weights from rank 0 into a sharded network, one tensor at a time. Collective.

    Args:
        network: what `shard` returned.
        source: on rank 0 the language model's state dict, of any precision; None on the others.
    """
    for name, tensor in _tensors(network, writeback=True):
        if source is not None:
            full = source[name].to(tensor.device, tensor.dtype)
        else:
            full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if isinstance(tensor, DTensor):
            shard_of_source = distribute_tensor(full, tensor.device_mesh, tensor.placements)
            tensor.to_local().copy_(shard_of_source.to_local())
        else:
            torch.distributed.broadcast(full, src=0)
            tensor.copy_(full)


def full_tensors(network: nn.Module, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
    """Yields name and whole value of every tensor of the language model's state dict, gathered one at a time.

    Under FSDP1 one layer is gathered at a time. Tied tensors come under each of their names. Collective: every rank
    iterates to the end; a tensor is valid until the next one is asked for.

    Args:
        network: a policy network, or what `shard` returned.
        wanted: says of a name whether its tensor is yielded; FSDP2 gathers no other.
    """
    for name, tensor in _tensors(network, writeback=False):
        if not wanted(name):
            continue
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _tensors(network: Any, *, writeback: bool) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401
    """Name and tensor of the language model's state dict; under FSDP1 whole ones, which `writeback` lets be changed."""
    if not isinstance(network, FullyShardedDataParallel):
        yield from network.language_model.state_dict().items()
        return
    names = {module: name for name, module in network.named_modules()}
    for unit in FullyShardedDataParallel.fsdp_modules(network):  # the root comes first: it has to be set up first
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback):
            for name, tensor in _own_tensors(unit, names[unit]):
                if (name := clean_name(name)) in network.tensor_shapes:  # not a buffer that is no weight
                    yield name, tensor


def _own_tensors(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of an FSDP1 unit without those of the units inside it."""
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield f"{name}.{key}", tensor
    for key, child in module.named_children():
        if not isinstance(child, FullyShardedDataParallel):
            yield from _own_tensors(child, f"{name}.{key}")


def clean_name(name: str) -> str:
    """A tensor's name in the language model, from its name in a wrapped network."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix(".").removeprefix("language_model.")


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradient(network: nn.Module, max_norm: float = float("inf")) -> float:
    """Scales the gradient down to a norm, over all ranks, and returns the norm that it had. Collective.

    Args:
        network: a policy network, sharded or not, after the backward pass.
        max_norm: largest 2-norm of the gradient; infinity leaves it as it is.
    """
    if isinstance(network, FullyShardedDataParallel):  # the function of the others would see this rank's shards only
        return float(network.clip_grad_norm_(max_norm))
    parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
    if max_norm < float("inf"):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
