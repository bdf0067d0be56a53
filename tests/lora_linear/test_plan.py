"""Plans: pure, total, from the tables where there are any, within the kernels' limits."""

import inspect
import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch

from lora_kernels import dispatch
from lora_kernels.lora_linear import plan as module
from lora_kernels.lora_linear.plan import (
    chunk_rows,
    decode_splits,
    heuristic,
    one_pass_limit,
    plan,
    splits_of_k,
)
from lora_kernels.lora_linear.tables import SHARED_BYTES, Table, load_table, nearest_entry

ARCHS = [*SHARED_BYTES, "sm_87", "sm_999", "gfx1100", "interpreter"]
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def no_cache():
    """Plans are cached by their arguments; a test that replaces a table must not leave its own."""
    plan.cache_clear()
    yield
    plan.cache_clear()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_shape_has_a_plan(arch):
    """An unknown GPU gets one too, and what it says fits the kernels."""
    for m, n, k, r, dtype, dropout in product(
        (1, 16, 17, 65, 8192), ((37,), (576,), (4096, 1024, 1024), (14336, 14336)), (53, 4096),
        (1, 16, 24, 300), (BF16, torch.float16, FP32), (False, True),
    ):  # fmt: skip
        ranks = (r,) * len(n)
        chosen = plan(m, n, k, ranks, dtype, arch, dropout)
        assert chosen.method in ("one_pass", "split") and chosen.reason
        assert chosen.forward and chosen.dx and chosen.shrink and chosen.dy_b and chosen.d_a
        if chosen.method == "one_pass":
            assert chosen.forward.block_r >= r
            assert not dropout
        if arch == "interpreter":
            continue
        for config in (chosen.dy_b, chosen.d_a):
            assert config.chunk % config.block_rows == 0
        # Ranks that 16 does not divide are loaded element by element, 16 at a time.
        if chosen.method == "split" and r % 16:
            assert chosen.forward.block_r == 16
        assert (chosen.decode is not None) == (chosen.method == "one_pass" and m <= 16)
        if chosen.decode is not None:
            assert chosen.decode.block_r >= r
            assert chosen.decode.splits * chosen.decode.block_k <= max(k, chosen.decode.block_k)


def test_plans_are_pure():
    """The same arguments, the same plan: no GPU, no clock, no state."""
    for arch in ARCHS:
        first = plan(2048, (4096,), 4096, (16,), BF16, arch)
        plan.cache_clear()
        assert plan(2048, (4096,), 4096, (16,), BF16, arch) == first
    assert plan(2048, 4096, 4096, 16, BF16, "sm_90") == plan(
        2048, (4096,), 4096, (16,), BF16, "sm_90"
    )
    assert "torch.cuda" not in inspect.getsource(module)


def test_library_where_kernels_do_not_run():
    assert plan(8, 8, 8, 8, FP32, "cpu").method == "library"
    assert plan(8, 8, 8, 8, FP64, "sm_90").method == "library"
    assert plan(8, 8, 8, 8, FP64, "interpreter").method == "one_pass"
    assert str(plan(8, 8, 8, 8, FP32, "cpu")) == "library GEMMs (no GPU)"


def test_tiles_come_from_the_nearest_entry():
    table = load_table("sm_90")
    chosen = plan(3000, (8192, 2048), 5120, (16, 16), BF16, "sm_90")
    entry = nearest_entry(table, 3000, 10240, 5120, 16, 16)
    assert entry.m == 2048 and chosen.method == "split"
    assert replace(chosen.forward, block_r=64) == entry.split
    # dx and the passes over x take the ranks together: 32, above 16.
    assert (chosen.dx, chosen.shrink, chosen.dy_b, chosen.d_a) == (
        entry.dx, entry.shrink, entry.dy_b, entry.d_a,
    )  # fmt: skip
    assert chosen.forward.block_r == 16
    assert str(chosen).startswith("split 128x256x64 by descriptors (N >= ")


