"""The backward kernel of RMSNorm: every gradient in one launch.

    n = total rstd        g = weight * dy           dx = d_total + rstd (g - n mean(g * n))
                                                    d_weight = Σ_m dy * round(n)

Shapes: total (here x), dy, d_total and dx [M, H], weight [H], rstd [M]; dx is contiguous. A tile is
BLOCK_M rows by BLOCK_H columns, and a program takes `tiles` of them, one below the other. A row
that fits a tile is read once and held in registers; a wider one is read again, from the cache, once
its mean is known. Each program leaves its part of d_weight in its row of partial [programs, H]; no
atomics, so the launcher can sum the rows in their order.
"""

import triton
import triton.language as tl

from lora_kernels.rms_norm.triton_forward import load


@triton.jit
def _store_dx(
    g,
    n,
    mean,
    rstd,
    d_total_ptr,
    dx_ptr,
    offsets_m,
    offsets_h,
    stride_tm,
    stride_th,
    mask,
    H: tl.constexpr,
    HAS_D_TOTAL: tl.constexpr,
    ACC: tl.constexpr,
):
    dx = rstd * (g - n * mean)
    if HAS_D_TOTAL:
        dx += load(d_total_ptr, offsets_m, offsets_h, stride_tm, stride_th, mask, ACC)
    tl.store(dx_ptr + offsets_m * H + offsets_h, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# M changes from call to call; specialising on it would only compile the kernel again.
@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy_ptr,
    d_total_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    tiles,
    stride_ym,
    stride_yh,
    stride_tm,
    stride_th,
    stride_xm,
    stride_xh,
    stride_wh,
    H: tl.constexpr,
    HAS_D_TOTAL: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
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
    first_m = program * tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]

    if BLOCK_H >= H:
        mask_h = columns < H
        d_weight = tl.zeros([BLOCK_M, BLOCK_H], ACC)
        for tile in range(0, tiles):
            offsets_m = first_m + tile * BLOCK_M
            mask_m = offsets_m < rows
            mask = mask_m & mask_h
            rstd = tl.load(rstd_ptr + offsets_m, mask=mask_m, other=0.0)
            n = load(x_ptr, offsets_m, columns, stride_xm, stride_xh, mask, ACC) * rstd
            dy = load(dy_ptr, offsets_m, columns, stride_ym, stride_yh, mask, ACC)
            if NEED_WEIGHT:
                d_weight += dy * n.to(x_ptr.dtype.element_ty).to(ACC)
            if NEED_X:
                # From the cache for every tile: registers are scarcer.
                weight = tl.load(weight_ptr + columns * stride_wh, mask=mask_h, other=0.0).to(ACC)
                g = dy * weight
                mean = tl.sum(g * n, 1, keep_dims=True) / H
                _store_dx(
                    g, n, mean, rstd, d_total_ptr, dx_ptr, offsets_m, columns, stride_tm,
                    stride_th, mask, H, HAS_D_TOTAL, ACC,
                )  # fmt: skip
        if NEED_WEIGHT:
            part = tl.sum(d_weight, 0, keep_dims=True)
            tl.store(partial_ptr + program * H + columns, part, mask=mask_h)
    else:
        # `tiles` is 1: the rows of one tile are all of the program's part of d_weight.
        mask_m = first_m < rows
        rstd = tl.load(rstd_ptr + first_m, mask=mask_m, other=0.0)
        if NEED_X:
            products = tl.zeros([BLOCK_M, BLOCK_H], ACC)
            for start in range(0, H, BLOCK_H):
                offsets_h = start + columns
                mask_h = offsets_h < H
                mask = mask_m & mask_h
                weight = tl.load(weight_ptr + offsets_h * stride_wh, mask=mask_h, other=0.0).to(ACC)
                n = load(x_ptr, first_m, offsets_h, stride_xm, stride_xh, mask, ACC) * rstd
                dy = load(dy_ptr, first_m, offsets_h, stride_ym, stride_yh, mask, ACC)
                products += dy * weight * n
            mean = tl.sum(products, 1, keep_dims=True) / H
        for start in range(0, H, BLOCK_H):
            offsets_h = start + columns
            mask_h = offsets_h < H
            mask = mask_m & mask_h
            n = load(x_ptr, first_m, offsets_h, stride_xm, stride_xh, mask, ACC) * rstd
            dy = load(dy_ptr, first_m, offsets_h, stride_ym, stride_yh, mask, ACC)
            if NEED_X:
                weight = tl.load(weight_ptr + offsets_h * stride_wh, mask=mask_h, other=0.0).to(ACC)
                _store_dx(
                    dy * weight, n, mean, rstd, d_total_ptr, dx_ptr, first_m, offsets_h,
                    stride_tm, stride_th, mask, H, HAS_D_TOTAL, ACC,
                )  # fmt: skip
            if NEED_WEIGHT:
                part = tl.sum(dy * n.to(x_ptr.dtype.element_ty).to(ACC), 0, keep_dims=True)
                tl.store(partial_ptr + program * H + offsets_h, part, mask=mask_h)
