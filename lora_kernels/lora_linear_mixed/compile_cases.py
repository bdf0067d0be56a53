"""The mixed batch's kernels in every configuration that a plan can choose, compiled without a GPU.

Every configuration is compiled as it usually runs, and of those that differ in the rank alone one
as it runs at its heaviest: ragged ends, ranks that 16 does not divide, a bias, dropout and, of 16
bits, 64-bit offsets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton.language as tl

from lora_kernels.compile_cases import CompileCase
from lora_kernels.lora_linear.tables import PassConfig, TileConfig
from lora_kernels.lora_linear_mixed.plan import plan, plan_tiles
from lora_kernels.lora_linear_mixed.triton_backward import (
    REDUCE_COLUMNS,
    reduce_kernel,
    segments_kernel,
)
from lora_kernels.lora_linear_mixed.triton_forward import expand_kernel, shrink_kernel

Config = TileConfig | PassConfig

# S and y of the forward pass, P and dx of the backward pass, the gradients of the adapters.
KERNELS = {
    "S": shrink_kernel,
    "P": shrink_kernel,
    "y": expand_kernel,
    "dx": expand_kernel,
    "segments": segments_kernel,
    "reduce": reduce_kernel,
}
READS_LORA_B = ("P", "y")
WITH_DROPOUT = ("S", "dx", "segments")
# Of the arguments that are not pointers to the working dtype, those that are pointers.
POINTERS = {
    "order_ptr": "*i32", "sorted_adapters_ptr": "*i32", "starts_ptr": "*i32",
    "first_r_ptr": "*i32", "thresholds_ptr": "*i32", "seed_ptr": "*i64",
    "scalings_ptr": "*fp32", "inverse_keeps_ptr": "*fp32", "partial_ptr": "*fp32",
    "gradient_ptr": "*fp32",
}  # fmt: skip
CHUNK = 512
# Where the base product is the library's.
ADDING = plan_tiles(8192, 4096, 4096, 64, torch.bfloat16, False, True)[0]


@dataclass(frozen=True)
class Variant:
    """A launch, as far as the compiler sees it.

    Attributes:
        aligned: the tiles and 16 divide the sizes, and 16 divides the ranks.
        base: the kernel makes the base product, else it adds to a library's.
    """

    label: str = ""
    dtype: str = "bf16"
    precision: str = "ieee"
    aligned: bool = True
    dropout: bool = False
    bias: bool = False
    base: bool = True
    int64: bool = False


USUAL = Variant()


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """The distinct cases of the plans for `arch` ("sm_90")."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for part, config in configurations(arch, bf16, 4096):
        yield kernel_case(part, config, USUAL)
    for part, config in (("y", ADDING), ("dx", ADDING), ("dx", replace(ADDING, block_r=16))):
        yield kernel_case(part, config, Variant("added", bias=True, base=False))
    for part, config in configurations(arch, bf16, 4096, dropout=True):
        if part in WITH_DROPOUT:
            yield kernel_case(part, config, Variant("dropout", dropout=True))
    for dtype, dropout in product((bf16, fp32), (False, True)):
        name = "bf16" if dtype == bf16 else "fp32"
        heavy = Variant(
            "heavy", name, aligned=False, dropout=dropout, bias=True, int64=dtype == bf16
        )
        for part, config in configurations(arch, dtype, 4095, dropout):
            if config.block_r == 16 and (not dropout or part in WITH_DROPOUT):
                yield kernel_case(part, config, heavy)
    for part, config in configurations(arch, fp32, 4096):
        yield kernel_case(part, config, Variant(dtype="fp32"))
        # AMD's compiler knows no tf32 on some of its architectures: float32 stays what it is.
        if part in ("y", "dx") and arch.startswith("sm_"):
            yield kernel_case(part, config, Variant("tf32", "fp32", "tf32"))


def configurations(
    arch: str, dtype: torch.dtype, size: int, dropout: bool = False
) -> list[tuple[str, Config]]:
    """The distinct parts and configurations of all plans for sizes of one kind."""
    found: dict[tuple[str, Config], None] = {}
    for m, n, r in product((1, 64, 512, 8192, 32768), (256, size), (16, 64)):
        chosen = plan(m, n, size, (r, r), dtype, arch, dropout)
        shrink = replace(chosen.shrink, chunk=CHUNK)
        segments = replace(chosen.segments, chunk=CHUNK)
        reduce = PassConfig(16, REDUCE_COLUMNS, segments.block_r, CHUNK, 4, 3)
        parts: list[tuple[str, Config]] = [
            ("S", shrink), ("P", shrink), ("y", chosen.expand), ("dx", chosen.dx),
            ("segments", segments), ("reduce", reduce),
        ]  # fmt: skip
        found |= dict.fromkeys(parts)
    return list(found)


def kernel_case(part: str, config: Config, variant: Variant) -> CompileCase:
    """One kernel on contiguous tensors, whose rows and columns have strides of 1 and more."""
    kernel = KERNELS[part]
    dropout = variant.dropout and part in WITH_DROPOUT
    values: dict[str, Any] = {
        "TRANSPOSED": part in READS_LORA_B, "DROPOUT": dropout, "ALIGNED_R": variant.aligned,
        "EVEN_C": variant.aligned, "EVEN_O": variant.aligned, "BLOCK_R": config.block_r,
        "ACC": tl.float32, "PRECISION": variant.precision, "INT64": variant.int64,
        "CHUNK_M": CHUNK, "stride_zc": 1, ("stride_wc" if part == "y" else "stride_wo"): 1,
    }  # fmt: skip
    if isinstance(config, TileConfig):
        values |= {
            "BLOCK_M": config.block_m, "BLOCK_O": config.block_n, "BLOCK_C": config.block_k,
            "GROUP_M": config.group_m,
        }  # fmt: skip
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    else:
        values |= {"BLOCK_M": config.block_rows, "BLOCK_C": config.block_columns}
        tile = f"{config.block_rows}x{config.block_columns}"
    if not dropout:
        values |= {"seed_ptr": None, "thresholds_ptr": None, "inverse_keeps_ptr": None}
    if not (variant.bias and part == "y"):
        values |= {"bias_ptr": None}
    if not variant.base:
        values |= {"weight_ptr": None}
    values = {name: value for name, value in values.items() if name in kernel.arg_names}
    signature: dict[str, str | tuple[str, ...]] = {}
    divisible = []
    for argument in kernel.arg_names:
        kind = "constexpr"
        if argument not in values:
            pointer = argument.endswith("_ptr")
            kind = POINTERS.get(argument, "*" + variant.dtype) if pointer else "i32"
            if pointer or (variant.aligned and argument not in ("M", "COUNT")):
                divisible.append(argument)
        signature[argument] = kind
    label = f"{tile} r{config.block_r} w{config.num_warps} s{config.num_stages}"
    words = ["lora_linear_mixed", part, variant.dtype, label, variant.label, "dropout" * dropout]
    return CompileCase(
        " ".join(dict.fromkeys(filter(None, words))), kernel, signature, values,
        config.num_warps, config.num_stages, tuple(divisible),
    )  # fmt: skip
