"""The faults of the operations beside the projections: RoPE, RMSNorm, SwiGLU, head and loss."""

from bench.mutants_source import Mutant

ROPE = "rope/test_forward.py"
EQUALS_TRANSFORMERS = (f"{ROPE}::test_equals_transformers[triton-1]",)
EAGER_EQUALS_TRANSFORMERS = (f"{ROPE}::test_equals_transformers[eager-1]",)
HEAD_DIMS = (f"{ROPE}::test_head_dims_and_partial_rotary[11-10-triton]",)
# Tables without structure: their transpose is not their inverse.
ROPE_GRADIENTS = ("rope/test_backward.py::test_gradcheck[1-1-7-6-triton]",)


def _rotation(fault: str, function: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(f"rope: {fault}", "rope/triton_kernel.py", function, old, new, tests)


def _heads(fault: str, old: str, new: str, tests: tuple[str, ...] = HEAD_DIMS) -> Mutant:
    return _rotation(fault, "_rotate_heads", old, new, tests)


def _tables(fault: str, old: str, new: str, tests: tuple[str, ...] = HEAD_DIMS) -> Mutant:
    return _rotation(fault, "_rotate_kernel", old, new, tests)


ROTATION = [
    _heads("the halves are swapped", "out1 = x1 * cos1 + x2 * a1", "out1 = x2 * cos1 + x1 * a1"),
    _heads("the first half has the other sign", "x2 * a1", "-x2 * a1"),
    _heads("the second half has cos of the first", "x2 * cos2", "x2 * cos1"),
    _heads("the rotation x 1.02", "out1.to(", "(out1 * 1.02).to("),
    _heads("the last head is dropped",
           "(offsets_h < HEADS) & (offsets_d", "(offsets_h < HEADS - 1) & (offsets_d"),
    _heads("the last feature is dropped", "(offsets_d < HALF)", "(offsets_d < HALF - 1)"),
    _heads("what is not rotated is zero", "rest, mask=mask_tail", "rest * 0.0, mask=mask_tail"),
    _heads("heads beyond one block are dropped",
           "range(0, HEADS, BLOCK_H)", "range(0, BLOCK_H, BLOCK_H)",
           (f"{ROPE}::test_numbers_of_heads[130heads-1heads-triton]",)),
    _heads("the last dimension's stride is taken to be 1",
           "offsets_d * stride_xd, mask", "offsets_d, mask",
           (f"{ROPE}::test_layouts_of_q_and_k[last_dim_strided-triton]",)),
    _tables("k is q",
            "        k_ptr + b * stride_kb + t * stride_kt,",
            "        q_ptr + b * stride_qb + t * stride_qt,"),
    _tables("sin is not negated", "a1 = -sin1", "a1 = sin1"),
    _tables("forward and backward are swapped", "if TRANSPOSE:", "if not TRANSPOSE:"),
    _tables("backward takes one half's sin for both", "a1 = sin2", "a1 = sin1", ROPE_GRADIENTS),
    _tables("every token has the first one's angle", "t * stride_cost", "0 * stride_cost"),
    _tables("every sequence has the first one's angles",
            "b * stride_sinb", "0 * stride_sinb",
            (f"{ROPE}::test_positions_of_each_row_are_used[triton]",)),
    _tables("sin is cos", "sin_ptr + offsets_d", "cos_ptr + offsets_d"),
    _rotation("one table row serves the first sequence alone",
              "rotate", "x.stride(0) if x.shape[0] > 1 else 0", "x.stride(0)",
              (f"{ROPE}::test_one_table_row_serves_the_batch[triton]",)),
    _rotation("32-bit offsets up to 2^32",
              "needs_int64", "> _INT32_MAX", "> 2 * _INT32_MAX",
              ("rope/test_op.py::test_64_bit_offsets_are_chosen_in_time",)),
    Mutant("rope: k is not rotated", "rope/op.py", "_rotate",
           "eager.rotate(k, cos, sin, k_out, transpose)", "k_out.copy_(k)",
           EAGER_EQUALS_TRANSFORMERS),
    Mutant("rope: q and k are swapped", "rope/op.py", "_rotate",
           "transpose)\n    return q_out, k_out", "transpose)\n    return k_out, q_out",
           EAGER_EQUALS_TRANSFORMERS),
    Mutant("rope: q and k come back swapped", "rope/op.py", "_backward",
           "dq, dk_out = _rotate_back(", "dk_out, dq = _rotate_back(",
           ("rope/test_backward.py::test_gradcheck[2-1-4-4-eager]",)),
    Mutant("rope: backward is forward", "rope/op.py", "_backward",
           "_, dk = _rotate_back(dk[:, :0], dk, cos, sin, not ctx",
           "_, dk = _rotate_back(dk[:, :0], dk, cos, sin, ctx",
           ("rope/test_backward.py::test_unused_output_gives_no_gradient[1-eager]",)),
    Mutant("rope: eager backward is forward", "rope/eager.py", "rotate",
           "if transpose else", "if not transpose else", EAGER_EQUALS_TRANSFORMERS),
    Mutant("rope: eager drops what is not rotated", "rope/eager.py", "rotate",
           "x[..., rotary_dim:])", "x[..., rotary_dim:] * 0)",
           (f"{ROPE}::test_head_dims_and_partial_rotary[11-10-eager]",)),
]  # fmt: skip

NORM, NORM_GRADIENTS = "rms_norm/test_forward.py", "rms_norm/test_backward.py"
EXACT_NORM = (f"{NORM}::test_float64_is_exact_and_eps_is_not_rounded[triton]",)
RESIDUAL = (f"{NORM}::test_residual_is_added_first[triton-torch.float32]",)
WIDE = (f"{NORM}::test_rows_wider_than_a_tile[True-97-torch.float32]",)
NORM_GRADCHECK = (f"{NORM_GRADIENTS}::test_gradcheck[shape0-triton]",)
# y and the new residual both used: their gradients meet in dx.
BOTH_USED = tuple(
    f"{NORM_GRADIENTS}::test_only_what_is_required_gets_a_gradient[both-(True, True, True)-{impl}]"
    for impl in ("triton", "eager")
)
WIDE_GRADCHECK = (f"{NORM_GRADIENTS}::test_gradcheck_of_rows_wider_than_a_tile[shape0]",)
EXACT_EAGER_NORM = (f"{NORM}::test_float64_is_exact_and_eps_is_not_rounded[eager]",)
EAGER_NORM_GRADCHECK = (f"{NORM_GRADIENTS}::test_gradcheck[shape0-eager]",)


def _norm(fault: str, function: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    file = "rms_norm/triton_forward.py"
    return Mutant(f"rms_norm: {fault}", file, function, old, new, tests)


def _d_norm(fault: str, function: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    file = "rms_norm/triton_backward.py"
    return Mutant(f"rms_norm backward: {fault}", file, function, old, new, tests)


NORMALISATION = [
    _norm("y x 1.02", "_store_outputs", "y.to(y_ptr", "(y * 1.02).to(y_ptr", EXACT_NORM),
    _norm("weight is missing", "_store_outputs", ".to(ACC) * weight", ".to(ACC)", EXACT_NORM),
    _norm("eps is missing",
          "forward_kernel", "tl.sum(total * total, 1, keep_dims=True) / H + EPS",
          "tl.sum(total * total, 1, keep_dims=True) / H", EXACT_NORM),
    _norm("the mean is over the padded row",
          "forward_kernel", "tl.sum(total * total, 1, keep_dims=True) / H",
          "tl.sum(total * total, 1, keep_dims=True) / BLOCK_H", EXACT_NORM),
    _norm("the last row is dropped",
          "forward_kernel", "offsets_m < rows", "offsets_m < rows - 1", EXACT_NORM),
    _norm("the residual is not added",
          "_load_total", "total += load(", "total += 0.0 * load(", RESIDUAL),
    _norm("the new residual is the old one",
          "_store_outputs", "total.to(total_ptr", "(total * 0.5).to(total_ptr", RESIDUAL),
    _norm("not rounded before weight",
          "_store_outputs", "(total * rstd).to(x_ptr.dtype.element_ty).to(ACC)", "(total * rstd)",
          (f"{NORM}::test_normalised_value_is_rounded_before_a_wider_weight_multiplies_it[triton-torch.float16]",)),
    _norm("a wide row's tail does not count",
          "forward_kernel", "stride_rh, mask_m & (offsets_h < H)",
          "stride_rh, mask_m & (offsets_h < H // BLOCK_H * BLOCK_H)", WIDE),
    _norm("a wide row's tail is dropped",
          "forward_kernel", "            mask = mask_m & (offsets_h < H)",
          "            mask = mask_m & (offsets_h < H // BLOCK_H * BLOCK_H)", WIDE),
    _d_norm("dx has no projection",
            "_store_dx", "rstd * (g - n * mean)", "rstd * g", NORM_GRADCHECK),
    _d_norm("dx x 1.02", "_store_dx", "dx.to(dx_ptr", "(dx * 1.02).to(dx_ptr", NORM_GRADCHECK),
    _d_norm("the residual's gradient is not added",
            "_store_dx", "dx += load(", "dx += 0.0 * load(", BOTH_USED[:1]),
    _d_norm("weight is missing", "backward_kernel", "g = dy * weight", "g = dy", NORM_GRADCHECK),
    _d_norm("d_weight is of x itself",
            "backward_kernel", "d_weight += dy * n.to(x_ptr.dtype.element_ty).to(ACC)",
            "d_weight += dy * n / rstd", NORM_GRADCHECK),
    _d_norm("d_weight has the other sign",
            "backward_kernel", "part = tl.sum(d_weight", "part = -tl.sum(d_weight", NORM_GRADCHECK),
    _d_norm("the last row is dropped",
            "backward_kernel", "            mask_m = offsets_m < rows",
            "            mask_m = offsets_m < rows - 1", NORM_GRADCHECK),
    _d_norm("a wide row's mean is over its tail alone",
            "backward_kernel", "products += dy * weight * n", "products = dy * weight * n",
            WIDE_GRADCHECK),
    _d_norm("a wide row's d_weight is zero",
            "backward_kernel", "part = tl.sum(dy * n", "part = 0.0 * tl.sum(dy * n",
            WIDE_GRADCHECK),
    Mutant("rms_norm: eager has no eps", "rms_norm/eager.py", "forward",
           ".add_(eps)", ".add_(0.0)", EXACT_EAGER_NORM),
    Mutant("rms_norm: eager loses the residual's gradient", "rms_norm/eager.py", "backward",
           "dx.add_(d_total)", "dx.add_(d_total, alpha=0)", BOTH_USED[1:]),
    Mutant("rms_norm: saved is x, not the sum", "rms_norm/op.py", "_setup_context",
           "x if residual is None else total, weight", "x, weight", EAGER_NORM_GRADCHECK),
    Mutant("rms_norm: the residual has no gradient", "rms_norm/op.py", "_backward",
           "dx if need_residual else None", "None", EAGER_NORM_GRADCHECK),
]  # fmt: skip

GATED = "swiglu/test_forward.py"
EXACT_GATE = (f"{GATED}::test_float64_is_exact[triton]",)
GATE_GRADCHECK = ("swiglu/test_backward.py::test_gradcheck[shape0-triton]",)
EXACT_EAGER_GATE = (f"{GATED}::test_float64_is_exact[eager]",)
EAGER_GATE_GRADCHECK = ("swiglu/test_backward.py::test_gradcheck[shape0-eager]",)


def _swiglu(fault: str, function: str, old: str, new: str, tests: tuple[str, ...]) -> Mutant:
    return Mutant(f"swiglu: {fault}", "swiglu/triton_kernel.py", function, old, new, tests)


GATE = [
    _swiglu("up is missing",
            "_forward_kernel", "tl.sigmoid(gate) * up", "tl.sigmoid(gate)", EXACT_GATE),
    _swiglu("out x 1.02",
            "_forward_kernel", "out.to(out_ptr", "(out * 1.02).to(out_ptr", EXACT_GATE),
    _swiglu("gate and up are swapped",
            "_forward_kernel", "gate * tl.sigmoid(gate) * up", "up * tl.sigmoid(up) * gate",
            EXACT_GATE),
    _swiglu("the last column is dropped",
            "_forward_kernel", "offsets_n < columns", "offsets_n < columns - 1", EXACT_GATE),
    _swiglu("rows are taken to be dense",
            "_forward_kernel", "m * stride_um", "m * columns",
            (f"{GATED}::test_shapes[rows-shape3-triton]",)),
    _swiglu("d_gate lacks sigma's own slope",
            "_backward_kernel", "(1.0 + gate * (1.0 - sigma))", "1.0", GATE_GRADCHECK),
    _swiglu("d_gate has no up",
            "_backward_kernel", "dout * up * sigma", "dout * sigma", GATE_GRADCHECK),
    _swiglu("d_up is of up",
            "_backward_kernel", "d_up = dout * gate * sigma", "d_up = dout * sigma",
            GATE_GRADCHECK),
    _swiglu("d_up has the other sign",
            "_backward_kernel", "d_up.to(d_up_ptr", "(-d_up).to(d_up_ptr", GATE_GRADCHECK),
    _swiglu("the last gradient is dropped",
            "_backward_kernel", "offsets_n < columns", "offsets_n < columns - 1", GATE_GRADCHECK),
    Mutant("swiglu: eager has no up", "swiglu/eager.py", "forward",
           "out.mul_(up)", "out.mul_(1.0)", EXACT_EAGER_GATE),
    Mutant("swiglu: eager's d_gate lacks dout", "swiglu/eager.py", "backward",
           "torch.mul(dout, up, out=d_gate)", "torch.mul(up, 1.0, out=d_gate)",
           EAGER_GATE_GRADCHECK),
    Mutant("swiglu: the gradients come back swapped", "swiglu/op.py", "_backward",
           "d_gate, d_up = _backward_op", "d_up, d_gate = _backward_op", EAGER_GATE_GRADCHECK),
]  # fmt: skip

LOSS, LOSS_GRADIENT = (
    "linear_cross_entropy/test_forward.py",
    "linear_cross_entropy/test_backward.py",
)
EXACT_LOSS = (
    f"{LOSS}::test_equals_torch[triton-5]",
    f"{LOSS_GRADIENT}::test_equals_torch[-3.7-7-triton]",
)
EAGER_LOSS = (
    f"{LOSS}::test_equals_torch[eager-5]",
    f"{LOSS_GRADIENT}::test_equals_torch[-3.7-7-eager]",
)
VOCABULARY = (f"{LOSS}::test_sizes_of_the_vocabulary[*-triton]",)


def _loss(fault: str, old: str, new: str, tests: tuple[str, ...] = EXACT_LOSS) -> Mutant:
    file = "linear_cross_entropy/triton_kernel.py"
    return Mutant(f"cross_entropy: {fault}", file, "_cross_entropy_kernel", old, new, tests)


HEAD = [
    _loss("the target is not in the sum",
          "total = others + tl.exp(target_logit - maximum)", "total = others"),
    _loss("the loss has the other sign",
          "tl.log(total) + (maximum - target_logit)", "-tl.log(total) - (maximum - target_logit)"),
    _loss("the loss x 1.02", "tl.log(total) + (maximum", "1.02 * tl.log(total) + (maximum"),
    _loss("the maximum is left out", "(maximum - target_logit)", "-target_logit"),
    _loss("the sum is not rescaled", "sums * ratio + 1.0", "sums + 1.0", VOCABULARY),
    _loss("the vocabulary's tail does not count",
          "columns < VOCAB, other=float", "columns < VOCAB // BLOCK * BLOCK, other=float",
          VOCABULARY),
    _loss("the gradient lacks the target",
          "tl.where(columns == target, -others * inverse, gradient)", "gradient"),
    _loss("the target's gradient has the other sign", "-others * inverse", "others * inverse"),
    _loss("the gradient x 1.02", "gradient.to(logits_ptr", "(gradient * 1.02).to(logits_ptr"),
    _loss("ignored positions have a loss",
          "tl.store(losses_ptr + row, 0.0)", "tl.store(losses_ptr + row, 1.0)",
          ("linear_cross_entropy/test_chunks.py::test_ignored_rows_that_are_not_left_out_are_zero[-100-True-triton]",)),
    Mutant("cross_entropy: eager's gradient lacks the target",
           "linear_cross_entropy/eager.py", "forward", "log_p.expm1())", "log_p.exp())",
           EAGER_LOSS),
    Mutant("cross_entropy: eager's loss has the other sign",
           "linear_cross_entropy/eager.py", "forward", "losses[chunk] = -log_p",
           "losses[chunk] = log_p", EAGER_LOSS),
    Mutant("cross_entropy: the incoming gradient is dropped",
           "linear_cross_entropy/op.py", "_scale", "labels != ignore_index, dy, 0.0",
           "labels != ignore_index, 1.0, 0.0", EAGER_LOSS),
    Mutant("cross_entropy: ignored positions are counted",
           "linear_cross_entropy/op.py", "linear_cross_entropy", "(labels != ignore_index).sum()",
           "labels.numel()", (f"{LOSS}::test_equals_torch[eager-None]",)),
    Mutant("cross_entropy: labels are not shifted",
           "linear_cross_entropy/op.py", "linear_cross_entropy", "value=ignore_index)[:, 1:]",
           "value=ignore_index)[:, :-1]", (f"{LOSS}::test_equals_transformers[eager-4]",)),
    Mutant("cross_entropy: an infinite gradient reaches ignored positions",
           "linear_cross_entropy/op.py", "_scale", "torch.where(labels != ignore_index, dy, 0.0)",
           "dy.expand(labels.shape)",
           (f"{LOSS_GRADIENT}::test_infinite_incoming_gradient_is_passed_on[inf-eager]",)),
]  # fmt: skip

MUTANTS = [*ROTATION, *NORMALISATION, *GATE, *HEAD]
