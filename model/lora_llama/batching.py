"""Encoded rows, made into datasets, packed sequences and padded batches.

    rows -> load_dataset (encode, drop, pack) -> Collator -> model(**batch)

Shapes: T tokens in a row or packed sequence, B of them in a batch. All tensors are torch.int64
unless said otherwise.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lora_llama.data import (
    IGNORE_INDEX,
    Encoded,
    Row,
    check_max_length,
    encode_row,
    read_located,
)

logger = logging.getLogger(__name__)


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

    @cached_property
    def sha256(self) -> str:
        """A digest of all items in their order: of every name, length and value."""
        digest = hashlib.sha256()
        for item in self.items:
            for name, values in sorted(item.items()):
                digest.update(f"{name} {len(values)} ".encode())
                digest.update(values.numpy().tobytes())
        return digest.hexdigest()

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


def encode_located(
    source: str,
    located: Iterable[tuple[str, Row]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on_inputs: bool = False,
    packing: bool = False,
) -> SupervisedDataset:
    """Encodes rows for training or evaluation; see `load_dataset`.

    Args:
        source: where the rows are from, for messages about all of them.
        located: (place, row) pairs, as `read_located` yields them; an error begins with the place.
    """
    check_max_length(max_length)
    encoded: list[Encoded] = []
    num_dropped = num_truncated = 0
    first_trained: list[int] = []
    for place, row in located:
        try:
            whole = encode_row(row, tokenizer, None, train_on_inputs)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        # Cloned: a slice would keep the whole row's memory.
        item = {name: values[:max_length].clone() for name, values in whole.items()}
        if bool((item["labels"] != IGNORE_INDEX).any()):
            num_truncated += len(whole["labels"]) > max_length
            encoded.append(item)
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
        path_or_rows: a JSON Lines file, or rows in the formats of `data.py`.
        tokenizer: its chat template renders the conversations.
        max_length: most tokens in a row, and in a packed sequence.
        train_on_inputs: train on the prompts as well.
        packing: put several rows into one sequence; see `pack_rows`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: there are no rows; a row is malformed or cannot be encoded (the message begins
            with FILE:LINE or rows[INDEX]); no row has a trained token within `max_length`.
    """
    located: Iterable[tuple[str, Row]]
    if isinstance(path_or_rows, str | Path):
        source, located = str(path_or_rows), read_located(path_or_rows)
    else:
        source, located = "rows", ((f"rows[{i}]", row) for i, row in enumerate(path_or_rows))
    return encode_located(source, located, tokenizer, max_length, train_on_inputs, packing)


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
