"""`lora-llama`: finetune, generate, verify, merge, estimate, demo.

Each command's options are the parameters of one function or dataclass; `--config FILE.yaml` takes
the same names, and the command line wins over it.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from lora_kernels.adapter_files import read_adapter_outline
from lora_llama.checkpoint_files import one_line
from lora_llama.demo import run_demo
from lora_llama.estimate import estimate
from lora_llama.generation import generate_answers
from lora_llama.gradients import GradientError, gradient_table
from lora_llama.interrupts import TrainingInterrupted
from lora_llama.loading import (
    base_model_of,
    bundled_model,
    check_writable,
    is_adapter_directory,
    load_tokenizer,
)
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import (
    MAX_RANK,
    DtypeName,
    FinetuneOptions,
    check_range,
    check_seed,
    default_device,
    resolve_dtype,
)
from lora_llama.training import finetune
from lora_llama.verification import verify_model

# The logits of a model, divided by a temperature within these, are finite and differ.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
# Of a sequence to verify on: longer than any Llama's.
MAX_TOKENS = 2**20


def generate(
    model: str,
    prompt: str,
    adapter: str | None = None,
    system: str | None = None,
    gguf_file: str | None = None,
    dtype: DtypeName = "auto",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 42,
) -> None:
    """Answer a prompt.

    Args:
        model: directory or hub id of a Llama, or a directory with an adapter.
        prompt: what to answer, through the model's chat template if it has one.
        adapter: directory with an adapter to put onto the model.
        system: system message.
        gguf_file: GGUF file inside the model directory.
        dtype: dtype of the base weights.
        max_new_tokens: most tokens to generate.
        temperature: 0 always takes the likeliest token; else from 0.001 to 1000.
        seed: of the sampling.
    """
    if not prompt.strip():
        raise ValueError(f"prompt: expected text, got {prompt!r}")
    check_range("max_new_tokens", max_new_tokens, 1)
    check_range("temperature", temperature, 0, MAX_TEMPERATURE)
    if 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(
            f"temperature: expected 0, or at least {MIN_TEMPERATURE}, got {temperature}"
        )
    check_seed(seed)
    _check_names(model=model, gguf_file=gguf_file)
    if adapter is not None:
        _check_named(adapter)
    llama = _load(model, adapter, gguf_file, dtype)
    tokenizer = load_tokenizer(model, gguf_file)
    request: str | list[dict[str, str]] = prompt
    if system:
        request = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    set_seed(seed)
    print(generate_answers(llama, tokenizer, [request], max_new_tokens, temperature)[0])


def merge(
    adapter: str,
    output_dir: str,
    model: str | None = None,
    gguf_file: str | None = None,
    dtype: DtypeName = "auto",
) -> None:
    """Merge an adapter into its base model and write a plain checkpoint.

    Args:
        adapter: directory with the adapter.
        output_dir: a new directory for the checkpoint, which any Llama loader reads.
        model: the base model, where it is not the one that the adapter names.
        gguf_file: GGUF file inside the model directory.
        dtype: dtype of the merged weights; auto is that of the base model's.
    """
    is_new = bool(output_dir) and not os.path.exists(output_dir)
    if not is_new and (not os.path.isdir(output_dir) or os.listdir(output_dir)):
        raise ValueError(f"output_dir: expected a new or empty directory, got {output_dir!r}")
    parent = os.path.dirname(os.path.abspath(output_dir))
    for directory in (output_dir, parent):
        check_writable("output_dir", directory)
    _check_named(adapter)
    _check_names(model=model, gguf_file=gguf_file)
    base = base_model_of(adapter) if model is None else model
    llama = _load(base, adapter, gguf_file, dtype, keep_dtype=True)
    tokenizer = load_tokenizer(base, gguf_file)
    plain = llama.merge_and_unload()
    os.makedirs(parent, exist_ok=True)
    # Written beside the target and renamed: the directory is there whole, or not at all.
    staging = tempfile.mkdtemp(dir=parent, prefix=".merge-")
    try:
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
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
    dtype: DtypeName = "float32",
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
    check_seed(seed)
    check_range("lora_r", lora_r, 1, MAX_RANK)
    check_range("tokens", tokens, 2, MAX_TOKENS)
    _check_names(model=model, gguf_file=gguf_file)
    path = str(bundled_model()) if model is None else model
    verify_model(_load(path, None, gguf_file, dtype), lora_r, tokens, seed)


def demo(output_dir: str = "outputs/demo", max_steps: int | None = None) -> None:
    """Fine-tune the bundled SmolLM2-135M-Instruct to extract JSON from free text.

    Args:
        output_dir: where the adapter, loss.png and metrics.json go.
        max_steps: optimizer steps, instead of the demo's 50.
    """
    if max_steps is not None:
        check_range("max_steps", max_steps, 1)
    if not output_dir:
        raise ValueError("output_dir: expected a directory, got ''")
    check_writable("output_dir", output_dir)
    run_demo(output_dir, max_steps)


def _check_names(**options: str | None) -> None:
    for name, value in options.items():
        if value == "":
            raise ValueError(f"{name}: expected a name, got ''")


def _check_named(adapter: str) -> None:
    if not adapter:
        raise ValueError("adapter: expected a directory, got ''")


def _check_not_null(command: Callable[..., None], options: dict[str, Any]) -> None:
    """Refuses a config file's null where an option has to be something; the parser lets it pass."""
    kinds = get_type_hints(command)
    for name, value in options.items():
        if value is None and name in kinds and type(None) not in get_args(kinds[name]):
            raise ValueError(f"{name}: expected a value, got null")


