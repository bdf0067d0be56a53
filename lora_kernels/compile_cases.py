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
            others; a tuple of them where the argument is a tuple.
        constexprs: value per constexpr argument, a tuple of values for a tuple of them.
        divisible: runtime arguments that are multiples of 16, as aligned tensors give; of a tuple
            all that are not constexpr.
    """

    name: str
    kernel: Any
    signature: dict[str, str | tuple[str, ...]]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = field(default=())

    def source(self) -> Any:
        """The case as `triton.compile` takes it."""
        from triton.compiler import ASTSource

        positions = {name: i for i, name in enumerate(self.kernel.arg_names)}
        constexprs: dict[tuple[int, ...], Any] = {}
        for name, value in self.constexprs.items():
            parts = enumerate(value) if isinstance(self.signature[name], tuple) else [(None, value)]
            for i, part in parts:
                constexprs[_path(positions[name], i)] = part
        attributes = {}
        for name in self.divisible:
            kind = self.signature[name]
            kinds = list(enumerate(kind)) if isinstance(kind, tuple) else [(None, kind)]
            for i, part in kinds:
                if part != "constexpr":
                    attributes[_path(positions[name], i)] = [["tt.divisibility", 16]]
        signature = {name: self.signature[name] for name in self.kernel.arg_names}
        return ASTSource(self.kernel, signature, constexprs, attributes)


def _path(position: int, index: int | None) -> tuple[int, ...]:
    return (position,) if index is None else (position, index)
