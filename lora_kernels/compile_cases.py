"""What a kernel needs to be compiled without a GPU and without tensors."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration, as `triton.compile` takes it.

    Attributes:
        name: shown in reports.
        kernel: the `triton.jit` function.
        signature: Triton type per runtime argument ("*bf16", "i32", "fp32"), "constexpr" for the
            others.
        constexprs: value per constexpr argument.
        divisible: runtime arguments that are multiples of 16, as aligned tensors give.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = field(default=())
