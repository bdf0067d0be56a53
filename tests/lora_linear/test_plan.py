"""Plans: pure, total, within the architectures' limits."""

from itertools import product

import pytest
import torch

from lora_kernels.lora_linear.plan import one_pass_limit, padded_rank, plan

ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "sm_999", "gfx942"]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_shape_has_a_plan(arch):
    """An unknown GPU gets one too, and the same arguments give the same plan."""
    for m, n, k, r, dtype, dropout in product(
        (1, 16, 17, 65, 8192), (37, 576, 14336), (53, 4096), (1, 16, 300),
        (torch.bfloat16, torch.float32), (False, True),
    ):  # fmt: skip
        chosen = plan(m, n, k, r, dtype, arch, dropout)
        assert chosen == plan(m, n, k, r, dtype, arch, dropout)
        assert chosen.method in ("one_pass", "split")
        assert chosen.forward and chosen.dx and chosen.shrink and chosen.dy_b and chosen.d_a
        if chosen.method == "one_pass":
            assert chosen.forward.block_r >= r
        for config in (chosen.shrink, chosen.dy_b, chosen.d_a):
            assert config.block_r >= 16
        assert chosen.dy_b.chunk % chosen.dy_b.block_columns == 0
        assert chosen.d_a.chunk % chosen.d_a.block_rows == 0


def test_library_where_kernels_do_not_run():
    assert plan(8, 8, 8, 8, torch.float32, "cpu").method == "library"
    assert plan(8, 8, 8, 8, torch.float64, "sm_90").method == "library"
    assert plan(8, 8, 8, 8, torch.float64, "interpreter").method == "one_pass"
    assert "no GPU" in str(plan(8, 8, 8, 8, torch.float32, "cpu"))


def test_one_pass_for_few_outputs_split_for_many():
    limit = one_pass_limit(8192, 4096, 16, 256, "sm_90")
    assert 2500 < limit < 3500
    below, above = (int(limit) // 16 * 16 + d for d in (0, 16))
    assert plan(8192, below, 4096, 16, torch.bfloat16, "sm_90").method == "one_pass"
    assert plan(8192, above, 4096, 16, torch.bfloat16, "sm_90").method == "split"
    # Four times the rank, a quarter of the limit; few rows are always one pass.
    assert one_pass_limit(8192, 4096, 64, 256, "sm_90") == pytest.approx(limit / 4)
    assert plan(1, 14336, 4096, 16, torch.bfloat16, "sm_90").method == "one_pass"


def test_split_where_one_pass_cannot():
    assert plan(8, 64, 64, 65, torch.bfloat16, "sm_90").method == "split"
    assert plan(8, 64, 64, 16, torch.bfloat16, "sm_90", dropout=True).method == "split"


def test_padded_rank():
    assert [padded_rank(r, 64) for r in (1, 16, 17, 33, 65)] == [16, 16, 32, 64, 64]
