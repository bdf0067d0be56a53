"""Which rows of a batch belong to which adapter, as the kernels and the library GEMMs take it.

    row_adapters[M]      the adapter of each row, -1 where the base alone runs
    order[M]             the rows sorted by adapter, stably: row_adapters[order] ascends
    sorted_adapters[M]   row_adapters[order]
    starts[A + 1]        adapter a has the sorted rows starts[a] .. starts[a + 1] - 1; rows without
                         an adapter come before starts[0]

It is made once for a batch, on its device and without waiting for it, and serves every layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixedRows:
    """The rows of one batch by adapter; all tensors are int32 and on one device."""

    row_adapters: Tensor
    order: Tensor
    sorted_adapters: Tensor
    starts: Tensor

    @classmethod
    def of(cls, row_adapters: Tensor, adapters: int) -> "MixedRows":
        """Sorts the rows.

        Args:
            row_adapters: integers of any shape, one per row: 0 .. adapters - 1, or -1.
            adapters: how many adapters there are.

        Raises:
            TypeError: row_adapters is no integer tensor.
            ValueError: an id is none of these. That is checked on a CPU alone: on another device
                it would wait for the device, and such a row runs the base alone.
        """
        if not isinstance(row_adapters, Tensor):
            raise TypeError(
                "row_adapters: expected a torch.Tensor or MixedRows, "
                f"got {type(row_adapters).__name__}"
            )
        dtype = row_adapters.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise TypeError(f"row_adapters: expected an integer dtype, got {dtype}")
        if adapters < 1:
            raise ValueError(f"adapters: expected at least 1, got {adapters}")
        ids = row_adapters.reshape(-1)
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            least, most = (int(bound) for bound in ids.aminmax())
            if least < -1 or most >= adapters:
                wrong = least if least < -1 else most
                raise ValueError(
                    f"row_adapters: expected -1 (the base alone) to {adapters - 1}, got {wrong}"
                )
        ids = ids.to(torch.int32)
        sorted_adapters, order = torch.sort(ids, stable=True)
        bounds = torch.arange(adapters + 1, dtype=torch.int32, device=ids.device)
        starts = torch.searchsorted(sorted_adapters, bounds, out_int32=True)
        return cls(ids, order.to(torch.int32), sorted_adapters, starts)

    @property
    def adapters(self) -> int:
        return self.starts.shape[0] - 1
