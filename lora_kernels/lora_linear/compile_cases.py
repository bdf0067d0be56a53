"""The Triton kernels in every configuration that a plan can choose, to compile without a GPU.

A compiled kernel depends on its configuration and on the launch: how many projections there are,
whether the tiles divide the sizes and 16 divides them, the dtype, the optional arguments. All
combinations would be thousands. Every configuration is compiled as it usually runs, and of those
that differ in the rank alone one with all that makes it heavier at a time: three projections,
ragged ends, a rank that 16 does not divide, bias and its gradient or, in their place, column
scales, scaling by tensor, and in the largest tiles of each kernel 64-bit offsets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton.language as tl

from lora_kernels.compile_cases import CompileCase
from lora_kernels.lora_linear import triton_dora
from lora_kernels.lora_linear.plan import Plan, plan
from lora_kernels.lora_linear.tables import DecodeConfig, PassConfig, TileConfig
from lora_kernels.lora_linear.triton_backward import (
    d_a_kernel,
    dx_kernel,
    dy_b_kernel,
    reduce_p_kernel,
)
from lora_kernels.lora_linear.triton_decode import decode_kernel
from lora_kernels.lora_linear.triton_descriptor import (
    MAX_PROJECTIONS,
    dx_descriptor_kernel,
    expand_descriptor_kernel,
)
from lora_kernels.lora_linear.triton_forward import expand_kernel, one_pass_kernel, shrink_kernel

Config = TileConfig | PassConfig | DecodeConfig

KERNELS = {
    "one_pass": one_pass_kernel,
    "decode": decode_kernel,
    "shrink": shrink_kernel,
    "split": expand_kernel,
    "dx": dx_kernel,
    "dy_b": dy_b_kernel,
    "reduce_p": reduce_p_kernel,
    "d_a": d_a_kernel,
}
DESCRIPTOR_KERNELS = {"split": expand_descriptor_kernel, "dx": dx_descriptor_kernel}
# Arguments that are tuples over the projections, and their types; "" is the variant's dtype.
TUPLES = {
    "weights": "", "lora_bs": "", "biases": "", "column_scales": "*fp32", "ys": "", "dys": "",
    "scalings": "fp32", "N": "i32", "R": "i32", "first_r": "i32", "first_n": "i32",
    "first_block": "i32", "last_block": "i32", "stride_wn": "i32", "stride_dym": "i32",
}  # fmt: skip
# Pointers to something other than the variant's dtype. `p_ptr` of `dy_b` is one: partial results.
POINTERS = {
    "seed_ptr": "*i64", "seeds_ptr": "*i64", "arrived_ptr": "*i32", "partial_ptr": "*fp32",
    "db_ptr": "*fp32", "da_ptr": "*fp32", "dbias_ptr": "*fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A launch, as far as the compiler sees it.

    Attributes:
        count: projections.
        dtype: Triton's name; float16 compiles as bfloat16 does.
        precision: of float32 products, "ieee" or "tf32".
        even: the tiles divide N and K.
        aligned: 16 divides N and K; then `even` may still be False.
        aligned_rank: 16 divides the ranks.
        options: bias and its gradient, scaling by tensor.
        scales: column scales. The op gives a kernel no bias beside them.
    """

    label: str = ""
    count: int = 1
    dtype: str = "bf16"
    precision: str = "ieee"
    even: bool = True
    aligned: bool = True
    aligned_rank: bool = True
    options: bool = False
    scales: bool = False
    dropout: bool = False
    int64: bool = False


