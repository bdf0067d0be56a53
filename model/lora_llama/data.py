"""A JSONL file of examples, turned into batches for a causal language model.

    read_jsonl -> split_dataset -> load_dataset (encode, drop, pack) -> Collator -> model(**batch)

Each line is one JSON object in one of four formats, told apart by its keys, in this order:

    messages               [{"role": ..., "content": ...}, ...]: every assistant turn is trained
    prompt, completion     two strings, or two lists of messages: the completion is trained
    instruction[, input], output       Alpaca's keys: the output is trained
    text                   one string, all of it trained

Whatever is not trained keeps its tokens and gets the label -100. Conversations are rendered by the
tokenizer's own chat template; a prompt and completion given as strings, and Alpaca rows, become a
user turn and an assistant turn. For a tokenizer without a template they are joined as they stand,
and the end-of-sequence token is appended.

Shapes: T tokens in a row, B rows in a batch. All tensors are torch.int64 unless said otherwise.
"""

from __future__ import annotations

import json
import logging
import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
ROLES = ("system", "developer", "user", "assistant", "tool")
FORMATS = "messages; prompt + completion; instruction [+ input] + output; text"

logger = logging.getLogger(__name__)

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


def _read_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields each checked row with its place, "FILE:LINE"."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    found = False
    # utf-8-sig: editors on Windows begin a file with a byte order mark.
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if not found and line.lstrip().startswith("["):
                    raise ValueError("a JSON array; expected JSON Lines, one object on each line")
                found = True
                try:
                    row = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"not JSON: {error.msg} at column {error.colno}; "
                        "expected one object on each line"
                    ) from None
                row_format(row)
                yield f"{path}:{number}", row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not found:
        raise ValueError(f"{path}: no rows")


def read_jsonl(path: str | Path) -> list[Row]:
    """Reads and checks every row of a JSON Lines file (UTF-8; blank lines are skipped).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no rows, or a line is not JSON, not an object or fits no format;
            the message begins with FILE:LINE.
    """
    return [row for _, row in _read_lines(Path(path))]


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
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the row: {error}") from error


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


def _check_max_length(max_length: int) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length: expected an integer of at least 2, got {max_length!r}")


def _truncate(row: Encoded, max_length: int) -> Encoded:
    return {name: values[:max_length] for name, values in row.items()}


def encode_row(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on_inputs: bool = False,
) -> Encoded:
    """One row as {"input_ids": [T], "labels": [T]}, T <= max_length.

    Labels are not shifted (the model does that): -100 on the prompt unless `train_on_inputs`, and
    always on the first token. An assistant turn is trained up to and with its end-of-turn token. A
    longer row keeps its beginning, so that `labels` may come out all -100.

    Raises:
        ValueError: the row fits no format; `max_length` is below 2; the chat template refuses the
            row, is missing for a row of messages, or is not prefix-consistent.
    """
    _check_max_length(max_length)
    return _truncate(_encode(row, tokenizer, train_on_inputs), max_length)


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


