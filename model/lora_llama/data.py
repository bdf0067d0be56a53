"""A JSONL file of examples, turned into token ids and labels; `batching.py` makes batches of them.

    read_jsonl -> split_dataset -> encode_row

Each line is one JSON object in one of four formats, told apart by its keys, in this order:

    messages               [{"role": ..., "content": ...}, ...]: every assistant turn is trained
    prompt, completion     two strings, or two lists of messages: the completion is trained
    instruction[, input], output       Alpaca's keys: the output is trained
    text                   one string, all of it trained

Whatever is not trained keeps its tokens and gets the label -100. Conversations are rendered by the
tokenizer's own chat template; a prompt and completion given as strings, and Alpaca rows, become a
user turn and an assistant turn. For a tokenizer without a template they are joined as they stand,
and the end-of-sequence token is appended.

Shapes: T tokens in a row. All tensors are torch.int64.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
ROLES = ("system", "developer", "user", "assistant", "tool")
FORMATS = "messages; prompt + completion; instruction [+ input] + output; text"

Row = dict[str, Any]
Message = dict[str, Any]
Encoded = dict[str, torch.Tensor]
T = TypeVar("T")


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: holds half of a surrogate pair, which is not text") from error


def _check_messages(messages: Any, name: str) -> None:
    if not isinstance(messages, list):
        raise ValueError(f"{name}: expected a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError(f"{name}: expected at least one message, got an empty list")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(
                f"{name}[{i}]: expected an object with role and content, "
                f"got {type(message).__name__}"
            )
        if missing := [key for key in ("role", "content") if key not in message]:
            raise ValueError(f"{name}[{i}]: no {' and no '.join(missing)}; got {sorted(message)}")
        if message["role"] not in ROLES:
            raise ValueError(
                f"{name}[{i}].role: expected one of {', '.join(ROLES)}; got {message['role']!r}"
            )
        _check_text(message["content"], f"{name}[{i}].content")


def _check_trains(messages: list[Message], name: str) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{name}: no assistant turn, so there is nothing to train on")


def row_format(row: Row) -> str:
    """Checks one row and names its format: "messages", "prompt", "instruction" or "text".

    Raises:
        ValueError: the keys fit no format, or a value has the wrong type; the message names the
            key, what was expected and what came.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    if "messages" in row:
        _check_messages(row["messages"], "messages")
        _check_trains(row["messages"], "messages")
        if row["messages"][0]["role"] == "assistant":
            raise ValueError("messages[0]: an assistant turn needs a turn before it to answer")
        return "messages"
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            _check_messages(prompt, "prompt")
            _check_messages(completion, "completion")
            _check_trains(completion, "completion")
        elif isinstance(prompt, list) or isinstance(completion, list):
            raise ValueError(
                "prompt and completion: expected two strings or two lists of messages, "
                f"got {type(prompt).__name__} and {type(completion).__name__}"
            )
        else:
            _check_text(prompt, "prompt")
            _check_text(completion, "completion")
        return "prompt"
    if "instruction" in row and "output" in row:
        _check_text(row["instruction"], "instruction")
        _check_text(row["output"], "output")
        # Exports of Alpaca write null for "no input".
        if row.get("input") is not None:
            _check_text(row["input"], "input")
        return "instruction"
    if "text" in row:
        _check_text(row["text"], "text")
        return "text"
    raise ValueError(f"keys {sorted(row)} fit no format; accepted are {FORMATS}")


