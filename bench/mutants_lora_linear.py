"""The faults of `lora_linear`: its kernels one by one, the library path, and the wiring in between.

Named <part>: <fault>. The parts are those of the sources, and so are the letters: S = s x lora_aᵀ,
P = s dy lora_b.
"""

from bench.mutants_source import Mutant

GROUPED, DROPPED = "lora_linear/test_grouped.py", "lora_linear/test_dropout.py"
GRADIENTS, DECODE = "lora_linear/test_gradients.py", "lora_linear/test_decode.py"

# Three projections of one x in float64, ragged in every dimension: outputs and all gradients.
GROUP = (f"{GROUPED}::test_outputs_and_gradients[19-triton]",)
EXACT = "lora_linear/test_exact.py"
# The same with ranks that one pass takes.
ONE_PASS_GROUP = (f"{EXACT}::test_one_pass_of_a_group",)
# More rows than a chunk, so that the partial results of several chunks are added.
CHUNKS = (f"{GROUPED}::test_outputs_and_gradients[70-triton]",)
EAGER = (f"{GROUPED}::test_outputs_and_gradients[19-eager]",)
# The split kernels, with a mask for each projection; and without a mask.
MASKS = (f"{GROUPED}::test_every_projection_has_its_own_mask[triton]",)
SPLIT = (f"{GROUPED}::test_mixed_strides[weight]",)
EAGER_MASKS = (f"{GROUPED}::test_every_projection_has_its_own_mask[eager]",)
SPLITS_OF_K = (f"{DECODE}::test_any_number_of_splits[37-2]",)
HALF = ("lora_linear/test_accuracy.py::test_kernels[True-(33, 53, 37, 5)-torch.float16]",)
# x alone, lora_a alone, lora_b alone.
PATTERNS = tuple(
    f"{GROUPED}::test_needs_input_grad[({needs})-eager]"
    for needs in ("True, False, False", "False, True, False", "False, False, True")
)

FORWARD, BACKWARD = "lora_linear/triton_forward.py", "lora_linear/triton_backward.py"
COMMON, OP = "lora_linear/triton_common.py", "lora_linear/op.py"


def _one_pass(fault: str, old: str, new: str, tests: tuple[str, ...] = ONE_PASS_GROUP) -> Mutant:
    return Mutant(f"one_pass: {fault}", FORWARD, "one_pass_kernel", old, new, tests)


ONE_PASS = [
    _one_pass("low-rank product is zero", "tl.dot(scaled, lora_b", "tl.dot(scaled * 0.0, lora_b"),
    _one_pass("low-rank product has the other sign",
              "tl.dot(scaled, lora_b", "tl.dot(-scaled, lora_b"),
    _one_pass("y x 0.5", "accumulator.to(x_ptr", "(accumulator * 0.5).to(x_ptr"),
    _one_pass("y x 1.02", "accumulator.to(x_ptr", "(accumulator * 1.02).to(x_ptr", HALF),
    _one_pass("scaling is missing",
              "s * load_scaling(pick(scalings, g), SCALING_IS_TENSOR)", "s * 1.0"),
    _one_pass("last row is dropped", "mask_m = offsets_m < M", "mask_m = offsets_m < M - 1"),
    _one_pass("last column is dropped", "mask_n = offsets_n < N_g", "mask_n = offsets_n < N_g - 1"),
    _one_pass("K's tail is dropped",
              "for k in range(0, K, BLOCK_K)",
              "for k in range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)"),
    _one_pass("rank has one column too many",
              "mask_r = offsets_r < R_g", "mask_r = offsets_r <= R_g"),
    _one_pass("lora_a is the first projection's",
              "(first + offsets_r)[None, :] * K", "offsets_r[None, :] * K"),
    _one_pass("bias is missing", "accumulator += bias", "accumulator += 0.0 * bias"),
    _one_pass("bias is the first projection's", "pick(biases, g)", "pick(biases, 0)"),
    _one_pass("S is stored without its scaling", "scaled,\n", "s.to(s_ptr.dtype.element_ty),\n"),
    _one_pass("S of the first projection alone", "if block_n == first_block", "if block_n == 0"),
    _one_pass("S lands in the first columns",
              "(first + offsets_r)[None, :],", "offsets_r[None, :],"),
    _one_pass("weight's row stride is taken to be K",
              "pick_size(stride_wn, g)", "K",
              (f"{GRADIENTS}::test_strides_change_nothing[weight-sliced]",)),
]  # fmt: skip