@pytest.mark.parametrize(
    ("n", "k", "dtype", "dropout"),
    [(4100, 4096, BF16, False), (4096, 4100, BF16, False), (4096, 4096, FP32, False),
     (4096, 4096, BF16, True)],
)  # fmt: skip
def test_a_table_is_for_what_it_was_compiled_for(n, k, dtype, dropout):
    """Ragged sizes, float32 and dropout take the heuristic's narrower tiles on any GPU."""
    chosen = plan(2048, n, k, 16, dtype, "sm_90", dropout)
    entry = heuristic(2048, (n,), k, 16, dtype, "", dropout, load_table("sm_90").multiprocessors)
    assert chosen.method == "split"
    assert replace(chosen.forward, block_r=16) == replace(entry.split, block_r=16)
    assert replace(chosen.dx, block_r=16) == replace(entry.dx, block_r=16)
    assert not chosen.forward.descriptors


def test_unknown_gpus_take_the_heuristic():
    for arch in ("sm_87", "sm_121", "gfx1100"):
        entry = heuristic(2048, (4096,), 4096, 64, BF16)
        chosen = plan(2048, 4096, 4096, 64, BF16, arch)
        assert (chosen.forward, chosen.dx, chosen.dy_b) == (entry.split, entry.dx, entry.dy_b)
    # Large tiles only where there are enough of them.
    assert heuristic(8192, (4096,), 4096, 16, BF16).split.block_n == 128
    assert heuristic(128, (512,), 4096, 16, BF16).split.block_n == 64
    assert heuristic(8192, (4096,), 4096, 64, BF16).one_pass.block_m == 64


