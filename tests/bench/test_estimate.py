"""Calculated memory against the measured peak of a training with an evaluation in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_llama.estimate import estimate_memory

ROOT = Path(__file__).parent.parent.parent
TOLERANCE = 0.10
SHAPES = {
    "wide": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
             "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
             "vocab_size": 4096, "tie_word_embeddings": False},
    "deep": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12,
             "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
             "vocab_size": 8192, "tie_word_embeddings": True},
}  # fmt: skip

# Steps in a process of their own: its largest resident set, less what it had before the model.
STEP = """
import json, sys
import torch
import lora_kernels as lk
from bench.memory import reset_resident_peak, resident_peak
from lora_llama import LoraLlama
from transformers import LlamaConfig

content, length, checkpointing = json.loads(sys.argv[1])
torch.set_num_threads(1)
targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def step(config, length):
    lora = lk.LoraConfig(r=16, target_modules=targets, init_lora_weights=False)
    model = LoraLlama(LlamaConfig(**config), lora=lora).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    reset_resident_peak()
    # The first of the two makes the optimizer's moments.
    for tokens in (8, length):
        ids = torch.randint(0, config["vocab_size"], (2, tokens))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, labels=ids, loss_per_row=True)
        model.train()


# A first step, of next to nothing, imports and sets up what no later step does.
small = {**content, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64}
step(small, 8)
reset_resident_peak()
before = resident_peak()
step(content, length)
print(resident_peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "checkpointing"])
@pytest.mark.parametrize("shape", SHAPES)
def test_within_a_tenth_of_the_measured_peak(shape, checkpointing):
    config, length = SHAPES[shape], 1024
    done = subprocess.run(
        [sys.executable, "-c", STEP, json.dumps([config, length, checkpointing])],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'model'}",
            # glibc gives every larger block back at once.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split()[-1])
    estimate = estimate_memory(
        config, length, 2, dtype=torch.float32, device_type="cpu",
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    calculated = estimate.total
    print(f"{shape}: calculated {calculated / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert abs(calculated / measured - 1) <= TOLERANCE