def _shrink(fault: str, old: str, new: str, tests: tuple[str, ...] = MASKS) -> Mutant:
    return Mutant(f"shrink: {fault}", FORWARD, "shrink_kernel", old, new, tests)


SHRINK = [
    _shrink("S is zero", "s.to(s_ptr", "(s * 0.0).to(s_ptr"),
    _shrink("S x 1.02", "s.to(s_ptr", "(s * 1.02).to(s_ptr"),
    _shrink("scaling is missing", "s *= scale\n", "s *= 1.0\n"),
    _shrink("scaling of a group is missing", "s *= scale[None, :]", "s *= 1.0", SPLIT),
    _shrink("scaling is one column late", "offsets_r >= rank", "offsets_r > rank", SPLIT),
    _shrink("last row is dropped", "offsets_m < M", "offsets_m < M - 1"),
    _shrink("K's tail is dropped",
            "range(0, K, BLOCK_K)", "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)"),
    _shrink("mask is reused for every block of K", "offsets_k + k, K)", "offsets_k, K)"),
    _shrink("mask is not applied", "x.to(ACC) * keep.to(ACC)", "x.to(ACC)"),
    Mutant("shrink: all projections have the first one's mask", FORWARD, "shrink",
           "dropout.seeds.split(1)", "[dropout.seeds[:1]] * len(ranks)", MASKS),
]  # fmt: skip


def _expand(fault: str, old: str, new: str, tests: tuple[str, ...] = MASKS) -> Mutant:
    return Mutant(f"expand: {fault}", FORWARD, "expand_kernel", old, new, tests)


EXPAND = [
    _expand("low-rank product has the other sign", "tl.dot(s, lora_b", "tl.dot(-s, lora_b"),
    _expand("low-rank product stops at one block", "0, R_g, BLOCK_R", "0, 1, BLOCK_R"),
    _expand("S is the first projection's", "(first + offsets_r)[None, :]", "offsets_r[None, :]"),
    _expand("lora_b is the first projection's", "pick(lora_bs, g)", "pick(lora_bs, 0)"),
    _expand("bias is missing", "accumulator += bias", "accumulator += 0.0 * bias"),
    _expand("last row is dropped", "(offsets_m < M)", "(offsets_m < M - 1)"),
    _expand("last column is dropped", "offsets_n < N_g", "offsets_n < N_g - 1"),
    _expand("K's tail is dropped",
            "range(0, K, BLOCK_K)", "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)"),
    _expand("y x 1.02", "accumulator.to(x_ptr", "(accumulator * 1.02).to(x_ptr"),
]  # fmt: skip


def _decode(fault: str, old: str, new: str) -> Mutant:
    file = "lora_linear/triton_decode.py"
    return Mutant(f"decode: {fault}", file, "decode_kernel", old, new, SPLITS_OF_K)


DECODING = [
    _decode("scaling is missing",
            "s * load_scaling(pick(scalings, g), SCALING_IS_TENSOR)", "s * 1.0"),
    _decode("low-rank product is zero", "tl.dot(scaled, lora_b", "tl.dot(scaled * 0.0, lora_b"),
    _decode("a part is left out", "range(0, SPLITS)", "range(1, SPLITS)"),
    _decode("the first to arrive adds the parts", "== SPLITS - 1", "== 0"),
    _decode("last row is dropped", "(offsets_m < M)", "(offsets_m < M - 1)"),
    _decode("K's tail is dropped",
            "tl.cdiv(K, BLOCK_K * SPLITS) * BLOCK_K", "K // (BLOCK_K * SPLITS) * BLOCK_K"),
    _decode("bias is missing", "accumulator += bias", "accumulator += 0.0 * bias"),
]  # fmt: skip


