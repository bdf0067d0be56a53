"""The demo as a user runs it, from the first line it prints to an adapter that PEFT reads."""

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_llama import demo_task
from lora_llama.data import encode_prompt
from lora_llama.demo import run_demo
from lora_llama.gradients import capture_lora_weights
from lora_llama.loading import load_tokenizer
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import ALL_PROJECTIONS

STEPS = demo_task.DEMO_SETTINGS.max_steps


# All of it takes two minutes on two free cores, and longer beside other tests.
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("steps", [16, pytest.param(STEPS, marks=pytest.mark.long)])
def test_the_demo(steps: int, smollm2: Path, tmp_path: Path, monkeypatch, capsys):
    initial = {}
    build = LoraLlamaForCausalLM.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        model = build(cls, *args, **kwargs)
        initial.update(capture_lora_weights(model))
        return model

    monkeypatch.setattr(LoraLlamaForCausalLM, "from_pretrained", classmethod(from_pretrained))
    output = tmp_path / "demo"
    record = run_demo(str(output), None if steps == STEPS else steps)
    monkeypatch.undo()
    shown = capsys.readouterr()

    # It learned, by the loss and by its answers to unseen messages.
    before, after = record["held_out_loss_before"], record["held_out_loss_after"]
    assert after <= 0.7 * before
    assert record["exact_match_before"] <= 2
    if steps == STEPS:
        assert record["exact_match_after"] >= 6

    # What is written is what was shown.
    assert json.loads((output / "demo.json").read_text()) == record
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["steps"] == steps and STEPS == 50
    assert len(metrics["train_losses"]) == steps and len(metrics["gradients"]) == 30 * 7
    assert [step for step, _ in metrics["eval_losses"]] == [0, steps]
    assert all(row["b_is_zero"] and row["lora_b"] > 0 for row in metrics["gradients"])
    assert 0.5 < metrics["peak_memory_gib"] < 16 and metrics["tokens_per_second"] > 1
    image = matplotlib.image.imread(output / "loss.png")
    assert image.shape == (600, 1050, 4)
    assert len({tuple(pixel) for pixel in image[::4, ::4, :3].reshape(-1, 3)}) > 20

    # Every A and B of every layer has changed.
    model = LoraLlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    trained = capture_lora_weights(model)
    assert len(initial) == len(trained) == 2 * 7 * 30
    assert [name for name in initial if torch.equal(initial[name], trained[name])] == []

    # PEFT reads the adapter, and computes the same with it.
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, output).eval()
    prompt = demo_task.held_out_rows(1)[0]["messages"][:-1]
    ids = encode_prompt(prompt, load_tokenizer(str(output)))[None]
    with torch.no_grad():
        expected, logits = model.eval()(ids).logits, theirs(ids).logits
        with theirs.disable_adapter():
            assert (theirs(ids).logits - expected).norm() > 0.1 * expected.norm()
    assert (logits - expected).norm() <= 1e-4 * expected.norm()
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))

    # What the user sees.
    assert shown.out.startswith("device: ")
    assert f"base weights {record['dtype']}, adapter float32" in shown.out
    assert "trainable params: 4,884,480 || all params: 139,399,488" in shown.out
    plan, gradients = shown.out.partition("before training")[::2]
    for projection in ALL_PROJECTIONS:
        assert f".{projection} " in plan
        assert f"\n{projection} " in gradients
    for row in demo_task.held_out_rows(3):
        assert shown.out.count(f"message:  {row['messages'][1]['content']}\n") == 2
        assert shown.out.count(f"expected: {row['messages'][2]['content']}\n") == 2
    assert shown.out.count("  answer:   ") == 6
    assert f"held-out loss  {before:.3f} -> {after:.3f}" in shown.out
    assert f"{record['exact_match_before']}/32 -> {record['exact_match_after']}/32" in shown.out
    for command in ("generate", "merge", "verify", "finetune"):
        assert f"  lora-llama {command} --" in shown.out
    assert f"{steps}/{steps}" in shown.err and "loss=" in shown.err and "tokens/s=" in shown.err
    assert "Traceback" not in shown.err and "Warning" not in shown.err
