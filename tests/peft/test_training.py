"""Accelerated models in training: checkpoints, autocast, torch.compile, Trainer and SFTTrainer."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lora_kernels as lk
from lora_kernels.testing import MAX_RATIO, compare

BLOCK = [
    "rms_norm", "lora_linear", "rope", "lora_linear", "rms_norm", "lora_linear", "swiglu",
    "lora_linear",
]  # fmt: skip


def with_checkpoints(model: Any, reentrant: bool) -> Any:
    model.train()
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(models, calls, reentrant):
    plain, fused = models.pair()
    for model in (plain, fused):
        with_checkpoints(model, reentrant)
    models.assert_agree(plain, fused, use_cache=False)
    # Two layers, twice.
    found = calls.of(models.outputs_of, fused, use_cache=False)
    assert found["lora_linear_grouped"] == 8 and found["swiglu"] == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_masks_are_replayed_by_checkpoints(models, reentrant):
    fused = lk.accelerate(models.peft_model(lora_dropout=0.3)).train()
    checkpointed = with_checkpoints(copy.deepcopy(fused), reentrant)
    found = []
    for model in (fused, checkpointed):
        torch.manual_seed(3)
        found.append(models.outputs_of(model, use_cache=False))
    assert list(found[0]) == list(found[1])
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-10, atol=1e-10)
    torch.manual_seed(4)
    other = models.outputs_of(fused, use_cache=False)
    assert not torch.allclose(other["logits"], found[0]["logits"])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_autocast(models, calls, family):
    """A float32 model under bfloat16 autocast is as near to float64 as PEFT's."""
    plain, fused = models.pair(family, torch.float32)
    oracle = models.outputs_of(copy.deepcopy(plain).double())
    with torch.autocast("cpu", torch.bfloat16):
        expected, outputs = models.outputs_of(plain), models.outputs_of(fused)
    assert calls["lora_linear_grouped"] == 4 and calls["apply_rotary_pos_emb"] == 2
    assert all(outputs[name].dtype == tensor.dtype for name, tensor in expected.items())
    for names in (["logits"], [name for name in oracle if name != "logits"]):
        together = [
            torch.cat([found[name].float().flatten() / oracle[name].norm() for name in names])
            for found in (outputs, expected)
        ]
        exact = torch.cat([oracle[name].flatten() / oracle[name].norm() for name in names])
        comparison = compare(*together, exact)
        assert comparison.ratio <= MAX_RATIO, comparison


class Ops:
    """A torch.compile backend that notes which of this package's operations are in the graphs."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        targets = [str(node.target).split(".") for node in graph.graph.nodes]
        self.graphs.append([target[1] for target in targets if target[0] == "lora_kernels"])
        return graph


def block_inputs(model: Any) -> tuple[nn.Module, Tensor, tuple[Tensor, Tensor]]:
    base = model.base_model.model.model
    x = torch.randn(2, 5, 64)
    return base.layers[0], x, base.rotary_emb(x, torch.arange(5)[None])


@pytest.mark.parametrize("mode", ["training", "no_grad", "inference"])
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_block_is_one_graph_of_fused_operations(models, mode):
    model = lk.accelerate(models.peft_model(dtype=torch.float32, lora_dropout=0.1))
    block, x, tables = block_inputs(model.train(mode == "training"))
    ops = Ops()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=ops)
    with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode == "training"):
        for _ in range(2):
            torch.manual_seed(3)
            y = compiled(x, position_embeddings=tables)
        torch.manual_seed(3)
        torch.testing.assert_close(y, block(x, position_embeddings=tables))
    assert ops.graphs == [BLOCK]


def test_a_compiled_block_switches_adapters_and_has_pefts_gradients(models):
    plain, fused = models.pair()
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("b", models.lora_config(r=6))
    torch._dynamo.reset()
    (block, x, tables), (fused_block, *_) = (block_inputs(model) for model in (plain, fused))
    x, tables = x.double(), tuple(table.double() for table in tables)
    compiled = torch.compile(fused_block, fullgraph=True, backend="aot_eager")
    for name in ("default", "b"):
        for model in (plain, fused):
            model.set_adapter(name)
            model.zero_grad()
        expected, y = (f(x, position_embeddings=tables) for f in (block, compiled))
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        expected.sin().sum().backward(), y.sin().sum().backward()
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=1e-10)
        assert block.mlp.up_proj.lora_A[name].weight.grad.any()


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_block_takes_a_hot_swapped_adapter_without_compiling_again(models, tmp_path):
    other = models.peft_model(r=3, lora_alpha=5)
    other.save_pretrained(tmp_path)
    plain, fused = models.pair()
    for model in (plain, fused):
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    (block, x, tables), (fused_block, *_) = (block_inputs(model) for model in (plain, fused))
    x, tables = x.double(), tuple(table.double() for table in tables)
    torch._dynamo.reset()
    ops = Ops()
    compiled = torch.compile(fused_block, fullgraph=True, backend=ops)
    outputs = []
    with torch.no_grad():
        for _ in range(2):
            outputs.append(compiled(x, position_embeddings=tables))
            expected = block(x, position_embeddings=tables)
            torch.testing.assert_close(outputs[-1], expected, rtol=0, atol=1e-10)
            for model in (plain, fused):
                hotswap_adapter(model, tmp_path, "default")
    assert not torch.allclose(*outputs) and len(ops.graphs) == 1


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def loss_curve(trainer: Trainer) -> list[tuple[float, float]]:
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [(entry["loss"], entry["grad_norm"]) for entry in log]


def assert_same_curve(plain: list[tuple[float, float]], fused: list[tuple[float, float]]) -> None:
    """In float64 to the last digit that is logged; every step sees all rows, and learns."""
    assert len(plain) == 3 and plain[-1][0] < plain[0][0]
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_trainer_has_pefts_loss_curve(models, calls, tmp_path: Path, checkpoints):
    curves = []
    for model in models.pair():
        arguments = TrainingArguments(
            str(tmp_path), gradient_checkpointing=checkpoints, bf16=False, **SETTINGS
        )
        trainer = Trainer(model, arguments, train_dataset=Rows(models.token_ids(4)))
        curves.append(loss_curve(trainer))
    assert_same_curve(*curves)
    forwards = 3 * 2 * (2 if checkpoints else 1)
    assert calls["lora_linear_grouped"] == 4 * forwards and calls["swiglu"] == 2 * forwards


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<end>", "<unk>", *(f"w{index}" for index in range(60))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def test_sft_trainer_has_pefts_loss_curve(models, calls, tmp_path: Path):
    texts = [" ".join(f"w{(3 * i + j * j) % 60}" for j in range(4 + i % 5)) for i in range(4)]
    curves = []
    for model in models.pair():
        arguments = SFTConfig(
            str(tmp_path), max_length=32, gradient_checkpointing=False, bf16=False, **SETTINGS
        )
        trainer = SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tokenizer_of_words(),
        )
        curves.append(loss_curve(trainer))
    assert_same_curve(*curves)
    assert calls["lora_linear_grouped"] == 4 * 3 * 2 and calls["apply_rotary_pos_emb"] == 2 * 3 * 2