def _dy_b(fault: str, old: str, new: str, tests: tuple[str, ...] = GROUP) -> Mutant:
    return Mutant(f"dy_b: {fault}", BACKWARD, "dy_b_kernel", old, new, tests)


DY_B = [
    _dy_b("P has the other sign", "tl.dot(dy, lora_b", "tl.dot(-dy, lora_b"),
    _dy_b("P is of the first projection's lora_b", "pick(lora_bs, g)", "pick(lora_bs, 0)"),
    _dy_b("dy is the first projection's", "pick(dys, g)", "pick(dys, 0)"),
    _dy_b("d_lora_b x 0.5", "tl.trans(dy), s, db", "tl.trans(dy), s * 0.5, db"),
    _dy_b("d_lora_b is of the first projection's S", "(first + offsets_r)", "offsets_r"),
    _dy_b("the last rows of a chunk are dropped",
          "range(0, CHUNK_M // BLOCK_M)", "range(0, CHUNK_M // BLOCK_M - 1)", CHUNKS),
    _dy_b("last column is dropped", "offsets_n < N_g", "offsets_n < N_g - 1"),
    _dy_b("d_bias x 1.02", "tl.sum(dy.to(ACC), axis=0)", "1.02 * tl.sum(dy.to(ACC), axis=0)"),
    _dy_b("d_lora_b lands in the first rows",
          "chunk * N_ALL + pick_size(first_n, g)", "chunk * N_ALL"),
    _dy_b("dy's column stride is taken to be 1",
          "offsets_n[None, :] * stride_dyn", "offsets_n[None, :]",
          (f"{GRADIENTS}::test_strides_change_nothing[dy-sliced]",)),
    Mutant("dy_b: d_lora_b of the first chunk alone", BACKWARD, "dy_b",
           "part[..., :rank].sum(0)", "part[0, :, :rank]", CHUNKS),
    Mutant("dy_b: d_bias of the first chunk alone", BACKWARD, "dy_b",
           "[part.sum(0) for part", "[part[0] for part", CHUNKS),
]  # fmt: skip


def _reduce_p(fault: str, old: str, new: str) -> Mutant:
    return Mutant(f"reduce_p: {fault}", BACKWARD, "reduce_p_kernel", old, new, GROUP)


REDUCE_P = [
    _reduce_p("scaling is missing",
              "p *= load_scaling(pick(scalings, g), SCALING_IS_TENSOR)", "p *= 1.0"),
    _reduce_p("scaling is the first projection's", "pick(scalings, g)", "pick(scalings, 0)"),
    _reduce_p("a column block is left out",
              "range(pick_size(first_block, g),", "range(pick_size(first_block, g) + 1,"),
    _reduce_p("P lands in the first columns", "pick_size(first_r, g) + offsets_r", "offsets_r"),
    _reduce_p("last row is dropped", "offsets_m < M", "offsets_m < M - 1"),
    _reduce_p("P x 1.02", "p.to(p_ptr", "(p * 1.02).to(p_ptr"),
]  # fmt: skip


def _dx(fault: str, old: str, new: str, tests: tuple[str, ...] = GROUP) -> Mutant:
    return Mutant(f"dx: {fault}", BACKWARD, "dx_kernel", old, new, tests)