def test_one_pass_for_few_outputs_split_for_many():
    table = load_table("sm_90")
    entry = nearest_entry(table, 8192, 2944, 4096, 16, 16)
    limit = one_pass_limit(
        8192, 4096, 16, entry.one_pass.block_n, table.flops, table.bytes_per_second
    )
    assert 2500 < limit < 3500
    below, above = (int(limit) // 16 * 16 + d for d in (0, 16))
    assert plan(8192, below, 4096, 16, BF16, "sm_90").method == "one_pass"
    assert plan(8192, above, 4096, 16, BF16, "sm_90").method == "split"
    # Outputs count together; four times the rank, a quarter of the limit.
    assert plan(8192, (below - 16, 32), 4096, (16, 16), BF16, "sm_90").method == "split"
    assert one_pass_limit(8192, 4096, 64, 256) == pytest.approx(
        one_pass_limit(8192, 4096, 16, 256) / 4
    )
    assert plan(1, 14336, 4096, 16, BF16, "sm_90").method == "one_pass"


def test_split_where_one_pass_cannot():
    assert plan(8, 64, 64, 65, BF16, "sm_90").method == "split"
    assert plan(8, 64, 64, 17, FP32, "sm_90").method == "split"
    assert plan(8, 64, 64, 16, BF16, "sm_90", dropout=True).method == "split"


def timed(monkeypatch, method):
    """sm_90's table as if it had been timed, with one method throughout."""
    table = load_table("sm_90")
    entries = tuple(replace(entry, method=method) for entry in table.entries)
    monkeypatch.setattr(module, "load_table", lambda arch: replace(table, entries=entries))


@pytest.mark.parametrize("method", ["one_pass", "split", "library"])
def test_a_timed_method_is_taken(monkeypatch, method):
    timed(monkeypatch, method)
    for m, n in ((1, 4096), (8192, 512), (8192, 14336)):
        chosen = plan(m, n, 4096, 16, BF16, "sm_90")
        assert (chosen.method, chosen.reason) == (method, "timed fastest")
        assert (chosen.forward is None) == (method == "library")
    # Where one pass cannot hold the rank, it is not taken.
    expected = "library" if method == "library" else "split"
    assert plan(8192, 512, 4096, 128, BF16, "sm_90").method == expected


def test_kernels_asked_for_by_name_are_not_the_library(monkeypatch):
    timed(monkeypatch, "library")
    chosen = plan(8192, 14336, 4096, 16, BF16, "sm_90", kernels=True)
    assert chosen.method == "split" and "N >= " in chosen.reason
    assert plan(8192, 512, 4096, 16, BF16, "sm_90", kernels=True).method == "one_pass"


def test_a_faulty_table_is_told_and_gone_around(monkeypatch):
    """`auto` falls back and says so; the kernels by name raise."""

    def faulty(arch):
        raise ValueError("sm_90.json: entries[0]: unknown key 'tile'")

    monkeypatch.setattr(module, "load_table", faulty)
    with pytest.warns(UserWarning, match="unknown key 'tile'"):
        chosen = plan(2048, 4096, 4096, 16, BF16, "sm_90")
    assert "faulty table: sm_90.json: entries[0]: unknown key 'tile'" in str(chosen)
    expected = heuristic(2048, (4096,), 4096, 16, BF16)
    assert chosen.dy_b == expected.dy_b and replace(chosen.dx, block_r=64) == expected.dx
    with pytest.raises(ValueError, match="unknown key 'tile'"):
        plan(2048, 4096, 4096, 16, BF16, "sm_90", kernels=True)


def test_no_warning_without_a_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arch in ARCHS:
            plan(2048, 4096, 4096, 16, BF16, arch)


def test_decode_splits_fill_the_gpu():
    """Two programs per multiprocessor, about; an entry's splits follow the number of outputs."""
    assert decode_splits(4096, 4096, 64, 64, 128) == 4
    assert decode_splits(28672, 4096, 64, 64, 128) == 1
    assert decode_splits(64, 4096, 64, 64, 128) == 16
    assert splits_of_k(8, 256, 64) == 1
    table = load_table("sm_90")
    whole = nearest_entry(table, 1, 4096, 4096, 16, 16).decode
    assert plan(1, 4096, 4096, 16, BF16, "sm_90").decode == whole
    assert plan(1, 1024, 4096, 16, BF16, "sm_90").decode.splits == 4 * whole.splits
    assert plan(1, 14336, 4096, 16, BF16, "sm_90").decode.splits == max(whole.splits // 4, 1)


def test_chunks_fill_the_gpu():
    assert chunk_rows(8192, 32, 16, 128) == 1024
    assert chunk_rows(8192, 16, 16, 128) == 512
    assert chunk_rows(100, 1, 16, 128) == 128
    # Larger partial results are worth fewer programs.
    assert chunk_rows(100, 1, 64, 128) == 512
    assert chunk_rows(100, 1, 256, 128) == 1024


def test_a_gpu_below_ampere_is_refused_by_name(monkeypatch):
    """No plan is asked for: `auto` runs eager and says why, `triton` raises."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    device = torch.device("cuda")
    reason = dispatch.why_not_triton(device, BF16)
    assert reason == "compute capability 7.5 is below 8.0"
    assert dispatch.resolve("auto", device, BF16) == "eager"
    with pytest.raises(ValueError, match=r"compute capability 7\.5 is below 8\.0"):
        dispatch.resolve("triton", device, BF16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert dispatch.resolve("triton", device, BF16) == "triton"


def test_a_table_without_entries_leaves_the_heuristic(monkeypatch):
    empty = Table("sm_90", 1e12, 1e12, 132, None, ())
    monkeypatch.setattr(module, "load_table", lambda arch: empty)
    assert (
        plan(2048, 4096, 4096, 64, BF16, "sm_90").dx
        == heuristic(2048, (4096,), 4096, 64, BF16, multiprocessors=132).dx
    )


def test_float32_products_are_tf32_only_where_the_compiler_knows_it(monkeypatch):
    from lora_kernels.lora_linear.triton_common import input_precision

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch.version, "hip", None)
    assert (input_precision(FP32), input_precision(BF16)) == ("tf32", "ieee")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert input_precision(FP32) == "ieee"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert input_precision(FP32) == "ieee"
