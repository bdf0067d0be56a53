"""The forward kernel of RMSNorm, with the addition of the residual stream.

    total = x + residual                            rstd = 1 / sqrt(mean(total²) + eps)
    y = weight * round(total rstd)                  round: to x's dtype, as in LlamaRMSNorm

Shapes: x, residual, total and y [M, H], weight [H], rstd [M]; y and total are contiguous. A tile is
BLOCK_M rows by BLOCK_H columns. A row that fits a tile is read once and held in registers; a wider
one is read again, from the cache, once its statistics are known.
"""

import triton
import triton.language as tl


@triton.jit
def load(ptr, offsets_m, offsets_h, stride_m, stride_h, mask, ACC: tl.constexpr):
    return tl.load(ptr + offsets_m * stride_m + offsets_h * stride_h, mask=mask, other=0.0).to(ACC)


@triton.jit
def _load_total(
    x_ptr,
    residual_ptr,
    offsets_m,
    offsets_h,
    stride_xm,
    stride_xh,
    stride_rm,
    stride_rh,
    mask,
    HAS_RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
):
    total = load(x_ptr, offsets_m, offsets_h, stride_xm, stride_xh, mask, ACC)
    if HAS_RESIDUAL:
        total += load(residual_ptr, offsets_m, offsets_h, stride_rm, stride_rh, mask, ACC)
        total = total.to(x_ptr.dtype.element_ty).to(ACC)
    return total


@triton.jit
def _store_outputs(
    total,
    rstd,
    x_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    offsets_m,
    offsets_h,
    stride_wh,
    mask,
    H: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACC: tl.constexpr,
):
    weight = tl.load(weight_ptr + offsets_h * stride_wh, mask=offsets_h < H, other=0.0).to(ACC)
    y = (total * rstd).to(x_ptr.dtype.element_ty).to(ACC) * weight
    offsets = offsets_m * H + offsets_h
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    if HAS_RESIDUAL:
        tl.store(total_ptr + offsets, total.to(total_ptr.dtype.element_ty), mask=mask)


# M changes from call to call; specialising on it would only compile the kernel again.
@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    rows,
    stride_xm,
    stride_xh,
    stride_rm,
    stride_rh,
    stride_wh,
    EPS: tl.constexpr,
    H: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ACC: tl.constexpr,
    INT64: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_H)[None, :]
    if INT64:
        program = program.to(tl.int64)
        columns = columns.to(tl.int64)
    offsets_m = program * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    mask_m = offsets_m < rows

    if BLOCK_H >= H:
        mask = mask_m & (columns < H)
        total = _load_total(
            x_ptr, residual_ptr, offsets_m, columns, stride_xm, stride_xh, stride_rm, stride_rh,
            mask, HAS_RESIDUAL, ACC,
        )  # fmt: skip
        rstd = 1.0 / tl.sqrt(tl.sum(total * total, 1, keep_dims=True) / H + EPS)
        _store_outputs(
            total, rstd, x_ptr, weight_ptr, y_ptr, total_ptr, offsets_m, columns, stride_wh, mask,
            H, HAS_RESIDUAL, ACC,
        )  # fmt: skip
    else:
        squares = tl.zeros([BLOCK_M, BLOCK_H], ACC)
        for start in range(0, H, BLOCK_H):
            offsets_h = start + columns
            total = _load_total(
                x_ptr, residual_ptr, offsets_m, offsets_h, stride_xm, stride_xh, stride_rm,
                stride_rh, mask_m & (offsets_h < H), HAS_RESIDUAL, ACC,
            )  # fmt: skip
            squares += total * total
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 1, keep_dims=True) / H + EPS)
        for start in range(0, H, BLOCK_H):
            offsets_h = start + columns
            mask = mask_m & (offsets_h < H)
            total = _load_total(
                x_ptr, residual_ptr, offsets_m, offsets_h, stride_xm, stride_xh, stride_rm,
                stride_rh, mask, HAS_RESIDUAL, ACC,
            )  # fmt: skip
            _store_outputs(
                total, rstd, x_ptr, weight_ptr, y_ptr, total_ptr, offsets_m, offsets_h, stride_wh,
                mask, H, HAS_RESIDUAL, ACC,
            )  # fmt: skip
    tl.store(rstd_ptr + offsets_m, rstd, mask=mask_m)