DX = [
    _dx("low-rank product is missing", "0, first_r[last] + R[last], K", "0, 0, K"),
    _dx("low-rank product of the first projection alone",
        "0, first_r[last] + R[last], K", "0, R[0], K"),
    _dx("dx x 0.5", "accumulator.to(dx_ptr", "(accumulator * 0.5).to(dx_ptr"),
    _dx("dx x 1.02", "accumulator.to(dx_ptr", "(accumulator * 1.02).to(dx_ptr", HALF),
    _dx("last row is dropped", "(offsets_m < M)", "(offsets_m < M - 1)"),
    _dx("last column is dropped", "offsets_k < K", "offsets_k < K - 1"),
    _dx("N's tail is dropped",
        "range(0, N[g], BLOCK_N)", "range(0, N[g] // BLOCK_N * BLOCK_N, BLOCK_N)"),
    _dx("weight is the first projection's", "weights[g] + offsets_n", "weights[0] + offsets_n"),
    _dx("weight's column stride is taken to be 1",
        "offsets_k[None, :] * stride_wk[g]", "offsets_k[None, :]", SPLIT),
    _dx("mask is not applied", "keep.to(ACC) * tail", "tail", MASKS),
    _dx("all projections have the first one's mask", "seeds_ptr + g", "seeds_ptr", MASKS),
    Mutant("dx: low-rank product has the other sign", BACKWARD, "rank_product",
           "tl.dot(p,", "tl.dot(-p,", GROUP),
]  # fmt: skip


def _d_a(fault: str, old: str, new: str, tests: tuple[str, ...] = GROUP) -> Mutant:
    return Mutant(f"d_a: {fault}", BACKWARD, "d_a_kernel", old, new, tests)


D_A = [
    _d_a("d_lora_a is zero", "tl.dot(tl.trans(x), p, da", "tl.dot(tl.trans(x), p * 0.0, da"),
    _d_a("d_lora_a has the other sign", "tl.dot(tl.trans(x), p, da", "tl.dot(tl.trans(x), -p, da"),
    _d_a("d_lora_a x 1.02", "        da, mask=", "        da * 1.02, mask=", HALF),
    _d_a("the last rows of a chunk are dropped",
         "range(0, CHUNK_M // BLOCK_M)", "range(0, CHUNK_M // BLOCK_M - 1)", CHUNKS),
    _d_a("last column is dropped", "offsets_k < K", "offsets_k < K - 1"),
    _d_a("mask is not applied", "x.to(ACC) * keep.to(ACC)", "x.to(ACC)", MASKS),
    _d_a("chunks of a group overlap",
         "chunk_m * R_ALL", "chunk_m * R",
         (f"{EXACT}::test_masks_of_a_group_over_several_chunks",)),
    Mutant("d_a: the first chunk alone", BACKWARD, "d_a",
           "return da.sum(0)", "return da[0]", CHUNKS),
    Mutant("d_a: all projections have the first one's mask", BACKWARD, "d_a",
           "dropout.seeds.split(1)", "[dropout.seeds[:1]] * len(ranks)", MASKS),
]  # fmt: skip

BY_DESCRIPTORS = (f"{EXACT}::test_descriptors_of_a_group",)


def _descriptor(fault: str, function: str, old: str, new: str) -> Mutant:
    file = "lora_linear/triton_descriptor.py"
    return Mutant(f"descriptors: {fault}", file, function, old, new, BY_DESCRIPTORS)


