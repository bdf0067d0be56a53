"""The demo's task: turn a customer's message into an order that a program can read.

A message says in running text what is ordered, how many, where it goes and how urgent it is, and
also things that look like the answer and are not: account numbers, the sender's own city, the wish
that was corrected a sentence later. The answer is one line of JSON with four keys in a fixed order:

    {"item":"desk lamp","quantity":3,"city":"Lisbon","priority":"high"}

All rows are generated here, from the word lists below. Held-out rows order items, go to cities and
(every second one) use sentences that no training row has, so that training on the one set cannot
memorise the other.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

SYSTEM_PROMPT = (
    "Extract the order as one line of JSON with the keys item (singular), quantity, city, "
    "priority (low, normal or high)."
)
KEYS = ("item", "quantity", "city", "priority")

# (singular, plural)
TRAINING_ITEMS = (
    ("desk lamp", "desk lamps"),
    ("office chair", "office chairs"),
    ("coffee grinder", "coffee grinders"),
    ("water bottle", "water bottles"),
    ("garden hose", "garden hoses"),
    ("wall clock", "wall clocks"),
    ("yoga mat", "yoga mats"),
    ("bicycle pump", "bicycle pumps"),
    ("rain jacket", "rain jackets"),
    ("cutting board", "cutting boards"),
    ("phone case", "phone cases"),
    ("tool box", "tool boxes"),
    ("picture frame", "picture frames"),
    ("camping stove", "camping stoves"),
    ("paint brush", "paint brushes"),
    ("door handle", "door handles"),
    ("bread knife", "bread knives"),
    ("reading light", "reading lights"),
    ("paper tray", "paper trays"),
    ("wool blanket", "wool blankets"),
    ("shower curtain", "shower curtains"),
    ("bookshelf", "bookshelves"),
    ("kettle", "kettles"),
    ("backpack", "backpacks"),
    ("notebook", "notebooks"),
    ("headset", "headsets"),
)
HELD_OUT_ITEMS = (
    ("floor mat", "floor mats"),
    ("travel mug", "travel mugs"),
    ("soup bowl", "soup bowls"),
    ("bench vice", "bench vices"),
    ("window box", "window boxes"),
    ("candle holder", "candle holders"),
    ("filing cabinet", "filing cabinets"),
    ("snow shovel", "snow shovels"),
    ("umbrella", "umbrellas"),
    ("keyboard", "keyboards"),
)
TRAINING_CITIES = (
    "Lisbon", "Oslo", "Ghent", "Turin", "Leeds", "Porto", "Bremen", "Malmo", "Tampere", "Nantes",
    "Krakow", "Seville", "Basel", "Graz", "Utrecht", "Dublin", "Athens", "Riga", "Boston", "Denver",
    "Toronto", "Osaka", "Lima", "Nairobi",
)  # fmt: skip
HELD_OUT_CITIES = (
    "Vienna", "Bergen", "Lyon", "Bristol", "Hamburg", "Valencia", "Prague", "Seattle", "Kyoto",
    "Quito",
)  # fmt: skip
NAMES = (
    "Ana", "Bruno", "Chloe", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kemal",
    "Lena", "Mira", "Nils", "Olga", "Pavel",
)  # fmt: skip

QUANTITY_WORDS = {
    2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine",
    10: "ten", 12: "a dozen", 24: "two dozen",
}  # fmt: skip

# {n} is the quantity as a number or in words, {items} the plural, {city} where it goes, {wrong} a
# quantity that is taken back and {other} a city it does not go to.
TRAINING_ORDERS = (
    "Please send {n} {items} to {city}.",
    "We would like to order {n} {items}, to be delivered in {city}.",
    "Could you ship {n} {items} to our office in {city}?",
    "Our shop in {city} needs {n} {items}.",
    "I need {n} {items}. The address is in {city}.",
    "I asked for {wrong} {items}, but make it {n}. They go to {city}.",
    "Please send {n} {items} to {city}, not to {other} as last time.",
    "I am writing from {other}, but the {items} go to {city}. {n_start} of them, please.",
    "We talked about {wrong} {items} for {city}; {n} will be enough.",
    "Can I get {n} {items} delivered to {city}? My billing address stays in {other}.",
)
HELD_OUT_ORDERS = (
    "Our team in {city} is out of {items}, so we will take {n}.",
    "Is it possible to have {n} {items} brought to {city}?",
    "Forget the {wrong} {items} I mentioned: we want {n}, in {city}.",
    "The {items} should leave {other} and arrive in {city}; we need {n}.",
)
TRAINING_PRIORITIES = {
    "high": (
        "This is urgent.",
        "We need this as soon as possible.",
        "It has to arrive by tomorrow.",
        "Please hurry, our customers are waiting.",
    ),
    "low": (
        "There is no rush.",
        "Take your time with this one.",
        "It can wait until next month.",
        "Whenever it suits you is fine.",
    ),
    "normal": ("",),
}
HELD_OUT_PRIORITIES = {
    "high": ("Please treat this as very urgent.", "We cannot wait, it must arrive tomorrow."),
    "low": ("No hurry at all.", "This can wait, take your time."),
    "normal": ("",),
}
REMARKS = (
    "Our account number is {number}.",
    "My phone is on extension {number}.",
    "The last invoice was {number} euros.",
    "You helped us well in {year}.",
    "We are a team of {number}.",
    "Thanks for the new catalogue.",
    "",
    "",
)
GREETINGS = ("Hello,", "Hi there,", "Good morning,", "Dear team,", "")
CLOSINGS = ("Thanks, {name}", "Best, {name}", "Kind regards, {name}", "{name}")


@dataclass(frozen=True)
class _Words:
    items: tuple[tuple[str, str], ...]
    cities: tuple[str, ...]
    orders: tuple[str, ...]
    priorities: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class DemoSettings:
    """How the demo trains; the names are TrainingArguments' and PEFT's where they have one."""

    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 5
    max_steps: int = 50
    per_device_train_batch_size: int = 5
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    lora_r: int = 16
    lora_alpha: int = 32
    max_length: int = 160
    max_new_tokens: int = 40
    # Every training row is seen once.
    num_train_rows: int = 250
    num_held_out_rows: int = 48
    num_exact_match_rows: int = 32
    seed: int = 0


# Measured with SmolLM2-135M-Instruct (Q4_1 weights in bfloat16, fp32 adapters on all seven linears,
# AdamW, CPU): held-out completion loss, and exact matches among 32 greedy answers, before -> after
# 50 steps at learning_rate 2e-3:
#     5 rows a step    1.713 -> 0.122    0 -> 14
#     8 rows a step    1.713 -> 0.113    0 -> 23
# 5 rows keep the whole demo within three minutes on two cores.
DEMO_SETTINGS = DemoSettings()

_TRAINING = _Words(TRAINING_ITEMS, TRAINING_CITIES, TRAINING_ORDERS, TRAINING_PRIORITIES)
# Held-out rows come in turn from these two: known sentences about unknown things, and all unknown.
_HELD_OUT = (
    _Words(HELD_OUT_ITEMS, HELD_OUT_CITIES, TRAINING_ORDERS, TRAINING_PRIORITIES),
    _Words(HELD_OUT_ITEMS, HELD_OUT_CITIES, HELD_OUT_ORDERS, HELD_OUT_PRIORITIES),
)


def _quantity(rng: random.Random) -> tuple[int, str]:
    """A quantity, and how the message writes it."""
    if rng.random() < 0.5:
        return rng.choice(list(QUANTITY_WORDS.items()))
    number = rng.randint(2, 60)
    return number, str(number)


def _row(rng: random.Random, words: _Words) -> dict[str, Any]:
    item, items = rng.choice(words.items)
    city, other = rng.sample(words.cities, 2)
    quantity, written = _quantity(rng)
    wrong = quantity
    while wrong == quantity:
        wrong, wrong_written = _quantity(rng)
    order = rng.choice(words.orders).format(
        n=written,
        n_start=written.capitalize(),
        wrong=wrong_written,
        items=items,
        city=city,
        other=other,
    )
    priority = rng.choice(("low", "normal", "high"))
    middle = [
        order,
        rng.choice(words.priorities[priority]),
        rng.choice(REMARKS).format(number=rng.randint(3, 990), year=rng.randint(2015, 2024)),
    ]
    # The order may be the first thing a customer says, or the last.
    rng.shuffle(middle)
    closing = rng.choice(CLOSINGS).format(name=rng.choice(NAMES))
    message = " ".join(part for part in (rng.choice(GREETINGS), *middle, closing) if part)
    answer = {"item": item, "quantity": quantity, "city": city, "priority": priority}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": message},
            {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))},
        ]
    }


def _distinct(rng: random.Random, words: list[_Words], n: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < n:
        row = _row(rng, words[len(rows) % len(words)])
        message = row["messages"][1]["content"]
        if message not in seen:
            seen.add(message)
            rows.append(row)
    return rows


def training_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` distinct rows {"messages": [system, user, assistant]}, the same for the same seed."""
    return _distinct(random.Random(seed), [_TRAINING], n)


def held_out_rows(n: int) -> list[dict[str, Any]]:
    """`n` distinct rows, always the same ones, none of which can occur in `training_rows`.

    A longer list begins with the shorter one.
    """
    return _distinct(random.Random("held out"), list(_HELD_OUT), n)


def parse_answer(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` consists of, or None if it is anything else."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def exact_match(answer_text: str, row: dict[str, Any]) -> bool:
    """Whether the model's answer is the row's answer: the same keys with the same values.

    White space and the order of the keys do not count; the types do, so "3" is not 3.
    """
    answer = parse_answer(answer_text)
    expected = json.loads(row["messages"][-1]["content"])
    # Python takes True for 1, and 3.0 for 3; JSON text tells them apart.
    return answer is not None and _canonical(answer) == _canonical(expected)


def _canonical(answer: dict[str, Any]) -> str:
    return json.dumps(answer, sort_keys=True)
