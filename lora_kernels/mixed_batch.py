"""Batches whose rows use different adapters: PEFT's `adapter_names`, in training too.

    adapter_names[B]    for each row of the batch an adapter's name, or "__base__"
    x[B, ..., K]        the input of every layer: B rows of as many tokens each

A layer computes each row with its own adapter, or the base alone where it has none of that name
(`lora_linear_mixed`). Which adapters are active does not matter, but gradients reach only those
that require them: `set_adapter([...])` with all the names comes before a training step. Each
adapter then gets the gradients that its rows alone would give it.

Source: PEFT (peft/tuners/lora/layer.py, `_mixed_batch_forward`; peft/tuners/lora/model.py,
`_enable_peft_forward_hooks`), which refuses to train so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels.layers import LoraLinear, lora_layers
from lora_kernels.lora_linear_mixed.op import lora_linear_mixed
from lora_kernels.lora_linear_mixed.rows import MixedRows
from lora_kernels.saved_modules import saved_modules

BASE = "__base__"


class MixedBatch:
    """The adapter of each row of one batch, and the sorted rows that its layers share.

    `mixed_batch` makes one for a model and checks it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.adapters = tuple(dict.fromkeys(name for name in names if name != BASE))
        self._rows: dict[tuple[tuple[str, ...], int, torch.device], MixedRows] = {}
        self._ids: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}

    def linear(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """The layer's y[B, ..., N], each row by its adapter.

        Raises:
            ValueError: x has another number of rows than there are names.
        """
        if x.dim() < 2 or x.shape[0] != len(self.names):
            raise ValueError(
                f"adapter_names: expected one for each row of the batch {tuple(x.shape[:1])}, "
                f"got {len(self.names)}"
            )
        weight = layer.weight_by_rows
        adapters = tuple(name for name in self.adapters if name in layer.lora_A)
        if layer.disabled or not adapters:
            return F.linear(x, weight, layer.bias)
        y = lora_linear_mixed(
            x,
            weight,
            [layer.lora_A[name] for name in adapters],
            [layer.lora_B[name] for name in adapters],
            [layer.scaling[name] for name in adapters],
            self.rows(adapters, x[0, ..., 0].numel(), x.device),
            layer.bias,
            [layer.lora_dropout[name] if layer.training else 0.0 for name in adapters],
        )
        with_bias = [name for name in adapters if name in layer.lora_bias]
        if not with_bias:
            return y
        # A product, whose gradient adds in a fixed order; indexing's does not on every device.
        biases = torch.stack([layer.lora_bias[name] * layer.scaling[name] for name in with_bias])
        ids = self.ids(tuple(with_bias), x.device)
        mine = F.one_hot(ids + 1, len(with_bias) + 1)[:, 1:].to(biases.dtype)
        added = (mine @ biases).reshape(-1, *[1] * (x.dim() - 2), y.shape[-1])
        return (y + added).to(y.dtype)

    def rows(self, adapters: tuple[str, ...], tokens: int, device: torch.device) -> MixedRows:
        """The rows of x by adapter, for a layer that has these; sorted once for all such layers."""
        key = (adapters, tokens, device)
        if key not in self._rows:
            ids = self.ids(adapters, device).repeat_interleave(tokens)
            self._rows[key] = MixedRows.of(ids, len(adapters))
        return self._rows[key]

    def ids(self, adapters: tuple[str, ...], device: torch.device) -> Tensor:
        """For each row of the batch its adapter's place among these, or -1; copied there once."""
        key = (adapters, device)
        if key not in self._ids:
            numbers = {name: number for number, name in enumerate(adapters)}
            ids = [numbers.get(name, -1) for name in self.names]
            self._ids[key] = torch.tensor(ids, dtype=torch.int64, device=device)
        return self._ids[key]

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """While it is open, every LoraLinear in the module computes this batch."""
        before = [(layer, layer.mixed) for _, layer in lora_layers(module)]
        try:
            for layer, _ in before:
                layer.mixed = self
            yield
        finally:
            for layer, mixed in before:
                layer.mixed = mixed


def mixed_batch(
    model: nn.Module, adapter_names: Sequence[str], batch_size: int | None = None
) -> MixedBatch:
    """Checks the names against a model.

    Args:
        adapter_names: for each row of the batch an adapter's name, or "__base__".
        batch_size: the number of rows, where it is known already.

    Raises:
        TypeError: adapter_names is no list or tuple of strings.
        ValueError: there is another number of names than of rows; no layer has an adapter of a
            name; an adapter is merged, is DoRA's, or has modules of its own (`modules_to_save`).
    """
    if not isinstance(adapter_names, list | tuple) or not all(
        isinstance(name, str) for name in adapter_names
    ):
        raise TypeError(f"adapter_names: expected a list of strings, got {adapter_names!r}")
    if batch_size is not None and len(adapter_names) != batch_size:
        raise ValueError(
            f"adapter_names: expected {batch_size}, one for each row of the batch, "
            f"got {len(adapter_names)}"
        )
    batch = MixedBatch(adapter_names)
    known: dict[str, None] = {}
    for path, layer in lora_layers(model):
        known |= dict.fromkeys(layer.lora_A)
        if layer.merged_adapters:
            raise ValueError(
                f"adapter_names: {layer.merged_adapters} are merged into {path}; unmerge first"
            )
        for name in batch.adapters:
            if name in layer.lora_magnitude_vector:
                raise ValueError(
                    f"adapter_names: {name!r} is a DoRA adapter, which a mixed batch cannot have"
                )
    unknown = [name for name in batch.adapters if name not in known]
    if unknown:
        raise ValueError(
            f"adapter_names: {unknown} not found; the model has {list(known)}, and {BASE!r} is "
            "the base alone"
        )
    for path, module in saved_modules(model):
        owners = [name for name in batch.adapters if name in module.modules_to_save]
        if owners or module.current() is not module.original_module:
            raise ValueError(
                f"adapter_names: {path} is a copy of {owners or [module.active_adapter]} "
                "(modules_to_save), which a mixed batch cannot have"
            )
    return batch


@contextmanager
def mixed_adapters(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """While it is open, every forward pass of the model, any with LoRA layers, is a mixed batch.

    Under activation checkpointing the backward pass runs layers again and belongs inside too.
    (LoraLlama takes `adapter_names` as an argument, and remembers it for backward.)

    Raises:
        TypeError, ValueError: as `mixed_batch`.
    """
    with mixed_batch(model, adapter_names).applied(model):
        yield
