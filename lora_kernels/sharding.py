"""A model that torch's `fully_shard` (FSDP2) has sharded over processes: its tensors, whole.

Outside of a forward or backward pass a sharded parameter is a DTensor: its shape is the whole
tensor's, its memory this process's part. Gathering is collective: what says so below is called in
every process, in the same order. Of a model that is not sharded every tensor is whole already.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor in every process (collective), or the tensor itself.

    A part that is kept in CPU memory beside a GPU is gathered on the GPU, where the processes meet.
    """
    if not _is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    device_type = sharded.device_mesh.device_type
    if sharded.device.type != device_type:
        sharded = sharded.to(device_type)
    return sharded.full_tensor()


def sharded_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A value that every process has whole, sharded as `tensor` is; nothing is sent."""
    if not _is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    target: Any = tensor
    mesh = target.device_mesh
    parts = distribute_tensor(
        value.detach().to(mesh.device_type), mesh, target.placements, src_data_rank=None
    )
    return parts.to(tensor.device)


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter of the model, or all of a part of it, is sharded."""
    return next(_sharded_modules(model), None) is not None or any(
        map(_is_sharded, model.parameters())
    )


def reshard(model: nn.Module) -> None:
    """Frees what a forward pass without a backward pass has left gathered (not collective).

    Until then a parameter is a plain tensor, and what is written into it would be lost.
    """
    for module in _sharded_modules(model):
        module.reshard()


def is_first_process() -> bool:
    """Whether this is rank 0 of all processes, or the only one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0


def refuse_sharded(model: nn.Module, action: str, instead: str) -> None:
    """Raises ValueError where the model is sharded: what cannot be done, and what can."""
    if is_sharded(model):
        raise ValueError(f"model: {action} a model that fully_shard has sharded; {instead}")


def is_sharded_module(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this very module."""
    # Where the module is not imported nothing can be sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if is_sharded_module(module))


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this class and has nothing of its own but what `fully_shard` adds."""
    hooks = (module._forward_pre_hooks, module._forward_hooks)
    own = bool(module._backward_hooks or module._backward_pre_hooks or "forward" in module.__dict__)
    if is_sharded_module(module):
        # Its class is one made of FSDPModule and the module's; one hook gathers, one lets go.
        return type(module).__bases__[-1] is kind and not own and {*map(len, hooks)} == {1}
    return type(module) is kind and not own and not any(hooks)


def call_as(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """forward(x) in the place of the module's own, so that its sharded weight is there, and whole.

    The hooks of `fully_shard` gather a weight when its module is called, and not when it is read.
    """
    if not is_sharded_module(module):
        return forward(x)
    module.forward = forward
    try:
        return module(x)
    finally:
        del module.forward
