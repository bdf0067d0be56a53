"""The floors: counted operations against torch's own counter, and the cases that a run has."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import memory_case, memory_lengths, op_cases, step_cases
from bench.models import build_base, draw_tokens
from bench.ops import build_op
from bench.shapes import (
    GROUPS,
    LLAMA_8B,
    SMOLLM2,
    TINY,
    LlamaShape,
    OpCase,
    StepCase,
    Work,
    floor_seconds,
    op_work,
    step_work,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("part", [*GROUPS, "head"])
@pytest.mark.parametrize("backward", [False, True])
def test_products_are_counted_as_torch_counts_them(part, backward):
    case = OpCase(TINY, part, 24, "float32", backward)
    op = build_op(case, CPU, 0, [])
    leaves = {
        name: tensor.clone().requires_grad_(name in op.recipe.trained)
        for name, tensor in op.recipe.inputs.items()
    }
    with FlopCounterMode(display=False) as counter:
        outputs = op.recipe.plain(leaves)
        if backward:
            torch.autograd.grad(outputs, [leaves[n] for n in op.recipe.trained], op.dys)
    assert op_work(case).flops == counter.get_total_flops()


def test_a_step_is_the_sum_of_its_operations():
    """The frozen model under torch's counter. Eager attention computes all T² scores, in two
    products forward and four backward; the floor has half of them in seven products."""
    case = StepCase(TINY, 2, 2, 24, "float32", r=0)
    base = build_base(case, CPU)
    base.set_attn_implementation("eager")
    ids = draw_tokens(case, base.config.vocab_size, CPU)
    embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        base(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()
    product = 2 * case.batch * TINY.heads * case.length**2 * TINY.head_dim
    counted = counter.get_total_flops() - case.layers * 6 * product
    expected = sum(work.flops for work in step_work(case)) - case.layers * 7 * product / 2
    assert counted == expected


@pytest.mark.parametrize(
    ("part", "tensors", "width"),
    [
        ("rope", 4, (4 + 2) * 16),
        ("rms_norm", 2 + 3, 64),
        ("rms_norm_residual", 4 + 4, 64),
        ("swiglu", 3 + 5, 96),
    ],
)
def test_elementwise_operations_are_bound_by_their_tensors(part, tensors, width):
    """Reads and writes of forward and backward, from the formulas of the kernels."""
    work = op_work(OpCase(TINY, part, 24, "bfloat16"))
    assert work == Work(0, tensors * 24 * width * 2)


def test_the_floor_is_the_larger_of_both_times():
    assert Work(100, 10).seconds(matmul_rate=10, bandwidth=10) == 10
    assert Work(100, 1000).seconds(matmul_rate=10, bandwidth=10) == 100
    # Operations run one after another, each at its own bound.
    assert floor_seconds([Work(100, 10), Work(0, 50)], 10, 10) == 15


def test_a_block_stack_keeps_the_heads_share():
    stack = StepCase(LLAMA_8B, 8, 4, 2048, "bfloat16")
    assert stack.vocabulary == LLAMA_8B.vocabulary // 4
    assert StepCase(SMOLLM2, 30, 1, 512, "float32").vocabulary == 49152


@pytest.mark.parametrize("gib", [8, 16, 24, 80, 140])
def test_sizes_grow_with_the_gpu_and_fit_it(gib):
    free = gib << 30
    steps = step_cases(CUDA, free, "bfloat16")
    stack = next(case for case in steps if case.shape is LLAMA_8B)
    larger = next(c for c in step_cases(CUDA, 2 * free, "bfloat16") if c.shape is LLAMA_8B)
    assert larger.layers * larger.tokens > stack.layers * stack.tokens
    weights = stack.layers * 218e6 * (2 + 4)
    assert weights < free
    tokens = max(case.tokens for case in op_cases(CUDA, free, "bfloat16"))
    assert tokens == (8192 if gib >= 24 else 4096 if gib >= 16 else 2048)
    assert any(case.graph for case in steps)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("sizes", ["full", "tiny"])
def test_cases_have_different_names(device, sizes):
    cases = [*op_cases(device, 80 << 30, "bfloat16", sizes)]
    cases += step_cases(device, 80 << 30, "bfloat16", sizes)
    assert len({case.id for case in cases}) == len(cases)
    small = TINY if sizes == "tiny" else SMOLLM2
    measured = {case.part for case in cases if isinstance(case, OpCase) and case.shape is small}
    assert measured == {*GROUPS, "rope", "rms_norm", "rms_norm_residual", "swiglu", "head"}
    assert memory_case(device, "bfloat16", sizes).shape is small
    assert list(memory_lengths(device, sizes)) == sorted(set(memory_lengths(device, sizes)))


@pytest.mark.parametrize("present", [True, False])
def test_the_small_model_has_its_own_weights_where_they_are_installed(monkeypatch, present):
    monkeypatch.setattr("bench.cases.find_spec", lambda name: object() if present else None)
    small, *blocks = step_cases(CPU, 0, "float32")
    assert small.bundled is memory_case(CPU, "float32").bundled is present
    assert not any(block.bundled for block in blocks)


def test_a_tied_shape_has_one_matrix_for_both_ends():
    for tied in (False, True):
        shape = LlamaShape(**{**vars(TINY), "tied": tied})
        base = build_base(StepCase(shape, 2, 1, 8, "float32"), CPU)
        assert (base.lm_head.weight is base.model.embed_tokens.weight) is tied
