"""The demo: a real Llama learns to turn customers' messages into JSON, on a laptop's CPU.

SmolLM2-135M-Instruct, `demo_task.py`'s generated rows, 50 optimizer steps. Everything printed is
measured in the run itself.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

import lora_kernels as lk
from lora_kernels.layers import lora_layers
from lora_llama import demo_task
from lora_llama.generation import generate_answers
from lora_llama.gradients import gradient_table
from lora_llama.loading import bundled_model, load_tokenizer, write_json
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import FinetuneOptions, default_device, resolve_dtype
from lora_llama.training import build_trainer, encode_rows, train_and_save

SHOWN = 3


def run_demo(output_dir: str = "outputs/demo", max_steps: int | None = None) -> dict[str, Any]:
    """Runs the demo and writes the adapter, loss.png and metrics.json into `output_dir`.

    Args:
        max_steps: optimizer steps, instead of the demo's own number.

    Returns:
        What metrics.json's "demo" holds: held-out loss and exact match before and after.

    Raises:
        ImportError: the bundled model is not installed.
    """
    settings = demo_task.DEMO_SETTINGS
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = default_device()
    dtype = resolve_dtype("auto", device)
    path = bundled_model()
    names = {option.name for option in fields(FinetuneOptions)}
    chosen = {name: value for name, value in asdict(settings).items() if name in names}
    if max_steps is not None:
        chosen["max_steps"] = max_steps
    options = FinetuneOptions(
        model=str(path),
        data="(generated)",
        output_dir=output_dir,
        per_device_eval_batch_size=8,
        **chosen,
    )
    set_seed(options.seed)
    tokenizer = load_tokenizer(str(path))
    model = LoraLlamaForCausalLM.from_pretrained(path, lora=options.lora_config(), dtype=dtype)
    model = model.to(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"device: {name}{threads}; base weights {str(dtype).removeprefix('torch.')}, ", end="")
    _, layer = next(lora_layers(model))
    print(f"adapter {str(layer.lora_A['default'].dtype).removeprefix('torch.')}")
    model.print_trainable_parameters()
    tokens = settings.per_device_train_batch_size * settings.max_length
    print(f"\nwhat runs in each projection, for up to {tokens} tokens a step:")
    print(lk.status(model.train(), tokens))

    train_rows = demo_task.training_rows(settings.num_train_rows)
    eval_rows = demo_task.held_out_rows(settings.num_held_out_rows)
    test_rows = demo_task.held_out_rows(settings.num_exact_match_rows)
    print("\nbefore training, three held-out messages:")
    matched_before = show_answers(model, tokenizer, test_rows)

    trainer = build_trainer(
        model,
        tokenizer,
        options.training_arguments(has_eval=True),
        encode_rows(train_rows, tokenizer, options),
        encode_rows(eval_rows, tokenizer, options),
    )
    print(f"\ntraining on {len(train_rows)} rows, {options.max_steps} steps:")
    result = train_and_save(trainer)
    print("\ngradients of the first step (every tensor of the adapter was checked):")
    print(gradient_table(result.gradients))

    print("\nafter training, the same three messages:")
    matched_after = show_answers(model, tokenizer, test_rows)
    first, last = result.eval_losses[0][1], result.eval_losses[-1][1]
    record = {
        "model": path.name,
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "held_out_loss_before": first,
        "held_out_loss_after": last,
        "held_out_rows": len(eval_rows),
        "exact_match_before": matched_before,
        "exact_match_after": matched_after,
        "exact_match_rows": len(test_rows),
    }
    metrics = Path(output_dir) / "demo.json"
    write_json(metrics, record)
    rows = len(test_rows)
    print(
        f"\nheld-out loss  {first:.3f} -> {last:.3f}  ({1 - last / first:.0%} lower, "
        f"{len(eval_rows)} rows)\n"
        f"exact match    {matched_before}/{rows} -> {matched_after}/{rows}\n"
        f"training       {result.seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s, "
        f"peak memory {result.peak_memory_gib:.2f} GiB\n\n"
        f"written to {output_dir}: adapter_model.safetensors and adapter_config.json (PEFT's "
        "format),\nloss.png, metrics.json, demo.json. Next:\n\n"
        f"  lora-llama generate --model {output_dir} \\\n"
        f'    --system "{demo_task.SYSTEM_PROMPT}" \\\n'
        '    --prompt "Hello, please send 4 kettles to Oslo, there is no hurry. Thanks, Ida"\n'
        f"  lora-llama merge --adapter {output_dir} --output_dir outputs/merged\n"
        f"  lora-llama verify --model {output_dir}\n"
        "  lora-llama finetune --model PATH_OR_ID --data FILE.jsonl"
    )
    return record


def show_answers(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> int:
    """Generates the answers to held-out rows, prints the first three, counts the exact ones."""
    prompts = [row["messages"][:-1] for row in rows]
    answers = generate_answers(
        model, tokenizer, prompts, demo_task.DEMO_SETTINGS.max_new_tokens, batch_size=32
    )
    for row, answer in list(zip(rows, answers, strict=True))[:SHOWN]:
        print(f"  message:  {row['messages'][1]['content']}")
        print(f"  expected: {row['messages'][-1]['content']}")
        print(f"  answer:   {' '.join(answer.split())}\n")
    return sum(
        demo_task.exact_match(answer, row) for row, answer in zip(rows, answers, strict=True)
    )