DESCRIPTORS = [
    _descriptor("low-rank product has the other sign",
                "project", "tl.dot(s, lora_b", "tl.dot(-s, lora_b"),
    _descriptor("low-rank product stops at one block",
                "project", "0, R[g], BLOCK_R", "0, 1, BLOCK_R"),
    _descriptor("S is the first projection's", "project", "(first_r[g] + offsets_r)", "offsets_r"),
    _descriptor("bias is missing", "project", "accumulator += bias", "accumulator += 0.0 * bias"),
    _descriptor("K's tail is dropped",
                "project", "range(0, K, BLOCK_K)", "range(0, K // BLOCK_K * BLOCK_K, BLOCK_K)"),
    _descriptor("a program takes one tile alone",
                "project", "first_tile, tiles, PROGRAMS", "first_tile, tiles, tiles"),
    _descriptor("dx lacks its low-rank product",
                "dx_descriptor_kernel", "0, R, BLOCK_R", "0, 0, BLOCK_R"),
    _descriptor("dx is of two projections alone",
                "dx_descriptor_kernel", "if dy_2 is not None", "if dy_2 is None"),
    _descriptor("N's tail is dropped",
                "reduce", "range(0, N, BLOCK_N)", "range(0, N // BLOCK_N * BLOCK_N, BLOCK_N)"),
    _descriptor("the halves of a tile are swapped",
                "store_halves", "left, right = tl.split", "right, left = tl.split"),
    _descriptor("the result x 1.02",
                "store_halves", "left.to(out.dtype)", "(left * 1.02).to(out.dtype)"),
]  # fmt: skip

SHARED = [
    Mutant("common: float16 accumulates in float16", COMMON, "accumulator_dtype",
           "else tl.float32", "else (tl.float16 if dtype == torch.float16 else tl.float32)", HALF),
    Mutant("common: the block after a projection is still its own", COMMON, "projection_of",
           "projection = tl.where(block >= start", "projection = tl.where(block > start", GROUP),
    Mutant("common: a kept element is not divided by 1 - p", COMMON, "dropout_keep",
           "inverse_keep, 0.0)", "1.0, 0.0)", MASKS),
    Mutant("common: dropped and kept are swapped", COMMON, "dropout_keep",
           ">= threshold", "< threshold", MASKS),
    Mutant("common: the rows of a tile repeat", COMMON, "tile_of",
           "first + inside % height", "first", GROUP),
    Mutant("common: 32-bit offsets up to 2^32", COMMON, "needs_int64",
           "> INT32_MAX", "> 2 * INT32_MAX",
           ("lora_linear/test_op.py::test_needs_int64_is_decided_by_the_largest_offset",)),
    Mutant("common: float64 scalings pass through float32", COMMON, "scaling_arguments",
           "torch.tensor(scalings, dtype=torch.float64",
           "torch.tensor(scalings, dtype=torch.float32", ONE_PASS_GROUP),
    Mutant("dropout: half the rate", "lora_linear/dropout.py", "drop_threshold",
           "round(p * 2**31)", "round(p * 2**30)",
           (f"{DROPPED}::test_rate_and_scale[0.5-triton]",)),
    Mutant("dropout: a kept element is not divided by 1 - p",
           "lora_linear/dropout.py", "generator_keep", ".div_(1.0 - p)", ".div_(1.0)",
           (f"{DROPPED}::test_rate_and_scale[0.5-eager]",)),
]  # fmt: skip


def _eager(fault: str, function: str, old: str, new: str, tests: tuple[str, ...] = EAGER) -> Mutant:
    return Mutant(f"eager: {fault}", "lora_linear/eager.py", function, old, new, tests)


LIBRARY = [
    _eager("low-rank product is missing", "forward", "y.addmm_(s_g, lora_b.t())", "y"),
    _eager("low-rank product x 1.02",
           "forward", "y.addmm_(s_g, lora_b.t())", "y.addmm_(s_g, lora_b.t(), alpha=1.02)"),
    _eager("S has no scaling", "forward", "_scale(s, ranks", "_scale(s[:0], ranks"),
    _eager("P has no scaling", "backward", "_scale(p, ranks", "_scale(p[:0], ranks"),
    _eager("all have the first scaling", "_scale", "len(set(scalings)) == 1", "scalings"),
    _eager("bias is missing", "forward", "None if biases is None else biases[g]", "None"),
    _eager("dx lacks its low-rank product",
           "backward", "dx.addmm_(p, lora_a)", "dx.addmm_(p, lora_a, alpha=0)"),
    _eager("dx is of the first dy alone",
           "backward", "dx.addmm_(dy, weight)", "dx.addmm_(dys[0].new_zeros(dy.shape), weight)"),
    _eager("d_lora_b of dy's sign", "backward", "torch.mm(dy.t(), s_g)", "torch.mm(-dy.t(), s_g)"),
    _eager("d_lora_a of an x without its mask", "backward", "keep.mul_(x)", "x", EAGER_MASKS),
    _eager("dx without its mask",
           "backward", "dx.addcmul_(torch.mm(p_g, a_g), keep)", "dx.add_(torch.mm(p_g, a_g))",
           EAGER_MASKS),
    _eager("all projections have the first one's mask",
           "forward", "dropout.seeds.split(1)", "[dropout.seeds[:1]] * len(ranks)", EAGER_MASKS),
]  # fmt: skip


