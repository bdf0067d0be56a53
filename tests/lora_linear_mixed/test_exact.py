"""Every row equals its adapter alone, and training several at once equals training each alone.

In float64, through the interpreter, to rounding; on a GPU the kernels run in float32.
"""

from dataclasses import replace

import pytest
import torch

from lora_kernels.dispatch import interpreting
from lora_kernels.lora_linear_mixed import triton_backward, triton_forward
from lora_kernels.lora_linear_mixed.op import lora_linear_mixed
from lora_kernels.lora_linear_mixed.packing import pack
from lora_kernels.lora_linear_mixed.plan import plan
from lora_kernels.lora_linear_mixed.rows import MixedRows
from lora_kernels.testing import MAX_RATIO, compare

IMPLS = [pytest.param("triton", marks=pytest.mark.kernel), "eager", "reference"]
# Ranks of each adapter: one block, several blocks, blocks of different widths, one of rank 1.
RANKS = {
    "one": (5,),
    "two": (16, 16),
    "three": (1, 20, 8),
    "seven": (4, 16, 33, 1, 8, 40, 2),
}
LAYOUTS = ["random", "sequences", "falling", "first only", "last and base", "all base"]


def assert_close(ours, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * 10)


def exact_dtype(impl):
    return torch.float32 if impl == "triton" and not interpreting() else torch.float64


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", RANKS)
def test_every_adapter_as_alone(impl, layout, ranks, draw):
    """y, dx, both gradients of every adapter and that of the bias."""
    dtype = exact_dtype(impl)
    batch = draw(70, 37, 21, RANKS[ranks], layout, dtype)
    assert_close(batch.results(lora_linear_mixed, 0.0, impl), batch.alone(), dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 150])
def test_rows_about_the_tiles_and_chunks(impl, m, draw):
    """One row; one less than a tile, a tile, one more; several chunks of the gradients' sums."""
    dtype = exact_dtype(impl)
    batch = draw(m, 33, 16, (3, 18, 5), "random", dtype, seed=m)
    assert_close(batch.results(lora_linear_mixed, 0.0, impl), batch.alone(), dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_adapter_with_several_long_runs(impl, draw):
    """Library GEMMs take such rows run by run, and add an adapter's gradients over its runs."""
    dtype = exact_dtype(impl)
    batch = draw(200, 12, 9, (3, 4), "long runs", dtype)
    assert_close(batch.results(lora_linear_mixed, 0.0, impl), batch.alone(), dtype)


@pytest.mark.kernel
@pytest.mark.parametrize("ranks", [(16, 32, 48), (8, 16), (80, 5)], ids=str)
def test_even_tiles(ranks, draw):
    """The unmasked loads of sizes that tiles divide; ranks of one block, of several, of neither."""
    dtype = exact_dtype("triton")
    batch = draw(64, 64, 32, ranks, "random", dtype)
    assert_close(batch.results(lora_linear_mixed, 0.0, "triton"), batch.alone(), dtype)


@pytest.mark.kernel
def test_on_a_library_product(draw):
    """The kernels add to a base product that the library made, the bias once."""
    dtype = exact_dtype("triton")
    batch = draw(70, 37, 21, (5, 16, 20), "random", dtype)
    y, dx, *rest = batch.alone()
    rows = MixedRows.of(batch.ids, 3)
    packed = pack(batch.lora_as, batch.lora_bs, batch.scalings, None, None, dtype)
    arch = "interpreter" if interpreting() else "unknown"
    on_library = replace(plan(70, 37, 21, (5, 16, 20), dtype, arch), library_base=True)
    ours, s = triton_forward.forward(batch.x, batch.weight, batch.bias, packed, rows, on_library)
    gradients = triton_backward.backward(
        batch.dy, batch.x, batch.weight, s, packed, rows, (True, True, True, True), (dtype, dtype),
        on_library,
    )  # fmt: skip
    assert_close((ours, gradients[0], gradients[3]), (y, dx, rest[-1]), dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_adapter_without_rows_has_a_gradient_of_zeros(impl, draw):
    batch = draw(40, 20, 12, (4, 6, 3), "first only", exact_dtype(impl))
    y = lora_linear_mixed(*batch.arguments(0.0, impl))
    y.backward(batch.dy)
    for a in range(3):
        for factor in (batch.lora_as[a], batch.lora_bs[a]):
            assert factor.grad is not None and bool(factor.grad.any()) == (a == 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_at_all(impl, draw):
    batch = draw(0, 20, 12, (4, 6), "random", exact_dtype(impl))
    results = batch.results(lora_linear_mixed, 0.0, impl)
    for result, leaf in zip(results, [batch.dy, *batch.leaves()], strict=True):
        assert result.shape == leaf.shape and not result.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_two_calls_give_the_same_bits(impl, draw):
    batch = draw(150, 37, 21, (5, 16, 20), "random", torch.float32)
    first, second = (batch.results(lora_linear_mixed, 0.0, impl) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_order_of_the_rows_does_not_matter(impl, draw):
    """A row's result is its own: permuted rows give permuted outputs and the same gradients."""
    dtype = exact_dtype(impl)
    batch = draw(70, 37, 21, (5, 16, 20), "sequences", dtype)
    expected = batch.results(lora_linear_mixed, 0.0, impl)
    shuffle = torch.randperm(70, generator=torch.Generator().manual_seed(4)).to(batch.ids.device)
    batch.x = batch.x.detach()[shuffle].requires_grad_()
    batch.dy, batch.ids = batch.dy[shuffle], batch.ids[shuffle]
    expected[:2] = (tensor[shuffle] for tensor in expected[:2])
    assert_close(batch.results(lora_linear_mixed, 0.0, impl), expected, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["random", "sequences"])
def test_low_precision(impl, dtype, layout, draw, device):
    """At most twice the error of plain torch in the same dtype, against float64."""
    if dtype == torch.bfloat16 and impl == "triton" and interpreting():
        pytest.skip("Triton's interpreter computes bfloat16 products wrongly")
    drawn: dict[str, list[list[torch.Tensor]]] = {"oracle": [], "plain": [], "ours": []}
    for seed in range(3):
        batch = draw(60, 40, 50, (8, 20), layout, dtype, seed)
        drawn["oracle"].append(batch.to(torch.float64).alone())
        drawn["plain"].append(batch.alone())
        drawn["ours"].append(batch.results(lora_linear_mixed, 0.0, impl))
    stacked = {
        kind: [torch.stack(parts) for parts in zip(*results, strict=True)]
        for kind, results in drawn.items()
    }
    for index, oracle in enumerate(stacked["oracle"]):
        compared = compare(stacked["ours"][index], stacked["plain"][index], oracle)
        assert compared.ratio <= MAX_RATIO, f"result {index}: {compared}"


@pytest.mark.kernel
def test_gradients_of_float32_adapters_are_not_rounded_to_16_bits(draw):
    """The sums over the rows are float32; they reach float32 adapters as they are."""
    batch = draw(60, 37, 21, (5, 16), "random", torch.float16)
    batch.lora_as = [t.detach().float().requires_grad_() for t in batch.lora_as]
    batch.lora_bs = [t.detach().float().requires_grad_() for t in batch.lora_bs]
    _, _, *gradients, _ = batch.results(lora_linear_mixed, 0.0, "triton")
    for gradient in gradients:
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.half().float())
