"""Every kernel configuration that a plan can choose on one architecture, ready to be compiled."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
import triton.language as tl

from lora_kernels.compile_cases import CompileCase
from lora_kernels.lora_linear.plan import PassConfig, TileConfig, plan
from lora_kernels.lora_linear.triton_backward import d_a_kernel, dy_b_kernel
from lora_kernels.lora_linear.triton_forward import one_pass_kernel, shrink_kernel
from lora_kernels.lora_linear.triton_gemm import gemm_tail_kernel

# float16 compiles as bfloat16 does.
DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TOKENS = (1, 64, 8192)
# Outputs and inputs that the tiles divide, that 16 divides, and that neither does; the outputs lie
# on both sides of the one-pass limit.
OUTPUTS = (512, 14336, 592, 30000, 1001)
INPUTS = {512: 4096, 14336: 4096, 592: 4112, 30000: 4112, 1001: 4096}
RANKS = (8, 32, 64, 256)


def _case(
    kernel,
    name: str,
    dtype: torch.dtype,
    sizes: dict[str, int],
    contiguous: str,
    constexprs: dict[str, object],
    config: TileConfig | PassConfig,
    partials: tuple[str, ...] = (),
) -> CompileCase:
    """One kernel on tensors that are contiguous along the strides named in `contiguous`.

    Sizes and the other strides are runtime integers, marked as multiples of 16 where they are.
    """
    values: dict[str, object] = {
        **constexprs,
        **dict.fromkeys(contiguous.split(), 1),
        "ACC": tl.float32,
        "PRECISION": "tf32" if dtype == torch.float32 else "ieee",
        "INT64": False,
    }
    signature: dict[str, str] = {}
    divisible = []
    aligned = all(size % 16 == 0 for key, size in sizes.items() if key in "NK")
    for argument in kernel.arg_names:
        if argument in values:
            signature[argument] = "constexpr"
        elif argument == "seed_ptr":
            signature[argument] = "*i64"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in partials else DTYPES[dtype]
            divisible.append(argument)
        elif argument in sizes:
            signature[argument] = "i32"
            if sizes[argument] % 16 == 0:
                divisible.append(argument)
        elif argument.startswith("stride_"):
            signature[argument] = "i32"
            if aligned:
                divisible.append(argument)
        else:
            signature[argument] = {"threshold": "i32"}.get(argument, "fp32")
    ragged = "" if aligned and all(constexprs.get(e, True) for e in ("EVEN_N", "EVEN_K")) else (
        " ragged" if aligned else " odd"
    )  # fmt: skip
    return CompileCase(
        f"lora_linear {name} {DTYPES[dtype][1:]} {_tile(config)}{ragged}", kernel, signature,
        values, config.num_warps, config.num_stages, tuple(divisible),
    )  # fmt: skip


def _tile(config: TileConfig | PassConfig) -> str:
    if isinstance(config, TileConfig):
        tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    else:
        tile = f"{config.block_rows}x{config.block_columns}"
    return f"{tile} r{config.block_r} w{config.num_warps} s{config.num_stages}"


def _tile_constexprs(config: TileConfig, n: int, k: int) -> dict[str, object]:
    return {
        "EVEN_N": n % config.block_n == 0, "EVEN_K": k % config.block_k == 0,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "BLOCK_R": config.block_r, "GROUP_M": config.group_m,
    }  # fmt: skip


def compile_cases(arch: str) -> Iterator[CompileCase]:
    """The distinct cases of all plans for `arch` ("sm_90"): shapes, ranks, dtypes, dropout."""
    seen = set()
    for dtype, m, n, r, dropout in product(DTYPES, TOKENS, OUTPUTS, RANKS, (False, True)):
        for case in _cases_of_shape(dtype, m, n, INPUTS[n], r, dropout, arch):
            if case.name not in seen:
                seen.add(case.name)
                yield case
    yield from _with_options(arch)


def _with_options(arch: str) -> Iterator[CompileCase]:
    """The arguments that the cases above leave out, in one configuration of each kernel: bias and
    its gradient, scaling by tensor, 64-bit offsets."""
    bias: dict[str, object] = {"bias_ptr": None, "stride_b": 0, "dbias_ptr": None}
    for r in (16, 256):
        for case in _cases_of_shape(torch.bfloat16, 8192, 512, 4096, r, False, arch):
            given = {k: v for k, v in case.constexprs.items() if k not in bias}
            given |= {"INT64": True, "SCALING_IS_TENSOR": True, "stride_dbiasn": 1}
            values = {k: v for k, v in given.items() if k in case.kernel.arg_names}
            types = {"scaling": "*fp32", "dbias_ptr": "*fp32", "bias_ptr": "*bf16"}
            signature = {
                name: "constexpr"
                if name in values
                else types.get(name, "i32" if kind == "constexpr" else kind)
                for name, kind in case.signature.items()
            }
            yield replace(
                case, name=f"{case.name} with options", signature=signature, constexprs=values
            )


def _cases_of_shape(
    dtype: torch.dtype, m: int, n: int, k: int, r: int, dropout: bool, arch: str
) -> Iterator[CompileCase]:
    chosen = plan(m, n, k, r, dtype, arch, dropout)
    assert chosen.forward and chosen.shrink and chosen.dx and chosen.dy_b and chosen.d_a
    sizes = {"M": m, "N": n, "K": k, "R": r}
    no_bias: dict[str, object] = {"bias_ptr": None, "stride_b": 0}
    drops: dict[str, object] = {"DROPOUT": dropout} | ({} if dropout else {"seed_ptr": None})
    suffix = " dropout" if dropout else ""
    if chosen.method == "one_pass":
        yield _case(
            one_pass_kernel, "one_pass", dtype, sizes,
            "stride_xk stride_wk stride_ak stride_br stride_yn stride_sr",
            _tile_constexprs(chosen.forward, n, k) | no_bias | {"SCALING_IS_TENSOR": False},
            chosen.forward,
        )  # fmt: skip
    else:
        yield _case(
            shrink_kernel, "shrink" + suffix, dtype, sizes, "stride_xk stride_ak stride_sr",
            drops | {
                "SCALING_IS_TENSOR": False, "EVEN_K": k % chosen.shrink.block_columns == 0,
                "BLOCK_M": chosen.shrink.block_rows, "BLOCK_K": chosen.shrink.block_columns,
                "BLOCK_R": chosen.shrink.block_r,
            },
            chosen.shrink,
        )  # fmt: skip
        yield _case(
            gemm_tail_kernel, "split", dtype, sizes,
            "stride_lk stride_rk stride_ur stride_vr stride_on",
            _tile_constexprs(chosen.forward, n, k) | no_bias
            | {"DROPOUT": False, "seed_ptr": None},
            chosen.forward,
        )  # fmt: skip
    yield _case(
        gemm_tail_kernel, "dx" + suffix, dtype, {"M": m, "N": k, "K": n, "R": r},
        "stride_lk stride_rn stride_ur stride_vn stride_on",
        _tile_constexprs(chosen.dx, k, n) | no_bias | drops,
        chosen.dx,
    )  # fmt: skip
    yield _case(
        dy_b_kernel, "dy_b", dtype, sizes,
        "stride_dyn stride_br stride_sr stride_pr stride_dbr",
        {
            "dbias_ptr": None, "stride_dbiasc": 0, "stride_dbiasn": 0,
            "SCALING_IS_TENSOR": False, "CHUNK_N": chosen.dy_b.chunk,
            "BLOCK_M": chosen.dy_b.block_rows, "BLOCK_N": chosen.dy_b.block_columns,
            "BLOCK_R": chosen.dy_b.block_r,
        },
        chosen.dy_b, partials=("p_ptr", "db_ptr"),
    )  # fmt: skip
    yield _case(
        d_a_kernel, "d_a" + suffix, dtype, sizes, "stride_pr stride_xk stride_dak",
        drops | {
            "CHUNK_M": chosen.d_a.chunk, "BLOCK_M": chosen.d_a.block_rows,
            "BLOCK_K": chosen.d_a.block_columns, "BLOCK_R": chosen.d_a.block_r,
        },
        chosen.d_a, partials=("da_ptr",),
    )  # fmt: skip