def _op(fault: str, function: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(f"op: {fault}", OP, function, old, new, tests)


WIRING = [
    _op("backward has another mask",
        "_needed_gradients", "ctx.scalings, scaling_tensor, seeds,",
        "ctx.scalings, scaling_tensor, None if seeds is None else seeds + 1,", EAGER_MASKS),
    _op("one mask for all projections",
        "_run", "draw_seeds(len(projections), x.device)",
        "draw_seeds(1, x.device).expand(len(projections))", EAGER_MASKS),
    _op("x is saved for lora_b's gradient",
        "_save", "x if need_da", "x if need_db", PATTERNS),
    _op("S is saved for lora_a's gradient",
        "_save", "s if need_db", "s if need_da", PATTERNS),
    _op("the needs of lora_a and lora_b are swapped",
        "_needed_gradients", "any(need_a), any(need_b)", "any(need_b), any(need_a)", PATTERNS),
    _op("an unused output has a gradient of ones",
        "_needed_gradients", "given.new_zeros(", "given.new_ones(",
        (f"{GROUPED}::test_an_output_that_nothing_uses[eager]",)),
    _op("backward has no scaling",
        "_needed_gradients", "s, ctx.scalings,", "s, [1.0] * count,", EAGER),
    _op("backward ignores a scaling tensor",
        "_needed_gradients", "ctx.scalings, scaling_tensor, seeds", "ctx.scalings, None, seeds",
        (f"{GROUPED}::test_scalings_of_both_kinds[eager]",)),
    _op("a float among scaling tensors is lost",
        "_scalings", "torch.full((), float(scaling)", "torch.full((), 1.0",
        (f"{GROUPED}::test_scalings_of_both_kinds[eager]",)),
    _op("gradients of lora_a come in x's dtype",
        "_needed_gradients", "part.to(lora_a.dtype)", "part.to(given.dtype)",
        (f"{EXACT}::test_gradients_of_float32_adapters_are_not_rounded_to_16_bits",)),
    _op("every bias is the first one's",
        "_run", "else bias\n        for weight, bias",
        "else biases[-1][:1].expand(weight.shape[0])\n        for weight, bias", EAGER),
    _op("no gradient reaches a bias",
        "_needed_gradients", "d if need else None for d, need in zip(d_bias",
        "None for d, need in zip(d_bias", EAGER),
    _op("what is kept of S is not scaled",
        "_forward", "return ys, s if save_s", "return ys, s / scalings[0] if save_s", EAGER),
]  # fmt: skip

DORA_TESTS = "lora_linear/test_dora.py"
DORA_ONE_PASS = (f"{DORA_TESTS}::test_output_and_gradients[19-5-triton-True]",)
DORA_SPLIT = (f"{DORA_TESTS}::test_output_and_gradients[19-40-triton-True]",)
DORA_DECODE = (f"{DORA_TESTS}::test_decoding[triton]",)
DORA_EAGER = (f"{DORA_TESTS}::test_output_and_gradients[19-5-eager-True]",)
DORA_GROUP = (f"{DORA_TESTS}::test_a_group_of_which_some_have_a_magnitude[triton]",)
DORA_NORM = (f"{DORA_TESTS}::test_the_norm_is_that_of_the_merged_weight[-3.0]",)
DORA_DESCRIPTORS = (
    "lora_linear/test_descriptor.py::test_accuracy[(33, (80, 16), 32, (40, 3))-torch.float64]",
)
DORA_CHUNKS = (f"{DORA_TESTS}::test_the_gradient_of_a_scale[600-contiguous-triton]",)


def _dora(fault: str, file: str, function: str, old: str, new: str, tests: tuple) -> Mutant:
    return Mutant(f"dora: {fault}", f"lora_linear/{file}.py", function, old, new, tests)


DORA = [
    _dora("one pass scales no column", "triton_forward", "one_pass_kernel",
          "accumulator *= scale.to(ACC)[None, :]", "accumulator *= 1.0", DORA_ONE_PASS),
    _dora("one pass scales by the first projection's", "triton_forward", "one_pass_kernel",
          "pick(column_scales, g)", "pick(column_scales, 0)", DORA_GROUP),
    _dora("expand scales no column", "triton_forward", "expand_kernel",
          "accumulator *= scale.to(ACC)[None, :]", "accumulator *= 1.0", DORA_SPLIT),
    _dora("decode scales no column", "triton_decode", "decode_kernel",
          "accumulator *= scale.to(ACC)[None, :]", "accumulator *= 1.0", DORA_DECODE),
    _dora("descriptors scale no column", "triton_descriptor", "project",
          "accumulator *= scale.to(ACC)[None, :]", "accumulator *= 1.0",
          DORA_DESCRIPTORS),
    _dora("eager scales no column", "eager", "forward",
          ".mul_(column_scales[g])", ".mul_(1.0)", DORA_EAGER),
    _dora("the norm is the weight's alone", "dora", "weight_norm",
          "squares + scaling *", "squares + 0.0 *", DORA_NORM),
    _dora("the norm lacks its cross term", "dora", "weight_norm",
          "2.0 * crosses", "0.0 * crosses", DORA_NORM),
    _dora("the norm's last term is not squared in the scaling", "dora", "weight_norm",
          "scaling * update", "update", DORA_NORM),
    _dora("the incoming gradient is not scaled", "triton_dora", "scale_gradient_kernel",
          "(dy * scale[None, :])", "dy", DORA_ONE_PASS),
    _dora("the last chunk is dropped", "triton_dora", "scale_gradient",
          "return scaled, sums.sum(", "return scaled, sums[:-1].sum(", DORA_CHUNKS),
    _dora("the last row is dropped", "triton_dora", "scale_gradient_kernel",
          "offsets_m < M", "offsets_m < M - 1", DORA_CHUNKS),
    _dora("the scale's gradient is that of a unit scale", "dora", "_scale_gradient",
          "sums / scale", "sums", DORA_EAGER),
    _dora("a scale of zero stays", "dora", "column_scale",
          "(scale == 0) * _NEARLY_ZERO", "0.0",
          (f"{DORA_TESTS}::test_a_magnitude_of_zero_has_its_gradient[eager]",)),
    _dora("dropout leaves the base whole", "op", "_with_dropout",
          "F.linear(x - dropped, weight, bias)", "F.linear(x, weight, bias)",
          (f"{DORA_TESTS}::test_dropout_is_of_the_scaled_product_alone[eager]",)),
    _dora("a bias is scaled too", "op", "_run", "[] if scales or all(", "[] if all(", DORA_EAGER),
]  # fmt: skip

MUTANTS = [
    *ONE_PASS, *SHRINK, *EXPAND, *DECODING, *DY_B, *REDUCE_P, *DX, *D_A, *DESCRIPTORS, *SHARED,
    *LIBRARY, *WIRING, *DORA,
]  # fmt: skip
