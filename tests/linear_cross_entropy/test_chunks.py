"""Rows in chunks: their sizes, their bounds in memory, and the rows they leave out."""

import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kernels.linear_cross_entropy import eager, op
from lora_kernels.linear_cross_entropy.op import linear_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
kernel = pytest.mark.kernel

OP_IMPLS = ("eager", pytest.param("triton", marks=kernel))


def flat_inputs(rows=10, vocab=11, width=5):
    """hidden [M, H], weight [V, H] and labels [M], none of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator)
    labels = torch.randint(vocab, (rows,), generator=generator)
    return hidden.to(DEVICE), weight.to(DEVICE), labels.to(DEVICE)


def forward_of(impl):
    if impl == "eager":
        return eager.forward
    from lora_kernels.linear_cross_entropy import triton_kernel

    return triton_kernel.forward


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("label", (11, -1, 2**30, 2**40))
def test_label_outside_the_vocabulary_reads_nothing_and_gives_nan(impl, label):
    """Below the check of the CPU: what happens on a GPU."""
    hidden, weight, labels = flat_inputs()
    expected, expected_dx = forward_of(impl)(hidden, weight, labels, -100, True, 4)
    labels[5] = label
    losses, dx = forward_of(impl)(hidden, weight, labels, -100, True, 4)
    others = torch.arange(10, device=DEVICE) != 5
    assert losses[5].isnan() and dx[5].isnan().all()
    assert torch.equal(losses[others], expected[others])
    assert torch.equal(dx[others], expected_dx[others])


def test_chunks_are_bounded_and_even():
    for device_type, budget in (("cpu", 32 * 2**20), ("cuda", 256 * 2**20)):
        fewest = {"cpu": 128, "cuda": 512}[device_type]
        for dtype in (torch.bfloat16, torch.float32):
            for vocab in (1, 1000, 49_152, 128_256, 262_144):
                for rows in (0, 1, 64, 100, 129, 513, 800, 8192, 100_000):
                    size = op.chunk_rows(rows, vocab, dtype, device_type)
                    assert size >= 64 and size % 64 == 0
                    assert size <= fewest or size * vocab * dtype.itemsize <= budget
                    # No more chunks than their largest size demands, and no stub at the end.
                    largest = op.chunk_rows(10**9, vocab, dtype, device_type)
                    chunks = -(-rows // size)
                    assert chunks == -(-rows // largest)
                    assert chunks * size - rows < 64 * max(1, chunks)
    assert op.chunk_rows(512, 49_152, torch.float32, "cpu") == 128
    assert op.chunk_rows(800, 49_152, torch.bfloat16, "cpu") == 320
    assert op.chunk_rows(8192, 128_256, torch.bfloat16, "cuda") == 1024


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("need_dx", (True, False))
@pytest.mark.parametrize("chunk_rows", (1, 3, 5, 9))
def test_chunks_give_what_the_whole_gives(impl, need_dx, chunk_rows):
    hidden, weight, labels = (x.double() if x.is_floating_point() else x for x in flat_inputs())
    if CUDA:
        hidden, weight = hidden.float(), weight.float()
    labels[4] = -100
    expected = forward_of(impl)(hidden, weight, labels, -100, need_dx, 64)
    actual = forward_of(impl)(hidden, weight, labels, -100, need_dx, chunk_rows)
    assert_close(actual, expected)
    assert (actual[1] is not None) == need_dx


@pytest.mark.skipif(CUDA, reason="a CPU's products in 16 bits")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_widened_blocks_give_what_the_whole_weight_gives(dtype, monkeypatch):
    hidden, weight, labels = (x.to(dtype) if x.is_floating_point() else x for x in flat_inputs())
    monkeypatch.setattr(eager, "_product_dtype", lambda device_type, dtype: torch.float32)
    expected = eager.forward(hidden.float(), weight.float(), labels, -100, True, 4)
    for block_bytes in (1, 3 * 5 * 4, 4 * 5 * 4, 2**20):
        monkeypatch.setattr(eager, "_BLOCK_BYTES", block_bytes)
        losses, dx = eager.forward(hidden, weight, labels, -100, True, 4)
        assert losses.dtype == torch.float32 and dx.dtype == dtype
        assert_close(losses, expected[0])
        assert_close(dx, expected[1].to(dtype))


def test_products_are_in_16_bits_only_where_that_is_native(monkeypatch):
    for native in (False, True):
        eager._product_dtype.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        choices = {dtype: eager._product_dtype("cpu", dtype) for dtype in op._DTYPES}
        assert choices == {
            torch.float16: torch.float32,
            torch.bfloat16: torch.bfloat16 if native else torch.float32,
            torch.float32: torch.float32,
            torch.float64: torch.float64,
        }
        assert all(eager._product_dtype("cuda", dtype) == dtype for dtype in op._DTYPES)
    eager._product_dtype.cache_clear()


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return outputs


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("need_dx", (True, False))
def test_no_tensor_holds_the_logits_of_all_tokens(impl, need_dx):
    rows, vocab, chunk_rows = 96, 640, 8
    hidden, weight, labels = flat_inputs(rows, vocab)
    with LargestTensor() as largest:
        forward_of(impl)(hidden, weight, labels, -100, need_dx, chunk_rows)
    assert largest.nbytes == chunk_rows * vocab * 4
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, labels, impl="reference", shift=False)
    assert largest.nbytes == rows * vocab * 4


def peak_memory(function):
    """Bytes by which the process grew at its largest while `function` ran (Linux)."""
    status = Path("/proc/self/status")

    def read(name):
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of this process's memory cannot be reset")
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


@pytest.mark.skipif(CUDA or sys.platform != "linux", reason="measures Linux's own figures")
def test_peak_memory_of_a_step():
    rows, vocab, width = 4096, 16_384, 8
    hidden, weight, labels = flat_inputs(rows, vocab, width)
    hidden.requires_grad_()
    logits = rows * vocab * 4

    def step(impl):
        linear_cross_entropy(hidden, weight, labels, impl=impl, shift=False).backward()

    ours, reference = (peak_memory(lambda impl=impl: step(impl)) for impl in ("eager", "reference"))
    assert ours < logits / 3
    assert reference > 2 * logits


@pytest.mark.skipif(CUDA, reason="on a GPU counting the rows would make the host wait")
@pytest.mark.parametrize("impl", OP_IMPLS)
def test_ignored_rows_are_left_out(impl, monkeypatch):
    rows, forward = [], forward_of(impl)

    def spy(hidden, *args):
        rows.append(hidden.shape[0])
        return forward(hidden, *args)

    module = sys.modules[forward.__module__]
    monkeypatch.setattr(module, "forward", spy)
    hidden, weight, labels = flat_inputs(rows=12)
    hidden, labels = hidden.reshape(2, 6, -1), labels.reshape(2, 6)
    labels[:, :2] = -100
    linear_cross_entropy(hidden, weight, labels, impl=impl)
    # Labels 2 to 5 are scored at positions 1 to 4.
    assert rows == [8]


@pytest.mark.parametrize("impl", OP_IMPLS)
@pytest.mark.parametrize("need_dx", (True, False))
@pytest.mark.parametrize("ignore_index", (-100, 4))
def test_ignored_rows_that_are_not_left_out_are_zero(impl, need_dx, ignore_index):
    """Below the selection of rows on a CPU: what happens on a GPU."""
    hidden, weight, labels = flat_inputs()
    labels[labels == ignore_index] += 1
    forward = forward_of(impl)
    expected, expected_dx = forward(hidden, weight, labels, ignore_index, need_dx, 4)
    labels[2:5] = ignore_index
    hidden[3] = torch.nan
    losses, dx = forward(hidden, weight, labels, ignore_index, need_dx, 4)
    scored = labels != ignore_index
    assert (losses[~scored] == 0).all() and torch.equal(losses[scored], expected[scored])
    if need_dx:
        assert (dx[~scored] == 0).all() and torch.equal(dx[scored], expected_dx[scored])


@pytest.mark.skipif(not CUDA, reason="needs a GPU's stream")
@pytest.mark.parametrize("impl", OP_IMPLS)
def test_host_never_waits_for_the_gpu(impl):
    hidden, weight, labels = flat_inputs()
    hidden.requires_grad_()
    labels[:3] = -100
    linear_cross_entropy(hidden, weight, labels, impl=impl, shift=False).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels, impl=impl, shift=False).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