def read_located(path: str | Path) -> Iterator[tuple[str, Row]]:
    """Yields each row of a JSON Lines file, checked, after its place "FILE:LINE".

    The file is UTF-8; blank lines are skipped.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file holds no rows, or a line is not UTF-8, not JSON, not an object or fits
            no format; the message begins with FILE:LINE.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a JSON Lines file, got a directory")
    found = False
    # utf-8-sig: editors on Windows begin a file with a byte order mark. A byte that is not UTF-8
    # comes through as half of a surrogate pair, so that it is found in its line.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            if not found and line.lstrip().startswith("["):
                raise ValueError(
                    f"{place}: a JSON array; expected JSON Lines, one object on each line"
                )
            found = True
            try:
                row = _parse(line)
                row_format(row)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            yield place, row
    if not found:
        raise ValueError(f"{path}: no rows")


def _parse(line: str) -> Any:
    try:
        line.encode()
        return json.loads(line.rstrip())
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        raise ValueError(f"not UTF-8 text: byte {byte:#x} at column {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not JSON: {error.msg} at column {error.colno}; expected one object on each line"
        ) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_jsonl(path: str | Path) -> list[Row]:
    """Every row of a JSON Lines file; see `read_located`, also for the errors."""
    return [row for _, row in read_located(path)]


def split_dataset(rows: Sequence[T], val_set_size: float, seed: int) -> tuple[list[T], list[T]]:
    """Splits rows into (training, held-out), by chance but the same way for the same seed.

    Args:
        rows: any sequence; both parts keep its order.
        val_set_size: below 1 the fraction to hold out (at least one row), from 1 up the number of
            rows; 0 holds out nothing.
        seed: for Python's own generator, whose results do not depend on the torch version.

    Raises:
        ValueError: `val_set_size` is negative or a fraction above 1, or leaves no training row.
    """
    if val_set_size < 0 or (val_set_size > 1 and val_set_size != int(val_set_size)):
        raise ValueError(
            f"val_set_size: expected a fraction below 1 or a number of rows, got {val_set_size}"
        )
    if val_set_size >= 1 or val_set_size == 0:
        count = int(val_set_size)
    else:
        count = max(1, round(val_set_size * len(rows)))
    if count >= len(rows):
        raise ValueError(
            f"val_set_size: holding out {count} of {len(rows)} rows leaves nothing to train on"
        )
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for i, row in enumerate(rows) if i not in held_out],
        [row for i, row in enumerate(rows) if i in held_out],
    )


def _conversation(row: Row, kind: str) -> tuple[list[Message], int]:
    """The row's messages, and the index of the first that may be trained."""
    if kind == "messages":
        return row["messages"], 0
    if kind == "prompt" and isinstance(row["prompt"], list):
        return row["prompt"] + row["completion"], len(row["prompt"])
    if kind == "prompt":
        prompt, completion = row["prompt"], row["completion"]
    else:
        prompt, completion = row["instruction"], row["output"]
        if row.get("input"):
            prompt = f"{prompt}\n\n{row['input']}"
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    ], 1


def _common_prefix(a: list[int], b: list[int]) -> int:
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool = False
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        # A template is the checkpoint's own program, and raises what it likes.
        raise ValueError(f"the tokenizer's chat template refuses the messages: {error}") from error


def _tokenize(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    # The template writes the special tokens itself.
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, end: int) -> int:
    """Leaves out white space behind the turn's last special token.

    SmolLM2's template, as others, writes a newline after <|im_end|>. It belongs to the next turn:
    generation has stopped by then.
    """
    trimmed = end
    while trimmed > start and tokenizer.decode([ids[trimmed - 1]]).isspace():
        trimmed -= 1
    return trimmed if trimmed > start and ids[trimmed - 1] in tokenizer.all_special_ids else end


