"""The same names match as with Python's `re`, and none takes for ever."""

import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels.config import LoraConfig
from lora_kernels.injection import inject_lora
from lora_kernels.name_patterns import MAX_STEPS, Budget, NamePattern, segment_starts

# (An empty name is none, and Python 3.14 has changed what \B is in one.)
names = st.text("ab.0_A", min_size=1, max_size=9)
atoms = st.sampled_from(
    ["a", "b", "ab", ".", r"\.", r"\d", r"\w", r"\W", r"\D", r"\s", "[ab]", "[^a]", "[a-c0]", "0",
     "_", "A", "^", "$", r"\b", r"\B", r"\A", r"\Z", r"[^\d.]", "(?!)"]
)  # fmt: skip
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(
            inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{0,3}?", "{3,}"])
        ).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"(?={text})"),
        inner.map(lambda text: f"(?!{text})"),
        inner.map(lambda text: f"(?i:{text})"),
        st.sampled_from(["a", "b.", r"\d", "ab"]).map(lambda text: f"(?<={text})"),
        st.sampled_from(["a", "b.", r"\d", "ab"]).map(lambda text: f"(?<!{text})"),
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=400, derandomize=True)
@given(expressions, names)
def test_the_same_names_match_as_with_re(text, name):
    pattern = NamePattern(text)
    assert pattern.fullmatch(name) == (re.compile(text).fullmatch(name) is not None)
    theirs = re.compile(rf"(.*\.)?({text})\Z")
    assert pattern.match_end(name) == (theirs.match(name) is not None)


@pytest.mark.parametrize(
    "text",
    [
        r".*?(?:vision|visual).*?(?:attn|mlp).*?(?:q_proj|up_proj).*?",
        r"(?:.*?(?:layers).*?(?:attn|mlp).*?(?:q|k|up)_proj)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
        r"^(?!.*vision).*\.(q_proj|v_proj)$",
        r"model\.layers\.([0-9]|1[0-5])\..*_proj",
        r"(?i).*Q_PROJ",
        r"(?x) model \. layers \. \d+ \. .* ",
        r".*(?<!layers\.0\.attn\.)q_proj",
    ],
)
def test_expressions_in_use(text):
    pattern, theirs = NamePattern(text), re.compile(text)
    parts = ("attn.q_proj", "attn.k_proj", "mlp.up_proj", "mlp.x", "norm")
    found = {
        name: pattern.fullmatch(name)
        for tower in ("model", "model.vision.tower", "visual")
        for layer in range(20)
        for name in (f"{tower}.layers.{layer}.{part}" for part in parts)
    }
    assert found == {name: theirs.fullmatch(name) is not None for name in found}
    assert len(set(found.values())) == 2 or "vision|visual" in text


HOSTILE = [
    "(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*b", "(a*)*b", "((a*)*)*b", "(a?){50}a{50}",
    "(.*a){20}", "(.*.*)*x", ".*" * 30 + "x", "(?:a?)*?b", "(a|b|ab)*c", "(?=(a+)+$)b",
    "(?!(a+)+$).*", "((((((a*)*)*)*)*)*)*b", "(a{1000}){1000}", "(?:(?:a{0,99}){0,99}){0,99}b",
    "(?i)(A+)+$", "(\\w+\\.?)+x", "([a-z]+)*_", "(?:a|a|a|a|a|a)" * 30,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:30])
def test_what_is_slow_in_re_is_not(text):
    """A thousand long names: an answer or an error, soon."""
    names = [f"{'a' * 60}.{i}.{'a' * 60}!" for i in range(1000)]
    budget = Budget()
    start = time.process_time()
    pattern = NamePattern(text)
    try:
        for name in names:
            pattern.fullmatch(name, budget)
    except ValueError as error:
        assert str(error).startswith(f"regular expression {text[:20]!r}"[:-1])
        assert f"{MAX_STEPS} steps" in str(error)
    assert time.process_time() - start < 5


def test_exponential_expressions_have_their_exact_answer():
    for text in ("(a+)+", "(a|a)*", "(a|aa)+", "(a*)*"):
        assert NamePattern(text).fullmatch("a" * 200)
        assert not NamePattern(text).fullmatch("a" * 200 + "b")


def test_a_budget_is_spent_over_all_names():
    budget = Budget(1000)
    with pytest.raises(ValueError, match="steps"):
        for i in range(1000):
            NamePattern("a.*b").fullmatch(f"a{i}b", budget)
    assert budget.left < 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "unterminated"), ("a{2,1}", "min repeat"), (r"(a)\1", "groupref is not supported"),
        ("(?P<x>a)(?(x)b|c)", "not supported"), ("(?>a+)b", "atomic_group is not supported"),
        ("a++b", "possessive_repeat is not supported"), ("(?<=a*)b", "fixed-width"),
        ("a" * 70_000, "longer than 65536"),
    ],
)  # fmt: skip
def test_what_is_refused(text, message):
    with pytest.raises(re.error, match=message):
        NamePattern(text)
    with pytest.raises(ValueError, match="target_modules: expected a regular expression"):
        LoraConfig(target_modules=text)
    with pytest.raises(ValueError, match="rank_pattern: expected a regular expression"):
        LoraConfig(rank_pattern={text: 2})


def test_segments():
    assert segment_starts("a.bc.d") == 0b100101
    assert segment_starts("") == 1


@pytest.mark.parametrize(
    ("text", "name", "layer"),
    [
        ("layers", "model.layers.3.q", 3), ("h", "h.12.c_attn", 12), ("h", "oh.1.x", None),
        ("layers|h", "a.h.1.layers.2.q", 1), ("(a+)+", "a" * 50 + ".7.x", 7),
        (r"\w+", "model.layers.1.experts.0.w", 1), ("layers", "model.layers.3", None),
        ("experts", "model.layers.1.experts.0.w", 0), ("layers", "layers.x.1.q", None),
    ],
)  # fmt: skip
def test_layers(text, name, layer):
    assert NamePattern(text).index_after(name) == layer


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_the_patterns_of_a_config_have_one_bound_for_all_layers(field):
    """Each layer takes a sixth of the steps; the model is unchanged when they are used up."""
    names = [f"{'a' * 64}{i}_" for i in range(12)]
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})
    patterns = {field: {"(?:(?=(?:(?=.*x)?.)*).)*": 2}}
    with pytest.raises(ValueError, match=f"within {MAX_STEPS} steps"):
        inject_lora(model, LoraConfig(r=1, target_modules=names, **patterns))
    assert all(type(module) is torch.nn.Linear for module in model.values())
    assert all(parameter.requires_grad for parameter in model.parameters())