def _finetune(**options: Any) -> None:
    settings = FinetuneOptions(**options)
    trainer, result = finetune(settings)
    if not trainer.is_world_process_zero():
        return
    if result.gradients:
        print("\ngradients of the first step (every tensor of the adapter was checked):")
        print(gradient_table(result.gradients))
    mfu = "" if result.mfu is None else f", MFU {result.mfu:.1%}"
    print(
        f"\n{result.steps} steps, {result.tokens_per_second:.0f} tokens/s, peak memory "
        f"{result.peak_memory_gib:.2f} GiB{mfu}"
    )
    if result.eval_losses:
        print(f"held-out loss {result.eval_losses[0][1]:.3f} -> {result.eval_losses[-1][1]:.3f}")
    print(f"adapter, loss.png and metrics.json: {settings.output_dir}")


def _how_to_resume(interrupt: TrainingInterrupted, arguments: list[str]) -> str:
    """Where an interrupted training is saved, and the command that goes on with it."""
    if interrupt.adapter is not None:
        return str(interrupt)
    if interrupt.checkpoint is None:
        return "no checkpoint was saved; --save_steps saves them"
    if arguments[:1] != ["finetune"]:
        return str(interrupt)
    kept, skips = [], False
    for argument in arguments:
        if skips:
            skips = False
        elif _with_underscores(argument) == "--resume_from_checkpoint":
            skips = True
        elif not _with_underscores(argument).startswith("--resume_from_checkpoint="):
            kept.append(argument)
    resume = ["--resume_from_checkpoint", interrupt.checkpoint]
    # accelerate's launcher of a single process sets no rank.
    if not {"RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return f"{interrupt}; to go on:\n  {shlex.join(['lora-llama', *kept, *resume])}"
    launcher = _launcher(arguments)
    if launcher is None:
        return f"{interrupt}; to go on: the same launch command, with {shlex.join(resume)}"
    here = ""
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        here = " (on this machine; each has its own launch command)"
    return f"{interrupt}; to go on{here}:\n  {shlex.join([*launcher, *kept, *resume])}"


def _launcher(arguments: list[str]) -> list[str] | None:
    """What comes before the arguments in the command that has started this process.

    torchrun and `accelerate launch` pass their own options on in no other way.
    """
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return None
    command = [os.fsdecode(word) for word in parent.split(b"\0")[:-1]]
    start = len(command) - len(arguments)
    return command[:start] if start > 0 and command[start:] == arguments else None


def _load(
    model: str,
    adapter: str | None,
    gguf_file: str | None,
    dtype: DtypeName,
    keep_dtype: bool = False,
) -> Any:
    """The model with its adapter, in the dtype that suits the device, or (kept) the file's own."""
    if adapter is not None:
        if is_adapter_directory(model):
            raise ValueError(
                f"model: expected the base model of {adapter}, got an adapter: {model}"
            )
        # What is wrong with it is known before the base model has been read.
        read_adapter_outline(adapter)
    transformers_logging.disable_progress_bar()
    device = default_device()
    wanted = "auto" if keep_dtype and dtype == "auto" else resolve_dtype(dtype, device)
    llama = LoraLlamaForCausalLM.from_pretrained(model, gguf_file=gguf_file, dtype=wanted)
    if adapter is not None:
        llama.load_adapter(adapter)
        llama.set_adapter("default")
    return llama.to(device)


# Errors come back to `main`, which prints them without the usage of forty options.
_PARSER_OPTIONS = {"exit_on_error": False, "allow_abbrev": False}


def _parser() -> Any:
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise ImportError(
            "lora-llama needs its extra: pip install 'lora-kernels[train]'"
        ) from error

    parser = ArgumentParser(
        prog="lora-llama", description="Fine-tune a Llama with LoRA.", **_PARSER_OPTIONS
    )
    commands = parser.add_subcommands()

    def command(name: str, description: str) -> Any:
        sub = ArgumentParser(description=description, **_PARSER_OPTIONS)
        sub.add_argument("--config", action="config", help="YAML file with any of these options")
        commands.add_subcommand(name, sub, help=description)
        return sub

    command("finetune", "Fine-tune a Llama on a JSONL file.").add_class_arguments(FinetuneOptions)
    for function in (generate, verify, merge, estimate, demo):
        description = (function.__doc__ or "").partition("\n")[0]
        command(function.__name__, description).add_function_arguments(function)
    return parser


def _with_underscores(argument: str) -> str:
    """--seq-len is --seq_len."""
    name, equals, value = argument.partition("=")
    if re.fullmatch(r"--[a-z][\w-]*", name):
        name = f"--{name[2:].replace('-', '_')}"
    return f"{name}{equals}{value}"


def _config_first(arguments: list[str]) -> list[str]:
    """The arguments with --config right behind the command: jsonargparse lets what is later win."""
    options: dict[str, Any] = {"add_help": False, "allow_abbrev": False, "exit_on_error": False}
    finder = argparse.ArgumentParser(**options)
    finder.add_argument("--config", action="append", default=[])
    found, rest = finder.parse_known_args(arguments)
    for file in found.config:
        if not file:
            raise argparse.ArgumentError(None, "--config: expected a file, got ''")
        _check_config_file(file)
    return rest[:1] + [f"--config={file}" for file in found.config] + rest[1:]


def _check_config_file(file: str) -> None:
    """What is wrong inside a file that exists: jsonargparse names the fault, but not the file."""
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise argparse.ArgumentError(
            None, f"--config {file}: not YAML: {one_line(error)}"
        ) from error
    except (OSError, ValueError):
        return
    if not isinstance(content, dict):
        raise argparse.ArgumentError(
            None,
            f"--config {file}: expected lines of the form option: value, got "
            f"{type(content).__name__}",
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0; 1 for an error, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM, each
        with one message on stderr.
    """
    name = None
    given = sys.argv[1:] if arguments is None else arguments
    try:
        parser = _parser()
        chosen = parser.parse_args(_config_first(list(map(_with_underscores, given))))
        name = chosen.subcommand
        options = {key: value for key, value in chosen[name].as_dict().items() if key != "config"}
        commands: dict[str, Callable[..., None]] = {
            "finetune": _finetune, "generate": generate, "verify": verify, "merge": merge,
            "estimate": estimate, "demo": demo,
        }  # fmt: skip
        _check_not_null(commands[name], options)
        commands[name](**options)
    except argparse.ArgumentError as error:
        return _fail(f"{' '.join(str(error).split())} (--help lists commands and options)", 2)
    except GradientError as error:
        return _fail(str(error))
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(one_line(error))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        advice = {
            "finetune": "lower per_device_train_batch_size, max_length or lora_r, or set "
            "gradient_checkpointing true",
            "verify": "lower lora_r or tokens, or choose a smaller model",
        }.get(str(name), "choose a smaller model, or dtype bfloat16")
        kind = "GPU memory" if "CU" in str(error) else "memory"
        return _fail(f"out of {kind}: {str(error).partition(chr(10))[0]}\n{advice}")
    except TrainingInterrupted as error:
        word = "interrupted" if error.signal == signal.SIGINT else "terminated"
        code = 128 + error.signal
        # Of several processes one says it.
        if os.environ.get("RANK", "0") != "0":
            return code
        return _fail(f"{word}; {_how_to_resume(error, given)}", code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    # Only the caching allocator of a GPU has a type of error for it.
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in str(error) for sign in signs
    )


def _fail(message: str, code: int = 1) -> int:
    print(f"lora-llama: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