def _encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], first_trained: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of the rendered conversation, and the [start, end) of each trained turn.

    A turn's place is found by rendering the messages before it, with the header that asks for an
    answer, and the messages up to its end. Both must be how the whole conversation begins.
    """
    rendered = _render(tokenizer, messages)
    ids = _tokenize(tokenizer, rendered)

    def boundary(count: int, add_generation_prompt: bool) -> int:
        prefix = _render(tokenizer, messages[:count], add_generation_prompt)
        if not rendered.startswith(prefix):
            raise ValueError(
                "the tokenizer's chat template is not prefix-consistent: the first "
                f"{count} messages render differently alone and in the whole conversation, so the "
                "tokens of an assistant turn cannot be told from the others; use prompt + "
                "completion rows with a single assistant turn, or another template"
            )
        # A token that spans the border (a newline of the template merged with one of the answer)
        # counts as the later side's: it is what follows the prompt's own tokens.
        return _common_prefix(_tokenize(tokenizer, prefix), ids)

    spans = []
    for i in range(first_trained, len(messages)):
        if messages[i]["role"] == "assistant":
            start = boundary(i, add_generation_prompt=True)
            last = i + 1 == len(messages)
            end = len(ids) if last else boundary(i + 1, add_generation_prompt=False)
            spans.append((start, _end_of_turn(tokenizer, ids, start, end)))
    return ids, spans


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> tuple[list[int], list[tuple[int, int]]]:
    prompt_ids: list[int] = tokenizer(prompt)["input_ids"] if prompt else []
    ids: list[int] = list(tokenizer(prompt + completion)["input_ids"])
    start = _common_prefix(prompt_ids, ids)
    eos = tokenizer.eos_token_id
    if eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
    return ids, [(start, len(ids))]


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase, train_on_inputs: bool) -> Encoded:
    kind = row_format(row)
    if kind == "text":
        ids, spans = _encode_plain(tokenizer, "", row["text"])
    else:
        messages, first_trained = _conversation(row, kind)
        if train_on_inputs:
            first_trained = len(messages)
        if getattr(tokenizer, "chat_template", None):
            ids, spans = _encode_conversation(tokenizer, messages, first_trained)
        elif kind == "messages" or isinstance(row.get("prompt"), list):
            raise ValueError(
                "the row holds messages and the tokenizer has no chat template to render them; "
                "set tokenizer.chat_template, use the Instruct checkpoint's tokenizer, or give "
                "prompt and completion as strings"
            )
        else:
            prompt, completion = (message["content"] for message in messages)
            # An Alpaca instruction brings no white space before its answer; a prompt does.
            separator = "\n\n" if kind == "instruction" else ""
            ids, spans = _encode_plain(tokenizer, prompt + separator, completion)
    input_ids = torch.tensor(ids, dtype=torch.int64)
    labels = input_ids.clone() if train_on_inputs else torch.full_like(input_ids, IGNORE_INDEX)
    for start, end in spans:
        labels[start:end] = input_ids[start:end]
    # Nothing predicts a row's first token: the model shifts labels by one, and in a packed row a
    # label here would be predicted from the end of the row before it.
    labels[:1] = IGNORE_INDEX
    return {"input_ids": input_ids, "labels": labels}


def check_max_length(max_length: int) -> None:
    """Raises ValueError unless `max_length` is an integer with room for a token to predict."""
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length: expected an integer of at least 2, got {max_length!r}")


def encode_row(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    train_on_inputs: bool = False,
) -> Encoded:
    """One row as {"input_ids": [T], "labels": [T]}, T <= max_length.

    Labels are not shifted (the model does that): -100 on the prompt unless `train_on_inputs`, and
    always on the first token. An assistant turn is trained up to and with its end-of-turn token. A
    longer row keeps its beginning, so that `labels` may come out all -100; None keeps all of it.

    Raises:
        ValueError: the row fits no format; `max_length` is below 2; the chat template refuses the
            row, is missing for a row of messages, or is not prefix-consistent.
    """
    if max_length is not None:
        check_max_length(max_length)
    return {
        name: values[:max_length]
        for name, values in _encode(row, tokenizer, train_on_inputs).items()
    }


def encode_prompt(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The token ids [T] that a model trained on such rows is to continue.

    A string is a user turn where the tokenizer has a chat template, and plain text where it has
    none. A row's `encode_row` begins with the ids of its prompt.

    Raises:
        ValueError: the messages are malformed, or there is no chat template to render them.
    """
    if isinstance(prompt, str):
        _check_text(prompt, "prompt")
        if not getattr(tokenizer, "chat_template", None):
            return torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.int64)
        prompt = [{"role": "user", "content": prompt}]
    _check_messages(prompt, "prompt")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("prompt: holds messages, and the tokenizer has no chat template")
    rendered = _render(tokenizer, prompt, add_generation_prompt=True)
    return torch.tensor(_tokenize(tokenizer, rendered), dtype=torch.int64)


def check_token_ids(ids: Iterable[torch.Tensor], vocab_size: int) -> None:
    """Checks that a model has an embedding for every token: on a GPU the lookup would abort.

    Raises:
        ValueError: a token of `ids` ([T] each) is not below `vocab_size`.
    """
    largest = max((int(row.max()) for row in ids if row.numel()), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"tokenizer: expected tokens of the model's vocabulary, below {vocab_size}, got "
            f"{largest}; it is another model's, or has tokens that were added to it alone"
        )
