"""The faults of `lora_linear_mixed`: its kernels, the library path, and what sorts the rows.

Named mixed <part>: <fault>. T stands for S = s_a x lora_a_aᵀ and P = s_a dy lora_b_a.
"""

from bench.mutants_source import Mutant

FOLDER = "lora_linear_mixed"
EXACT, DROPPED = f"{FOLDER}/test_exact.py", f"{FOLDER}/test_dropout.py"
ROWS_OF_THREE = (f"{EXACT}::test_every_adapter_as_alone[three-random-triton]",)
SEVERAL_CHUNKS = (f"{EXACT}::test_rows_about_the_tiles_and_chunks[150-triton]",)
EAGER = (f"{EXACT}::test_every_adapter_as_alone[three-random-eager]",)
RUNS = (f"{EXACT}::test_an_adapter_with_several_long_runs[eager]",)
NO_ROWS = (f"{EXACT}::test_an_adapter_without_rows_has_a_gradient_of_zeros[triton]",)
NO_ROWS_EAGER = (f"{EXACT}::test_an_adapter_without_rows_has_a_gradient_of_zeros[eager]",)
MASKS = (f"{DROPPED}::test_forward_and_backward_use_the_stated_mask[(0.5, 0.0, 0.75)-triton]",)


def _mutant(part: str, fault: str, file: str, function: str, old: str, new: str,
            tests: tuple[str, ...] = ROWS_OF_THREE) -> Mutant:  # fmt: skip
    return Mutant(f"mixed {part}: {fault}", f"{FOLDER}/{file}.py", function, old, new, tests)


def _shrink(fault: str, old: str, new: str, tests: tuple[str, ...] = ROWS_OF_THREE) -> Mutant:
    return _mutant("shrink", fault, "triton_forward", "shrink_kernel", old, new, tests)


def _expand(fault: str, old: str, new: str, tests: tuple[str, ...] = ROWS_OF_THREE) -> Mutant:
    return _mutant("expand", fault, "triton_forward", "expand_kernel", old, new, tests)


def _segments(fault: str, old: str, new: str, tests: tuple[str, ...] = SEVERAL_CHUNKS) -> Mutant:
    return _mutant("segments", fault, "triton_backward", "segments_kernel", old, new, tests)


MUTANTS = [
    _mutant("rows", "the tile's last adapter is left out", "triton_forward", "adapters_between",
            "COUNT - 1) + 1", "COUNT - 1)"),
    _mutant("rows", "a rank begins where the next one does", "triton_forward", "rank_of",
            "first = tl.load(first_r_ptr + a)\n", "first = tl.load(first_r_ptr + a) + 1\n"),
    _mutant("rows", "the batch's order is taken for the sorted one", "triton_forward", "load_rows",
            "tl.load(order_ptr + offsets_m, mask=mask_m, other=0)", "offsets_m"),
    _shrink("rows of other adapters are not masked", "(offsets_m >= begin) & (offsets_m < end)",
            "offsets_m >= 0"),
    _shrink("scaling is missing", "t *= scale[:, None]", "t *= 1.0"),
    _shrink("scaling is the first adapter's", "tl.load(scalings_ptr + a)", "tl.load(scalings_ptr)"),
    _shrink("the first adapter's factor for all",
            "factors_ptr + first * C + offsets_r[None, :] * C",
            "factors_ptr + offsets_r[None, :] * C"),
    _shrink("the tail is dropped", "for c in range(0, width, BLOCK_C)",
            "for c in range(0, width // BLOCK_C * BLOCK_C, BLOCK_C)"),
    _shrink("the mask is that of the sorted rows", "rows, offsets_c + c, C",
            "offsets_m, offsets_c + c, C", MASKS),
    _shrink("no dropout", "z = (z.to(ACC) * keep.to(ACC)).to(z.dtype)", "z = z", MASKS),
    _expand("low-rank product has the other sign", "                    t, factor, accumulator,",
            "                    -t, factor, accumulator,"),
    _expand("rows of other adapters are not masked", "mine[:, None] & mask_r[None, :]",
            "mask_r[None, :]"),
    _expand("the first adapter's factor for all", "factors_ptr + first * OUT + inside",
            "factors_ptr + inside"),
    _expand("bias is missing", "accumulator += bias.to(ACC)[None, :]", "accumulator += 0.0"),
    _expand("last row is dropped", "mask_m, mask_o = offsets_m < M,",
            "mask_m, mask_o = offsets_m < M - 1,"),
    _expand("dropout is left out of dx", "accumulator += keep.to(ACC) * tail",
            "accumulator += tail", MASKS),
    _segments("a chunk begins an adapter's rows anew", "tl.load(starts_ptr + a), first_row)",
              "tl.load(starts_ptr + a), 0)"),
    _segments("the last row of a segment is dropped", "mask_m = offsets_m < end",
              "mask_m = offsets_m < end - 1"),
    _segments("two adapters share a slot", "slot = chunk + a", "slot = chunk + a * 0"),
    _segments("no dropout", "z = (z.to(ACC) * keep.to(ACC)).to(z.dtype)", "z = z", MASKS),
    _mutant("eager", "low-rank product has the other sign", "eager", "_add_product",
            "torch.addmm(out[piece], left, right)", "torch.addmm(out[piece], -left, right)", EAGER),
    _mutant("eager", "scaling is missing", "eager", "_scaled_product", "alpha=scaling", "alpha=1.0",
            EAGER),
    _mutant("eager", "the last run overwrites the others", "eager", "backward",
            "beta = float(a in seen)", "beta = 0.0", RUNS),
    _mutant("eager", "gradients without rows are whatever memory held", "eager", "backward",
            "if a not in seen:", "if False:", NO_ROWS_EAGER),
    _mutant("op", "backward has no scaling", "op", "_needed_gradients", "s, ctx.scalings,",
            "s, [1.0] * len(ctx.scalings),", EAGER),
    _mutant("op", "d_lora_a and d_lora_b are swapped", "op", "_needed_gradients",
            "needs = [need_x, any(need_as), any(need_bs), need_bias]",
            "needs = [need_x, any(need_bs), any(need_as), need_bias]",
            (f"{FOLDER}/test_op.py::test_only_the_gradients_that_are_needed[eager]",)),
]  # fmt: skip
