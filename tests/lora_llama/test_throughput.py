"""FLOPs against those that torch counts, lengths of batches, peaks of known GPUs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from lora_kernels import LoraConfig
from lora_llama.batching import Collator, SupervisedDataset, pack_rows
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import FinetuneOptions
from lora_llama.throughput import PEAK_FLOPS, FlopCount, peak_flops
from lora_llama.trainer import LoraTrainer
from lora_llama.training import finetune


def test_the_base_is_what_torch_counts(tiny_llama):
    """2 N_base for each token forward; torch counts attention without its mask: 4 T² H D."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
    model.eval().requires_grad_(False)
    count = FlopCount.of(model)
    ids = torch.randint(261, (3, 20))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    attention = 4 * count.attention * 3 * 20**2
    assert counter.get_total_flops() == 2 * count.base * 60 + attention
    assert count.adapter == 0
    tokens, flops = count.of_batch({"input_ids": ids})
    # Forward and the gradient of the inputs: twice the forward pass; attention's gradient is twice
    # its own forward pass, and the mask leaves half of it all.
    assert (tokens, flops) == (60, 4 * count.base * 60 + 3 * attention // 2)


def test_the_adapter_is_counted_three_times(tiny_llama):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = LoraLlamaForCausalLM.from_pretrained(tiny_llama, lora=config)
    base = FlopCount.of(LlamaForCausalLM.from_pretrained(tiny_llama).requires_grad_(False))
    count = FlopCount.of(model)
    trainable, _ = model.get_nb_trainable_parameters()
    assert (count.base, count.adapter, count.attention) == (base.base, trainable, base.attention)
    ids = {"input_ids": torch.zeros(1, 7, dtype=torch.long)}
    assert count.of_batch(ids)[1] - base.of_batch(ids)[1] == 6 * trainable * 7


# Counted by hand: a block's projections are 64 x (64 + 32 + 32 + 64) and 3 x 64 x 96, in two
# blocks; the head is 261 x 64; a rank of 4 on q_proj is 4 x (64 + 64), in two blocks.
BLOCKS, HEAD, ADAPTER = 2 * (64 * 192 + 3 * 64 * 96), 261 * 64, 2 * 4 * (64 + 64)


@pytest.mark.parametrize(
    ("changes", "base", "adapter"),
    [
        ({}, BLOCKS + HEAD, ADAPTER),
        # 6 N of a trained head, which takes the frozen one's place.
        ({"modules_to_save": ["lm_head"]}, BLOCKS, ADAPTER + HEAD),
        # Looked up, or multiplied element by element: no product of matrices.
        ({"modules_to_save": ["embed_tokens"]}, BLOCKS + HEAD, ADAPTER),
        ({"modules_to_save": ["norm", "input_layernorm"]}, BLOCKS + HEAD, ADAPTER),
        ({"use_dora": True}, BLOCKS + HEAD, ADAPTER),
        ({"modules_to_save": ["mlp"]}, BLOCKS + HEAD - 2 * 3 * 64 * 96, ADAPTER + 2 * 3 * 64 * 96),
    ],
    ids=str,
)
def test_every_kind_of_trained_weight(changes, base, adapter, tiny_llama):
    config = LoraConfig(r=4, target_modules=["q_proj"], **changes)
    model = LoraLlamaForCausalLM.from_pretrained(tiny_llama, lora=config)
    count = FlopCount.of(model)
    assert (count.base, count.adapter) == (base, adapter)
    # The copies of an adapter that is not active compute nothing.
    model.add_adapter("other", LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["norm"]))
    assert FlopCount.of(model) == count
    model.set_adapter("other")
    assert FlopCount.of(model) == FlopCount(BLOCKS + HEAD, 2 * ADAPTER, count.attention)


def rows(*lengths: int) -> list[dict[str, Any]]:
    return [
        {"input_ids": torch.ones(n, dtype=torch.long), "labels": torch.ones(n)} for n in lengths
    ]


def test_padding_is_not_counted_and_packed_rows_are_apart(tiny_llama):
    count = FlopCount(base=10, adapter=1, attention=100)
    collate = Collator(pad_token_id=0)
    expected = (10, (4 * 10 + 6) * 10 + 6 * 100 * (49 + 9))
    assert count.of_batch(collate(rows(7, 3))) == expected
    packed = SupervisedDataset(pack_rows(rows(7, 3), max_length=16))
    assert count.of_batch(collate([packed[0]])) == expected
    # Padding of packed rows is a segment of its own, which attends and trains like them.
    two = pack_rows(rows(7, 3, 6), max_length=10)
    tokens, flops = count.of_batch(collate(two))
    assert (tokens, flops) == (20, 46 * 20 + 600 * (49 + 9 + 36 + 16))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX 6000 Ada Generation", 364e12),
        ("Some other GPU", None),
    ],
)
def test_peaks_of_known_gpus(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    gpu = torch.device("cuda")
    assert peak_flops(gpu, torch.bfloat16) == peak_flops(gpu, torch.float16) == peak
    assert peak_flops(gpu, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_no_name_hides_another():
    """The first that fits counts: a name that holds an earlier one would never be found."""
    names = list(PEAK_FLOPS)
    for index, name in enumerate(names):
        assert not [earlier for earlier in names[:index] if earlier in name], name


@pytest.fixture
def options(tiny_llama, sums, tmp_path, write_rows, monkeypatch) -> FinetuneOptions:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return FinetuneOptions(
        model=str(tiny_llama), data=write_rows(sums), output_dir=str(tmp_path / "output"),
        dtype="float32", val_set_size=4, max_steps=4, eval_steps=2, logging_steps=2, lora_r=4,
    )  # fmt: skip


def test_every_line_of_the_log(options):
    trainer, result = finetune(options)
    training = [line for line in result.log if "loss" in line]
    assert [line["step"] for line in training] == [2, 4]
    for line in training:
        assert {"learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib"} < line.keys()
        # The peak of a CPU is not known.
        assert "mfu" not in line and line["tokens_per_second"] > 0 and line["grad_norm"] > 0
        assert 0.1 < line["peak_memory_gib"] <= result.peak_memory_gib
    assert [line["step"] for line in result.log if "eval_loss" in line] == [0, 2, 4]
    assert result.mfu is None and trainer.utilisation() is None
    metrics = json.loads((Path(options.output_dir) / "metrics.json").read_text())
    assert metrics["log"] == json.loads(json.dumps(result.log))


def test_utilisation_where_the_peak_is_known(options, monkeypatch):
    seconds = []
    original = LoraTrainer.__init__

    def knows(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._peak_flops = 1e12

    log = LoraTrainer.log

    def timed(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        seconds.append((self.seconds_trained, self.flops_trained, self.tokens_trained))
        log(self, logs, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "__init__", knows)
    monkeypatch.setattr(LoraTrainer, "log", timed)
    options.val_set_size = 0
    trainer, result = finetune(options)
    first, second = (line for line in result.log if "loss" in line)
    (s1, f1, t1), (s2, f2, t2) = seconds[:2]
    assert first["mfu"] == pytest.approx(f1 / s1 / 1e12)
    assert second["mfu"] == pytest.approx((f2 - f1) / (s2 - s1) / 1e12)
    assert second["tokens_per_second"] == pytest.approx((t2 - t1) / (s2 - s1))
    assert result.mfu == trainer.utilisation() == pytest.approx(f2 / s2 / 1e12)
    tokens = t2
    count = FlopCount.of(trainer.model)
    assert f2 > (4 * count.base + 6 * count.adapter) * tokens