class SupervisedDataset(Dataset[Encoded]):
    """Encoded rows, or packed sequences of them, in memory.

    Item: {"input_ids": [T], "labels": [T]}, and "position_ids": [T] if packed.

    Attributes:
        packed: whether items are sequences of several rows.
        num_rows: rows kept.
        num_dropped: rows left out, for having no trained token within max_length.
        num_truncated: rows kept that lost their end.
        num_tokens: tokens in all items.
        num_trained_tokens: labels other than -100, which is what the loss is averaged over.
    """

    def __init__(
        self,
        items: list[Encoded],
        num_rows: int | None = None,
        num_dropped: int = 0,
        num_truncated: int = 0,
    ) -> None:
        self.items = items
        self.packed = any("position_ids" in item for item in items)
        self.num_rows = len(items) if num_rows is None else num_rows
        self.num_dropped = num_dropped
        self.num_truncated = num_truncated
        self.num_tokens = sum(item["input_ids"].numel() for item in items)
        self.num_trained_tokens = sum(int((item["labels"] != IGNORE_INDEX).sum()) for item in items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Encoded:
        return self.items[index]

    def __repr__(self) -> str:
        packed = f" packed into {len(self)} sequences" if self.packed else ""
        return (
            f"{type(self).__name__}({self.num_rows} rows{packed}, {self.num_tokens} tokens, "
            f"{self.num_trained_tokens} trained, {self.num_dropped} dropped, "
            f"{self.num_truncated} truncated)"
        )


def pack_rows(rows: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Packs encoded rows into sequences of at most `max_length` tokens, best fit decreasing.

    Longest first, each row goes where the least room is left over. Within a sequence rows keep
    their order, and sequences are ordered by their first row, so that the same rows give the same
    result. "position_ids" [T] restart at 0 with each row: given no attention mask, transformers
    makes the attention mask block-diagonal from them.

    Raises:
        ValueError: a row is longer than `max_length`.
    """
    sequences: list[list[int]] = []
    # (room left, sequence), sorted: the first with enough room is the tightest fit.
    room: list[tuple[int, int]] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])):
        length = len(rows[i]["input_ids"])
        if length > max_length:
            raise ValueError(f"rows[{i}]: {length} tokens do not fit max_length={max_length}")
        fit = bisect_left(room, (length, 0))
        if fit < len(room):
            left, sequence = room.pop(fit)
            sequences[sequence].append(i)
        else:
            left, sequence = max_length, len(sequences)
            sequences.append([i])
        insort(room, (left - length, sequence))
    packed = []
    for members in sorted(sorted(sequence) for sequence in sequences):
        item = {
            name: torch.cat([rows[i][name] for i in members]) for name in ("input_ids", "labels")
        }
        item["position_ids"] = torch.cat([torch.arange(len(rows[i]["input_ids"])) for i in members])
        packed.append(item)
    return packed


def load_dataset(
    path_or_rows: str | Path | Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on_inputs: bool = False,
    packing: bool = False,
) -> SupervisedDataset:
    """Encodes a JSONL file, or rows already read, for training or evaluation.

    Rows longer than `max_length` keep their beginning. Rows with no trained token left are dropped.
    Both are counted in the result, and logged as a warning when there are any.

    Args:
        path_or_rows: a JSON Lines file, or rows in the formats of this module.
        tokenizer: its chat template renders the conversations.
        max_length: most tokens in a row, and in a packed sequence.
        train_on_inputs: train on the prompts as well.
        packing: put several rows into one sequence; see `pack_rows`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are no rows; a row is malformed or cannot be encoded (the message begins
            with FILE:LINE or rows[INDEX]); no row has a trained token within `max_length`.
    """
    _check_max_length(max_length)
    located: Iterator[tuple[str, Row]]
    if isinstance(path_or_rows, str | Path):
        source = str(path_or_rows)
        located = _read_lines(Path(path_or_rows))
    else:
        source = "rows"
        located = ((f"rows[{i}]", row) for i, row in enumerate(path_or_rows))
    encoded: list[Encoded] = []
    num_dropped = num_truncated = 0
    first_trained: list[int] = []
    for place, row in located:
        try:
            whole = _encode(row, tokenizer, train_on_inputs)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        item = _truncate(whole, max_length)
        if bool((item["labels"] != IGNORE_INDEX).any()):
            num_truncated += len(whole["labels"]) > max_length
            # Cloned: a slice would keep the whole row's memory.
            encoded.append({name: values.clone() for name, values in item.items()})
        else:
            num_dropped += 1
            first_trained += (whole["labels"] != IGNORE_INDEX).nonzero()[:1, 0].tolist()
    if not encoded:
        if not num_dropped:
            raise ValueError(f"{source}: no rows")
        hint = (
            f"; the shortest prompt needs max_length={min(first_trained) + 1}"
            if first_trained
            else ""
        )
        raise ValueError(
            f"{source}: none of the {num_dropped} rows has a trained token within "
            f"max_length={max_length}{hint}"
        )
    for count, fate in (
        (num_dropped, "dropped, with no trained token within"),
        (num_truncated, "cut at their end to"),
    ):
        if count:
            total = num_dropped + len(encoded)
            logger.warning(
                "%s: %d of %d rows %s max_length=%d", source, count, total, fate, max_length
            )
    items = pack_rows(encoded, max_length) if packing else encoded
    return SupervisedDataset(items, len(encoded), num_dropped, num_truncated)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id to pad with: the pad token, else end-of-sequence, else unknown.

    Any token serves, since padding is masked by `attention_mask` and `labels`; so the vocabulary is
    never enlarged for it.

    Raises:
        ValueError: the tokenizer has none of the three.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if token_id is not None:
            return token_id
    raise ValueError("tokenizer: has no pad, end-of-sequence or unknown token to pad with")


@dataclass
class Collator:
    """Pads items of a `SupervisedDataset` on the right, to the longest in the batch.

    The batch holds "input_ids" [B, T] and "labels" [B, T] (padding: -100), and

        rows      "attention_mask" [B, T], 1 on tokens and 0 on padding
        packed    "position_ids" [B, T], and "use_cache": False; no attention mask, for with one
                  transformers ignores where the positions restart. Padding restarts at 0 too, as a
                  segment of its own. With a cache transformers ignores the restarts as well.

    Attributes:
        pad_token_id: see `padding_id`.
        pad_to_multiple_of: round T up to a multiple of this.
        return_flash_attn_kwargs: for packed items add "cu_seq_lens_q" and "cu_seq_lens_k" [S + 1]
            (int32, the borders of the S segments of the flattened batch) and "max_length_q" and
            "max_length_k" (int). Attention by flash-attn needs them where B > 1: transformers
            finds restarting positions there only in a batch of one.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_flash_attn_kwargs: bool = False

    def __call__(self, features: Sequence[Encoded]) -> dict[str, Any]:
        packed = sum("position_ids" in feature for feature in features)
        if packed not in (0, len(features)):
            raise ValueError(f"features: {packed} of {len(features)} are packed; expected all")
        length = max(len(feature["input_ids"]) for feature in features)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple

        def pad(name: str, value: int) -> torch.Tensor:
            rows = torch.full((len(features), length), value, dtype=torch.int64)
            for row, feature in zip(rows, features, strict=True):
                row[: len(feature[name])] = torch.as_tensor(feature[name])
            return rows

        batch: dict[str, Any] = {
            "input_ids": pad("input_ids", self.pad_token_id),
            "labels": pad("labels", IGNORE_INDEX),
        }
        lengths = torch.tensor([[len(feature["input_ids"])] for feature in features])
        offsets = torch.arange(length) - lengths
        if not packed:
            batch["attention_mask"] = (offsets < 0).long()
            return batch
        batch["position_ids"] = torch.where(offsets < 0, pad("position_ids", 0), offsets)
        batch["use_cache"] = False
        if self.return_flash_attn_kwargs:
            starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
            borders = torch.cat([starts, torch.tensor([batch["position_ids"].numel()])])
            longest = int(borders.diff().max())
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = borders.to(torch.int32)
            batch["max_length_q"] = batch["max_length_k"] = longest
        return batch
