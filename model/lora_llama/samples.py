"""Answers of a model in training to the prompts of held-out rows, to be read beside the loss."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_llama import disk
from lora_llama.data import Row, encode_prompt, row_format
from lora_llama.generation import Prompt, generate_answers

MAX_NEW_TOKENS = 64


def prompt_and_answer(row: Row, has_template: bool) -> tuple[Prompt, str] | None:
    """What a row's last answer replies to, and that answer; None for a row of text.

    Args:
        row: a row in one of the formats of `data.py`.
        has_template: whether the tokenizer renders a prompt; without a template, what stands
            between an Alpaca row's instruction and its output belongs to the prompt.
    """
    kind = row_format(row)
    if kind == "text":
        return None
    if kind == "instruction":
        prompt = row["instruction"]
        if row.get("input"):
            prompt = f"{prompt}\n\n{row['input']}"
        return (prompt if has_template else f"{prompt}\n\n"), row["output"]
    if kind == "prompt" and isinstance(row["prompt"], str):
        return row["prompt"], row["completion"]
    messages = row["messages"] if kind == "messages" else row["prompt"] + row["completion"]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last]["content"]


class EvalSamples(TrainerCallback):
    """With each evaluation, answers to the prompts of held-out rows: printed, and kept in a file.

    output_dir/samples.jsonl gets one line for each: {"step", "prompt", "expected", "answer"}. The
    answers are the likeliest, so that those of two steps can be compared.

    Args:
        rows: held-out rows, in the formats of `data.py`. Whether they are packed for the loss is no
            matter here.
        tokenizer: its chat template renders the prompts.
        count: how many; rows of text, and those whose prompts are longer than `max_length` tokens,
            are passed over.

    Raises:
        ValueError: no row has such a prompt.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        max_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.prompts: list[Prompt] = []
        self.expected: list[str] = []
        for row in rows:
            if len(self.prompts) == count:
                break
            pair = prompt_and_answer(row, bool(getattr(tokenizer, "chat_template", None)))
            if pair is not None and 0 < len(encode_prompt(pair[0], tokenizer)) <= max_length:
                self.prompts.append(pair[0])
                self.expected.append(pair[1])
        if not self.prompts:
            raise ValueError(
                f"eval_samples: expected a held-out row with a prompt of at most {max_length} "
                "tokens, found none"
            )

    def on_evaluate(self, args, state, control, model: Any = None, **kwargs: Any) -> None:
        # In every process: a model that is sharded over them is run by all.
        answers = generate_answers(model, self.tokenizer, self.prompts, MAX_NEW_TOKENS)
        if not state.is_world_process_zero:
            return
        lines = ""
        for prompt, expected, answer in zip(self.prompts, self.expected, answers, strict=True):
            record = {"prompt": prompt, "expected": expected, "answer": answer}
            lines += json.dumps({"step": state.global_step, **record}) + "\n"
            shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            # Above the bar, not through it.
            tqdm.write(
                f"step {state.global_step}  {_shortened(shown)}\n"
                f"    expected  {_shortened(expected)}\n    answer    {_shortened(answer)}"
            )
        output_dir = Path(args.output_dir)
        if not output_dir.exists():
            disk.make_directory(output_dir)
        disk.append_file(output_dir / "samples.jsonl", lines.encode())


def _shortened(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