USUAL = Variant()
HEAVY = Variant("heavy", 3, even=False, aligned_rank=False, options=True)
ODD = Variant("odd", 2, even=False, aligned=False, aligned_rank=False)
FLOAT32 = Variant(dtype="fp32")
TF32 = Variant("tf32", 3, "fp32", "tf32", even=False, aligned_rank=False)
# Architectures with the least shared memory: what fits them, fits an unknown one.
MODEST = ("sm_80", "sm_89", "sm_120")
# Rows of a chunk. How many they are changes only how often a loop runs.
CHUNK = 512
WITH_DROPOUT = ("shrink", "dx", "d_a")
GEMMS = ("one_pass", "split", "dx")
FORWARD = ("one_pass", "split", "decode")


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """The distinct cases of the plans for `arch` ("sm_90")."""
    bf16, fp32 = torch.bfloat16, torch.float32
    usual = configurations(arch, bf16)
    if arch in MODEST:
        usual = list(dict.fromkeys([*usual, *configurations("unknown", bf16)]))
    for part, config in usual:
        yield kernel_case(part, config, USUAL)
    heavy = list(heaviest(usual))
    # Tensors of more than 2³¹ elements take the tiles for many rows, the last of each kernel's.
    largest = {(part, getattr(config, "descriptors", False)): config for part, config in heavy}
    for part, config in heavy:
        int64 = largest[part, getattr(config, "descriptors", False)] == config
        label = "heavy int64" if int64 else "heavy"
        variant = replace(HEAVY, label=label, int64=int64)
        yield kernel_case(part, config, variant)
        if part in FORWARD:
            scaled = replace(variant, label=f"{label} scales", options=False, scales=True)
            yield kernel_case(part, config, scaled)
        if isinstance(config, DecodeConfig):
            # One split needs no partial results.
            yield kernel_case(part, replace(config, splits=1), USUAL)
    for part, config in heaviest(configurations(arch, bf16, aligned=False)):
        if part != "reduce_p":
            yield kernel_case(part, config, ODD)
    for part, config in configurations(arch, bf16, dropout=True):
        if part in WITH_DROPOUT:
            yield kernel_case(part, config, replace(USUAL, label="dropout", dropout=True))
    for part, config in heaviest(configurations(arch, bf16, aligned=False, dropout=True)):
        if part in WITH_DROPOUT:
            yield kernel_case(part, config, replace(ODD, label="odd dropout", dropout=True))
    for part, config in heaviest(configurations(arch, fp32)):
        yield kernel_case(part, config, FLOAT32)
        # AMD's compiler knows no tf32 on some of its architectures: float32 stays what it is.
        if part in GEMMS and arch.startswith("sm_"):
            yield kernel_case(part, config, TF32)
    for part, config in heaviest(configurations(arch, fp32, aligned=False)):
        if part not in ("decode", "reduce_p"):
            yield kernel_case(part, config, replace(ODD, dtype="fp32"))
    yield from triton_dora.compile_cases()


def configurations(
    arch: str, dtype: torch.dtype, aligned: bool = True, dropout: bool = False
) -> list[tuple[str, Config]]:
    """The distinct parts and configurations of all plans for sizes of one kind."""
    size = 4096 if aligned else 4095
    found: dict[tuple[str, Config], None] = {}
    for m, n, r in product(
        (1, 16, 64, 512, 2048, 8192, 32768), (256, size, 4 * size), (16, 32, 64, 72, 256)
    ):
        for part in parts(plan(m, n, size, r, dtype, arch, dropout), r):
            found[part] = None
    return list(found)


def parts(chosen: Plan, r: int) -> Iterator[tuple[str, Config]]:
    """The kernels of one plan and their configurations."""
    if chosen.forward is None:
        return
    assert chosen.shrink and chosen.dx and chosen.dy_b and chosen.d_a
    if chosen.method == "one_pass":
        yield "one_pass", chosen.forward
        if chosen.decode is not None:
            # How many splits there are changes only how often a loop runs.
            yield "decode", replace(chosen.decode, splits=2)
    else:
        yield "shrink", replace(chosen.shrink, chunk=CHUNK)
        yield from _with_pointers("split", chosen.forward)
    yield from _with_pointers("dx", chosen.dx)
    yield "dy_b", replace(chosen.dy_b, chunk=CHUNK)
    yield "reduce_p", PassConfig(32, 16, 16 if r <= 16 else 64, 32, 4, 3)
    yield "d_a", replace(chosen.d_a, chunk=CHUNK)


def _with_pointers(part: str, config: TileConfig) -> Iterator[tuple[str, Config]]:
    """The configuration, and the one of tensors that descriptors cannot name."""
    yield part, config
    if config.descriptors:
        yield part, replace(config, descriptors=False)


def heaviest(found: list[tuple[str, Config]]) -> Iterator[tuple[str, Config]]:
    """Of the configurations that differ in the rank alone, the one for ranks of any kind."""
    of_tile: dict[tuple[str, Config], list[Config]] = {}
    for part, config in found:
        of_tile.setdefault((part, replace(config, block_r=1)), []).append(config)
    for (part, _), configs in of_tile.items():
        # The GEMMs' rank-R product takes ranks that 16 does not divide in its narrowest blocks.
        choose = min if part in ("split", "dx") else max
        yield part, choose(configs, key=lambda config: config.block_r)


