"""The Triton kernels in every configuration that a plan can choose, to compile without a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton.language as tl

from lora_kernels.compile_cases import CompileCase
from lora_kernels.lora_linear.plan import Plan, plan
from lora_kernels.lora_linear.tables import DecodeConfig, PassConfig, TileConfig
from lora_kernels.lora_linear.triton_backward import (
    d_a_kernel,
    dx_kernel,
    dy_b_kernel,
    reduce_p_kernel,
)
from lora_kernels.lora_linear.triton_decode import decode_kernel
from lora_kernels.lora_linear.triton_forward import expand_kernel, one_pass_kernel, shrink_kernel

# float16 compiles as bfloat16 does.
DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TOKENS = (1, 64, 8192)
# Outputs of one projection, or of a group, and inputs: sizes that the tiles divide, that 16
# divides, and that neither does.
SHAPES = (((512,), 4096), ((4096, 1024, 1024), 4096), ((592,), 4112), ((1001,), 4096))
RANKS = (16, 32, 64, 256)
Config = TileConfig | PassConfig | DecodeConfig


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """The distinct cases of the plans for `arch` ("sm_90"), and one of each kernel with options.

    Every tile, rank and alignment in bfloat16; float32, dropout and groups in what each adds.
    """
    single, group, _, odd = SHAPES
    selections = (
        (torch.bfloat16, TOKENS, SHAPES, RANKS, False),
        (torch.bfloat16, TOKENS, (single, odd), (16, 64), True),
        (torch.bfloat16, TOKENS[-1:], (group,), (16,), True),
        (torch.float32, TOKENS, (single, odd), (16, 64), False),
        (torch.float32, TOKENS[-1:], (single,), (16, 64), True),
    )
    seen = set()
    for dtype, tokens, shapes, ranks, dropout in selections:
        for m, (n, k), r in product(tokens, shapes, ranks):
            chosen = plan(m, n, k, (r,) * len(n), dtype, arch, dropout)
            for case in _cases(chosen, m, n, k, r, dtype, dropout):
                if case.name not in seen:
                    seen.add(case.name)
                    yield case
    yield from _with_options(arch)


def _with_options(arch: str) -> Iterator[CompileCase]:
    """The arguments that the cases above leave out, in one configuration of each kernel: bias and
    its gradient, scaling by tensor, 64-bit offsets."""
    for m, r in ((1, 16), (8192, 16), (8192, 256)):
        n, k = (512, 256), 4096
        chosen = plan(m, n, k, (r, r), torch.bfloat16, arch, False)
        for case in _cases(chosen, m, n, k, r, torch.bfloat16, False):
            changed: dict[str, Any] = {
                "INT64": True, "SCALING_IS_TENSOR": True, "biases": ("*bf16",) * 2,
                "scalings": ("*fp32",) * 2, "dbias_ptr": "*fp32",
            }  # fmt: skip
            changed = {k: v for k, v in changed.items() if k in case.kernel.arg_names}
            types = {k: v for k, v in changed.items() if not isinstance(v, bool)}
            constexprs = {k: v for k, v in case.constexprs.items() if k not in types}
            flags = {k: v for k, v in changed.items() if k not in types}
            yield replace(
                case, name=f"{case.name} with options", signature={**case.signature, **types},
                constexprs={**constexprs, **flags},
            )  # fmt: skip


def _cases(
    chosen: Plan, m: int, n: tuple[int, ...], k: int, r: int, dtype: torch.dtype, dropout: bool
) -> Iterator[CompileCase]:
    assert chosen.forward and chosen.shrink and chosen.dx and chosen.dy_b and chosen.d_a
    count = len(n)

    def case(kernel, name: str, config: Config, constexprs: dict[str, Any]) -> CompileCase:
        return _case(kernel, name, config, constexprs, m, n, k, r, dtype)

    scaling: dict[str, Any] = {"SCALING_IS_TENSOR": False}
    drops: dict[str, Any] = {"DROPOUT": dropout}
    suffix = " dropout" if dropout else ""
    one = () if dropout else (count,)
    if chosen.method == "one_pass":
        yield case(one_pass_kernel, "one_pass", chosen.forward, scaling)
        if chosen.decode is not None:
            yield case(
                decode_kernel, "decode", chosen.decode, scaling | {"SPLITS": chosen.decode.splits}
            )
    else:
        # With dropout each projection's S is a launch of its own.
        stacked = (r,) * count if one else (r,)
        yield case(
            shrink_kernel, "shrink" + suffix, chosen.shrink, scaling | drops | {"R": stacked}
        )
        yield case(expand_kernel, "split", chosen.forward, {})
    yield case(dx_kernel, "dx" + suffix, chosen.dx, drops)
    yield case(dy_b_kernel, "dy_b", chosen.dy_b, {"dbias_ptr": None})
    yield case(reduce_p_kernel, "reduce_p", PassConfig(32, 16, 16, 32, 4, 3), scaling)
    yield case(d_a_kernel, "d_a" + suffix, chosen.d_a, drops)


def _blocks(kernel, config: Config, n: tuple[int, ...], k: int) -> dict[str, Any]:
    """The constexprs that a launch takes from the configuration and the sizes."""
    values: dict[str, Any] = {"BLOCK_R": config.block_r}
    if isinstance(config, TileConfig):
        columns, depth = config.block_n, config.block_k
        if kernel is dx_kernel:
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
        values |= {"BLOCK_M": 16, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    depth = values["BLOCK_K"] * (config.splits if isinstance(config, DecodeConfig) else 1)
    if "BLOCK_N" in values:
        values["EVEN_N"] = all(size % values["BLOCK_N"] == 0 for size in n)
    values["EVEN_K"] = k % depth == 0
    return {name: value for name, value in values.items() if name in kernel.arg_names}


def _case(
    kernel,
    name: str,
    config: Config,
    constexprs: dict[str, Any],
    m: int,
    n: tuple[int, ...],
    k: int,
    r: int,
    dtype: torch.dtype,
) -> CompileCase:
    """One kernel on contiguous tensors; sizes and strides of 16's multiples are marked as such."""
    count, pointer = len(n), DTYPES[dtype]
    ranks = constexprs.get("R", (r,) * count)
    tuples = {
        "weights": pointer, "lora_bs": pointer, "ys": pointer, "dys": pointer, "scalings": "fp32",
        "first_r": "i32", "first_n": "i32", "first_block": "i32", "last_block": "i32",
        "stride_wn": "i32", "stride_dym": "i32",
    }  # fmt: skip
    signature: dict[str, Any] = {}
    divisible = []
    values: dict[str, Any] = {
        "ACC": tl.float32, "PRECISION": "tf32" if dtype == torch.float32 else "ieee",
        "INT64": False, "biases": None, **_blocks(kernel, config, n, k),
        **{name: value for name, value in constexprs.items() if name != "R"},
    }  # fmt: skip
    if values.get("DROPOUT") is False:
        values |= {"seed_ptr": None, "seeds_ptr": None}
    # Strides of 1 are compiled in, as a launch does it.
    of_tuples = kernel is dx_kernel
    values |= {"stride_xk": 1, "stride_wk": 1, "stride_dyn": 1}
    if of_tuples:
        values |= {"stride_wk": (1,) * count, "stride_dyn": (1,) * count}
    if name == "decode" and config.splits == 1:  # type: ignore[union-attr]
        values |= {"partial_ptr": None, "arrived_ptr": None}
    values = {key: value for key, value in values.items() if key in kernel.arg_names}
    stacked = r * count
    sizes = {
        "M": m, "K": k, "R": r, "R_MAX": r, "R_ALL": stacked, "N_ALL": sum(n),
        "stride_xm": k, "stride_sm": stacked, "stride_pm": stacked,
    }  # fmt: skip
    sizes_n = all(size % 16 == 0 for size in n)
    sizes_k = k % 16 == 0
    for argument in kernel.arg_names:
        if argument in values:
            kind: Any = "constexpr"
            if isinstance(values[argument], tuple):
                kind = ("constexpr",) * count
        elif argument == "R" and kernel is not d_a_kernel:
            kind = ("i32",) * len(ranks)
            if r % 16 == 0:
                divisible.append(argument)
        elif argument == "N":
            kind = ("i32",) * count
            if sizes_n:
                divisible.append(argument)
        elif argument in tuples:
            repeats = len(ranks) if argument == "scalings" else count
            kind = (tuples[argument],) * repeats
            aligned = {"stride_dym": sizes_n, "stride_wn": sizes_k, "first_r": r % 16 == 0}
            if kind[0].startswith("*") or aligned.get(argument):
                divisible.append(argument)
        elif argument in ("seed_ptr", "seeds_ptr"):
            kind = "*i64"
        elif argument == "arrived_ptr":
            kind = "*i32"
        elif argument in ("partial_ptr", "db_ptr", "da_ptr", "dbias_ptr") or (
            argument == "p_ptr" and kernel is dy_b_kernel
        ):
            kind = "*fp32"
            divisible.append(argument)
        elif argument.endswith("_ptr"):
            kind = pointer
            divisible.append(argument)
        else:
            kind = "fp32" if argument == "inverse_keep" else "i32"
            size = sizes.get(argument)
            if size is not None and size % 16 == 0:
                divisible.append(argument)
        signature[argument] = kind
    ragged = "" if sizes_n and sizes_k else " odd"
    if not ragged and not all(values.get(even, True) for even in ("EVEN_N", "EVEN_K")):
        ragged = " ragged"
    groups = [len(kind) for kind in signature.values() if isinstance(kind, tuple)]
    group = f" x{max(groups)}" if max(groups, default=1) > 1 else ""
    return CompileCase(
        f"lora_linear {name}{group} {pointer[1:]} {_label(config)}{ragged}", kernel, signature,
        values, config.num_warps, config.num_stages, tuple(divisible),
    )  # fmt: skip


def _label(config: Config) -> str:
    if isinstance(config, TileConfig):
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    elif isinstance(config, PassConfig):
        tile = f"{config.block_rows}x{config.block_columns}"
    else:
        tile = f"16x{config.block_n}x{config.block_k} k{config.splits}"
    return f"{tile} r{config.block_r} w{config.num_warps} s{config.num_stages}"
