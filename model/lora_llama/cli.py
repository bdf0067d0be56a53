"""`lora-llama`: finetune, generate, verify, merge, demo.

Each command's options are the parameters of one function or dataclass; `--config FILE.yaml` takes
the same names, and the command line wins over it.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import torch


def generate(
    model: str,
    prompt: str,
    adapter: str | None = None,
    system: str | None = None,
    gguf_file: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 42,
) -> None:
    """Answer a prompt.

    Args:
        model: directory or hub id of a Llama, or a directory with an adapter.
        prompt: what to answer; the model's chat template is applied.
        adapter: directory with an adapter to put onto the model.
        system: system message.
        gguf_file: GGUF file inside the model directory.
        dtype: dtype of the base weights.
        max_new_tokens: most tokens to generate.
        temperature: 0 always takes the likeliest token.
        seed: of the sampling.
    """
    from transformers import set_seed

    from lora_llama.generation import generate_answers
    from lora_llama.loading import load_tokenizer

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")
    set_seed(seed)
    llama = _load(model, adapter, gguf_file, dtype)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    tokenizer = load_tokenizer(model, gguf_file)
    print(generate_answers(llama, tokenizer, [messages], max_new_tokens, temperature)[0])


def merge(
    adapter: str,
    output_dir: str,
    model: str | None = None,
    gguf_file: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
) -> None:
    """Merge an adapter into its base model and write a plain checkpoint.

    Args:
        adapter: directory with the adapter.
        output_dir: a new directory for the checkpoint, which any Llama loader reads.
        model: the base model, where it is not the one that the adapter names.
        gguf_file: GGUF file inside the model directory.
        dtype: dtype of the merged weights.
    """
    from lora_llama.loading import base_model_of, load_tokenizer

    if os.path.exists(output_dir) and (not os.path.isdir(output_dir) or os.listdir(output_dir)):
        raise ValueError(f"output_dir: expected a new or empty directory, got {output_dir}")
    base = model or base_model_of(adapter)
    llama = _load(base, adapter, gguf_file, dtype)
    plain = llama.merge_and_unload()
    parent = os.path.dirname(os.path.abspath(output_dir))
    os.makedirs(parent, exist_ok=True)
    # Written beside the target and renamed: the directory is there whole, or not at all.
    staging = tempfile.mkdtemp(dir=parent, prefix=".merge-")
    try:
        plain.save_pretrained(staging)
        load_tokenizer(base, gguf_file).save_pretrained(staging)
        os.chmod(staging, 0o755)
        if os.path.isdir(output_dir):
            os.rmdir(output_dir)
        os.rename(staging, output_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"merged {adapter} into {base}: {output_dir}")


def verify(
    model: str | None = None,
    gguf_file: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "float32",
    lora_r: int = 16,
    tokens: int = 128,
    seed: int = 42,
) -> None:
    """Check every adapter gradient of a model, and compare it with the reference implementation.

    Args:
        model: directory or hub id of a Llama, or a directory with an adapter; the bundled model by
            default.
        gguf_file: GGUF file inside the model directory.
        dtype: dtype of the base weights; the comparison is sharpest in float32.
        lora_r: rank of the adapter that is made where the model has none.
        tokens: length of the random sequence that is trained on.
        seed: of the adapter and the sequence.
    """
    from lora_llama.loading import bundled_model
    from lora_llama.verification import verify_model

    if tokens < 2:
        raise ValueError(f"tokens: expected at least 2, got {tokens}")
    path = str(bundled_model()) if model is None else model
    verify_model(_load(path, None, gguf_file, dtype), lora_r, tokens, seed)


def demo(output_dir: str = "outputs/demo", max_steps: int | None = None) -> None:
    """Fine-tune the bundled SmolLM2-135M-Instruct to extract JSON from free text.

    Args:
        output_dir: where the adapter, loss.png and metrics.json go.
        max_steps: optimizer steps, instead of the demo's 50.
    """
    from lora_llama.demo import run_demo

    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
    run_demo(output_dir, max_steps)


def _finetune(**options: Any) -> None:
    from lora_llama.gradients import gradient_table
    from lora_llama.training import FinetuneOptions, finetune

    settings = FinetuneOptions(**options)
    _, result = finetune(settings)
    print("\ngradients of the first step:")
    print(gradient_table(result.gradients))
    losses = " -> ".join(f"{loss:.3f}" for _, loss in result.eval_losses)
    print(
        f"\n{result.steps} steps, {result.tokens_per_second:.0f} tokens/s, peak memory "
        f"{result.peak_memory_gib:.2f} GiB"
        + (f", held-out loss {losses}" if losses else "")
        + f"\nadapter, loss.png and metrics.json: {settings.output_dir}"
    )


def _load(model: str, adapter: str | None, gguf_file: str | None, dtype: str) -> Any:
    from transformers.utils import logging as transformers_logging

    from lora_llama.model import LoraLlamaForCausalLM
    from lora_llama.training import default_device, resolve_dtype

    transformers_logging.disable_progress_bar()
    device = default_device()
    llama = LoraLlamaForCausalLM.from_pretrained(
        model, gguf_file=gguf_file, dtype=resolve_dtype(dtype, device)
    )
    if adapter is not None:
        name = "default" if not llama.lora_configs else "adapter"
        llama.load_adapter(adapter, name)
        llama.set_adapter(name)
    return llama.to(device)


def _parser() -> Any:
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise ImportError(
            "lora-llama needs its extra: pip install 'lora-kernels[train]'"
        ) from error
    from lora_llama.training import FinetuneOptions

    parser = ArgumentParser(prog="lora-llama", description="Fine-tune a Llama with LoRA.")
    commands = parser.add_subcommands()

    def command(name: str, description: str) -> Any:
        sub = ArgumentParser(description=description)
        sub.add_argument("--config", action="config", help="YAML file with any of these options")
        commands.add_subcommand(name, sub, help=description)
        return sub

    command("finetune", "Fine-tune a Llama on a JSONL file.").add_class_arguments(FinetuneOptions)
    for function in (generate, verify, merge, demo):
        description = (function.__doc__ or "").partition("\n")[0]
        command(function.__name__, description).add_function_arguments(function)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns the exit code: 0, 1 for an error (one line on stderr), 2 for usage."""
    try:
        parser = _parser()
        chosen = parser.parse_args(arguments)
        name = chosen.subcommand
        options = {key: value for key, value in chosen[name].as_dict().items() if key != "config"}
        commands: dict[str, Callable[..., None]] = {
            "finetune": _finetune, "generate": generate, "verify": verify, "merge": merge,
            "demo": demo,
        }  # fmt: skip
        commands[name](**options)
    except torch.OutOfMemoryError as error:
        return _fail(
            f"out of GPU memory: {str(error).splitlines()[0]}\nlower per_device_train_batch_size "
            "or max_length, or set gradient_checkpointing true"
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    return 0


def _fail(message: str) -> int:
    print(f"lora-llama: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
