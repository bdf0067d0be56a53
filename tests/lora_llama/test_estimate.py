"""The parts of an estimate, by hand; which cards fit; the table; faulty arguments."""

import dataclasses
import json

import pytest
import torch
from transformers import LlamaConfig

from lora_llama.cli import main
from lora_llama.estimate import (
    PRESETS,
    MemoryEstimate,
    avoided_logits,
    estimate_memory,
    estimate_table,
    projection_sizes,
)

GIB = 2**30
TINY = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 2, "vocab_size": 16, "tie_word_embeddings": True,
}  # fmt: skip


def test_every_part_by_hand():
    estimate = estimate_memory(
        TINY, 4, batch_size=2, lora_r=3, dtype=torch.float32, device_type="cpu"
    )
    # q 8x8, k and v 8x4, o 8x8, gate, up and down 8x12, two norms; embedding, final norm.
    block = 64 + 32 + 32 + 64 + 3 * 96 + 16
    adapter = 2 * 3 * (16 + 12 + 12 + 16 + 20 + 20 + 20)
    tokens = 8
    kept = tokens * (4 * (4 * 8 + 2 * 4 * 2 + 2 * 2 * 2 + 3 * 12 + 7 * 3) + 4 * (4 + 2))
    assert estimate == MemoryEstimate(
        weights=4 * (2 * block + 16 * 8 + 8),
        adapter=4 * adapter,
        gradients=4 * adapter,
        optimizer=8 * adapter,
        activations=2 * kept,
        loss=tokens * 4 * 3 * 8,
        working=tokens * 4 * (2 * 8 + 2 * 12),
        gathered=0,
        runtime=0,
    )
    assert estimate.total == sum(vars(estimate).values())


def test_weights_and_adapter_are_those_of_the_model():
    import lora_kernels as lk
    from lora_llama import LoraLlama

    targets = list(projection_sizes(TINY))
    model = LoraLlama(LlamaConfig(**TINY), lora=lk.LoraConfig(r=3, target_modules=targets))
    trainable, total = model.get_nb_trainable_parameters()
    estimate = estimate_memory(TINY, 4, lora_r=3, dtype=torch.float32)
    assert estimate.adapter == 4 * trainable
    assert estimate.weights == 4 * (total - trainable)


@pytest.mark.parametrize(
    "name, billions",
    [("llama-1b", 1.24), ("llama-3b", 3.21), ("llama-8b", 8.03), ("llama-70b", 70.55)],
)
def test_presets_have_their_published_sizes(name, billions):
    weights = estimate_memory(PRESETS[name], 1, dtype=torch.bfloat16).weights
    assert weights / 2e9 == pytest.approx(billions, abs=0.01)


def test_gpus_share_weights_and_adapters_only_where_sharded():
    one = estimate_memory(PRESETS["llama-8b"], 2048)
    shared = estimate_memory(PRESETS["llama-8b"], 2048, gpus=4)
    replicas = estimate_memory(PRESETS["llama-8b"], 2048, gpus=4, sharding="ddp")
    assert replicas.gathered == one.adapter and one.gathered == 0
    assert dataclasses.replace(replicas, gathered=0) == one
    assert shared.weights * 4 == one.weights and shared.optimizer * 4 == one.optimizer
    assert shared.activations == one.activations and shared.gathered > 0


def test_checkpointing_keeps_one_block_and_the_inputs_of_the_others():
    with_all = estimate_memory(PRESETS["llama-8b"], 2048)
    without = estimate_memory(PRESETS["llama-8b"], 2048, gradient_checkpointing=True)
    block = with_all.activations / 32
    assert without.activations == block + 31 * 2048 * 2 * 4096
    assert without.working == with_all.working


def test_some_projections_alone():
    estimate = estimate_memory(TINY, 4, lora_r=3, target_modules=["q_proj", "down_proj"])
    assert estimate.adapter == 4 * 2 * 3 * (16 + 20)


def test_a_card_is_smaller_than_its_name():
    parts = dict.fromkeys(vars(estimate_memory(TINY, 4)), 0)
    assert MemoryEstimate(**{**parts, "weights": int(0.96 * 16 * GIB)}).fits(16)
    assert not MemoryEstimate(**{**parts, "weights": int(0.98 * 16 * GIB)}).fits(16)


def test_logits_that_are_never_made():
    assert avoided_logits(TINY, 4, 2, torch.bfloat16) == 8 * 16 * 6


def test_one_line_for_each_combination():
    lines = estimate_table(TINY, [4, 8], [1, 2], [3], batch_size=1).splitlines()
    assert len(lines) == 1 + 2 * 2 * 2
    assert lines[0].split()[:4] == ["GPUs", "seq_len", "r", "checkpointing"]
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["1", "4", "3", "no"],
        ["1", "4", "3", "yes"],
    ]
    assert all(line.endswith("16 24 32 80") for line in lines[1:])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seq_len": 0}, "seq_len: expected at least 1, got 0"),
        ({"seq_len": 4, "gpus": 0}, "gpus: expected at least 1, got 0"),
        ({"seq_len": 4, "batch_size": -1}, "batch_size: expected at least 1, got -1"),
        ({"seq_len": 4, "lora_r": 0}, "lora_r: expected at least 1, got 0"),
        ({"seq_len": 4, "target_modules": ["qproj"]}, "lora_target_modules: expected names"),
        ({"seq_len": 4, "target_modules": []}, "lora_target_modules: expected names"),
        ({"seq_len": 4, "sharding": "tp"}, "sharding: expected one of"),
    ],
)
def test_faulty_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(TINY, **options)


def test_command_line(capsys):
    assert main(["estimate", "--model=llama-70b", "--gpus=[1,8]", "--seq_len=4096"]) == 0
    printed = capsys.readouterr().out
    assert "llama-70b, bfloat16, fsdp, batch 1" in printed
    lines = [line.split() for line in printed.splitlines() if line.strip()[:2] in ("1 ", "8 ")]
    assert [line[0] for line in lines] == ["1", "1", "8", "8"]
    # 131 GiB of weights on one GPU fit none of the cards; with eight an 80 GB card holds its share.
    assert lines[0][-1] == "none" and lines[3][-1] == "80"
    assert "logits never made: 2.94 GiB" in printed


@pytest.mark.parametrize("gpus", ["--gpus=[1,8]", "--gpus=1,8", "--gpus=1, 8"])
@pytest.mark.parametrize("seq_len", ["--seq_len", "--seq-len"])
def test_several_numbers_and_either_spelling(gpus, seq_len, capsys):
    assert main(["estimate", "--model=llama-1b", gpus, seq_len, "512"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:6]]
    assert rows == [["1", "512"], ["1", "512"], ["8", "512"], ["8", "512"]]


def test_what_a_config_leaves_out_is_its_default(capsys, tmp_path):
    content = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    tables = []
    for fields in (content, {**content, **LlamaConfig().to_dict()}):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert main(["estimate", "--model", str(tmp_path)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and "12.55" in tables[0]


@pytest.mark.parametrize(
    "option, message",
    [
        ("--gpus=0", "gpus: expected at least 1, got 0"),
        ("--gpus=[]", "gpus: expected whole numbers, as 1,8, got []"),
        ("--seq_len=1,x", "seq_len: expected whole numbers, as 1,8, got '1,x'"),
        ("--lora-r=1.5", "lora_r: expected whole numbers, as 1,8, got '1.5'"),
    ],
)
def test_command_line_names_what_is_wrong(option, message, capsys):
    assert main(["estimate", "--model=llama-8b", option]) == 1
    assert message in capsys.readouterr().err