def kernel_case(part: str, config: Config, variant: Variant) -> CompileCase:
    """One kernel on contiguous tensors; sizes and strides of 16's multiples are marked as such."""
    kernel = KERNELS[part]
    described: dict[str, str] = {}
    # With dropout each projection's S is a launch of its own.
    count = 1 if variant.dropout and part == "shrink" else variant.count
    if isinstance(config, TileConfig) and config.descriptors:
        kernel = DESCRIPTOR_KERNELS[part]
        described = _descriptors(part, config, variant.dtype, count)
    values = _constexprs(part, config, variant, count)
    values = {name: value for name, value in values.items() if name in kernel.arg_names}
    unaligned = set()
    if not variant.aligned:
        unaligned |= {"N", "K", "N_ALL", "stride_xm", "stride_wn", "stride_dym"}
    if not variant.aligned_rank:
        unaligned |= {"R", "R_MAX", "R_ALL", "first_r", "stride_sm", "stride_pm"}
    unaligned |= {"first_n", "first_block", "last_block", "threshold", "inverse_keep"}

    rank_is_stacked = part == "d_a" or (described and part == "dx")
    signature: dict[str, str | tuple[str, ...]] = {}
    divisible = []
    for argument in kernel.arg_names:
        kind: str | tuple[str, ...]
        if argument in values:
            of_tuple = isinstance(values[argument], tuple)
            kind = ("constexpr",) * count if of_tuple else "constexpr"
        elif argument in described:
            kind = described[argument]
        elif argument in TUPLES and not (argument == "R" and rank_is_stacked):
            kind = (TUPLES[argument] or "*" + variant.dtype,) * count
            if argument == "scalings" and variant.options:
                kind = ("*fp32",) * count
        elif argument.endswith("_ptr"):
            kind = POINTERS.get(argument, "*" + variant.dtype)
            if part == "dy_b" and argument == "p_ptr":
                kind = "*fp32"
        else:
            kind = "fp32" if argument == "inverse_keep" else "i32"
        signature[argument] = kind
        scalar = kind[0] if isinstance(kind, tuple) else kind
        if scalar.startswith("*") or (scalar == "i32" and argument not in unaligned):
            divisible.append(argument)
    words = [part, variant.dtype, _label(config), f"x{count}" if count > 1 else "", variant.label]
    return CompileCase(
        " ".join(["lora_linear", *filter(None, words)]), kernel, signature, values,
        config.num_warps, config.num_stages, tuple(divisible),
    )  # fmt: skip


def _constexprs(part: str, config: Config, variant: Variant, count: int) -> dict[str, Any]:
    """What a launch compiles in: the configuration, its flags, strides of 1, absent arguments."""
    values: dict[str, Any] = {
        "ACC": tl.float32, "PRECISION": variant.precision, "INT64": variant.int64,
        "EVEN_N": variant.even, "EVEN_K": variant.even, "DROPOUT": variant.dropout,
        "SCALING_IS_TENSOR": variant.options, "BLOCK_R": config.block_r,
        # Strides of 1.
        "stride_xk": 1, "stride_wk": 1, "stride_dyn": 1,
    }  # fmt: skip
    if part == "dx":
        values |= {"stride_wk": (1,) * count, "stride_dyn": (1,) * count}
    if not variant.options:
        values |= {"biases": None, "dbias_ptr": None}
    if not variant.scales:
        values |= {"column_scales": None}
    if not variant.dropout:
        values |= {"seed_ptr": None, "seeds_ptr": None}
    if isinstance(config, TileConfig):
        columns, depth = config.block_n, config.block_k
        if part == "dx":
            columns, depth = depth, columns
        values |= {
            "BLOCK_M": config.block_m, "BLOCK_N": columns, "BLOCK_K": depth,
            "GROUP_M": config.group_m,
        }  # fmt: skip
    elif isinstance(config, PassConfig):
        values |= {
            "BLOCK_M": config.block_rows, "BLOCK_K": config.block_columns,
            "BLOCK_N": config.block_columns, "CHUNK_M": config.chunk,
        }  # fmt: skip
    else:
        values |= {
            "BLOCK_M": 16, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "SPLITS": config.splits,
        }  # fmt: skip
        if config.splits == 1:
            values |= {"partial_ptr": None, "arrived_ptr": None}
    if isinstance(config, TileConfig) and config.descriptors:
        # As many as a multiprocessor count; it changes nothing but how often a loop runs.
        values |= {"PROGRAMS": 132}
        absent = range(count, MAX_PROJECTIONS)
        values |= {f"{name}_{g}": None for name in ("weight", "y", "dy") for g in absent}
    return values


def _descriptors(part: str, config: TileConfig, dtype: str, count: int) -> dict[str, str]:
    """The types of the descriptor arguments."""

    def described(rows: int, columns: int) -> str:
        return f"tensordesc<{dtype}[{rows}, {columns}]>"

    left = described(config.block_m, config.block_k)
    half = described(config.block_m, config.block_n // 2)
    if part == "split":
        each = {"weight": described(config.block_n, config.block_k), "y": half}
        single = {"x": left}
    else:
        each = {"weight": described(config.block_k, config.block_n), "dy": left}
        single = {"dx": half}
    return single | {f"{name}_{g}": kind for name, kind in each.items() for g in range(count)}


def _label(config: Config) -> str:
    if isinstance(config, TileConfig):
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
        tile += " descriptors" if config.descriptors else ""
    elif isinstance(config, PassConfig):
        tile = f"{config.block_rows}x{config.block_columns}"
    else:
        tile = f"16x{config.block_n}x{config.block_k} k{config.splits}"
    return f"{tile} r{config.block_r} w{config.num_warps} s{config.num_stages}"
