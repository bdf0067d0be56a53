"""add_weighted_adapter against PEFT: equal A and B for linear and cat, an equal product by SVD."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels import adapters
from lora_kernels.layers import lora_layers
from lora_kernels.weighted_adapters import add_weighted_adapter

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), Conv1D(14, 10), nn.Linear(14, 9)).eval()


ALL = {"target_modules": ["0", "2", "3"], "init_lora_weights": False}
SAME = [{"r": 3, "lora_alpha": 5, **ALL}, {"r": 3, "lora_alpha": 2, **ALL}]
DIFFERENT = [
    {"r": 3, "lora_alpha": 5, **ALL, "rank_pattern": {"2": 4}, "alpha_pattern": {"3": 7}},
    {"r": 2, "lora_alpha": 2, **ALL, "target_modules": ["0", "3"]},
    {"r": 1, "lora_alpha": 2, **ALL, "target_modules": ["2"]},
]
NAMES = ["default", "b", "c"]


def both(settings: list[dict]) -> tuple[nn.Module, peft.LoraModel]:
    """Our model and PEFT's, with the same adapters."""
    ours = base()
    theirs = peft.LoraModel(base(), peft.LoraConfig(**settings[0]), "default")
    for name, each in zip(NAMES, settings, strict=False):
        lk.inject_lora(ours, lk.LoraConfig(**each), name)
        if name != "default":
            theirs.peft_config[name] = peft.LoraConfig(**each)
            theirs.inject_adapter(theirs.model, name)
    with torch.no_grad():
        for path, layer in lora_layers(ours):
            for name in layer.lora_A:
                target = theirs.model.get_submodule(path)
                target.lora_A[name].weight.copy_(layer.lora_A[name])
                target.lora_B[name].weight.copy_(layer.lora_B[name])
    return ours, theirs


def x() -> Tensor:
    return torch.linspace(-1, 1, 60).view(5, 12)


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        path: (layer.lora_B[name] @ layer.lora_A[name]).detach() * layer.scaling[name]
        for path, layer in lora_layers(model)
        if name in layer.lora_A
    }


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.4], [-1.0, -2.0]], ids=str)
@pytest.mark.parametrize(
    ("settings", "kind"), [(SAME, "linear"), (SAME, "cat"), (DIFFERENT[:2], "cat")]
)
def test_linear_and_cat_are_those_of_peft(settings, kind: str, weights: list[float]):
    ours, theirs = both(settings)
    theirs.add_weighted_adapter(NAMES[:2], weights, "sum", combination_type=kind)
    add_weighted_adapter(ours, NAMES[:2], weights, "sum", combination_type=kind)
    for path, layer in lora_layers(ours):
        target = theirs.model.get_submodule(path)
        assert layer.scaling["sum"] == target.scaling["sum"] == 1
        assert torch.equal(layer.lora_A["sum"], target.lora_A["sum"].weight), path
        assert torch.equal(layer.lora_B["sum"], target.lora_B["sum"].weight), path
    config, expected = ours.lora_configs["sum"], theirs.peft_config["sum"]
    assert (config.r, config.lora_alpha) == (expected.r, expected.lora_alpha)
    assert set(config.target_modules) == expected.target_modules


@pytest.mark.parametrize(
    "options",
    [{}, {"svd_rank": 2}, {"svd_full_matrices": False}, {"svd_clamp": 0.8}],
    ids=str,
)
@pytest.mark.parametrize("settings", [SAME, DIFFERENT[:2]], ids=["same", "different"])
def test_svd_has_the_product_of_peft(settings, options: dict):
    ours, theirs = both(settings)
    theirs.add_weighted_adapter(NAMES[:2], [0.8, -0.5], "sum", **options)
    add_weighted_adapter(ours, NAMES[:2], [0.8, -0.5], "sum", **options)
    for path, delta in deltas(ours, "sum").items():
        layer = theirs.model.get_submodule(path)
        expected = layer.lora_B["sum"].weight @ layer.lora_A["sum"].weight
        assert torch.allclose(delta, expected, atol=1e-6), path
        assert layer.scaling["sum"] == 1


@pytest.mark.parametrize(("kind", "rank"), [("cat", None), ("svd", 7), ("svd", 30)])
def test_three_adapters_of_different_layers_sum_exactly(kind: str, rank: int | None):
    """cat is exact, and svd with a rank that holds the sum. A layer sums the adapters it has."""
    ours, _ = both(DIFFERENT)
    weights = [0.5, -2.0, 3.0]
    add_weighted_adapter(ours, NAMES, weights, "sum", kind, svd_rank=rank)
    single = [deltas(ours, name) for name in NAMES]
    for path, delta in deltas(ours, "sum").items():
        expected = sum(
            w * part[path] for w, part in zip(weights, single, strict=True) if path in part
        )
        assert torch.allclose(delta, expected, atol=1e-6), path
    assert deltas(ours, "sum").keys() == {"0", "2", "3"}


def test_of_one_adapter_every_type_is_linear():
    ours, theirs = both(SAME)
    theirs.add_weighted_adapter(["b"], [-0.5], "sum", combination_type="cat")
    add_weighted_adapter(ours, ["b"], [-0.5], "sum", "cat")
    assert ours.lora_configs["sum"].r == 3
    for path, layer in lora_layers(ours):
        target = theirs.model.get_submodule(path)
        assert torch.equal(layer.lora_A["sum"], target.lora_A["sum"].weight)
        assert torch.equal(layer.lora_B["sum"], target.lora_B["sum"].weight)
    expected = {path: -0.5 * delta for path, delta in deltas(ours, "b").items()}
    for path, delta in deltas(ours, "sum").items():
        assert torch.allclose(delta, expected[path], atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_the_new_adapter_waits_and_the_old_ones_are_untouched(kind: str):
    ours, _ = both(SAME)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in ours.named_parameters()}
    output = ours(x())
    add_weighted_adapter(ours, NAMES[:2], [1.0, 1.0], "sum", kind)
    assert torch.equal(ours(x()), output)
    for name, parameter in ours.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name][0])
            assert parameter.requires_grad == before[name][1]
        else:
            assert name.endswith(".sum") and not parameter.requires_grad
    if kind != "linear":
        adapters.set_adapter(ours, "sum")
        got = ours(x())
        adapters.set_adapter(ours, NAMES[:2])
        assert kind == "svd" or torch.allclose(got, ours(x()), atol=1e-5)


def test_rslora_and_pissa_do_not_act_twice():
    """The new adapter has scaling 1 and begins with no part of the base."""
    settings = [{**each, "use_rslora": True} for each in SAME]
    settings[0]["init_lora_weights"] = "pissa"
    ours = base()
    for name, each in zip(NAMES, settings, strict=False):
        lk.inject_lora(ours, lk.LoraConfig(**each), name)
    weight = ours[0].weight.detach().clone()
    add_weighted_adapter(ours, NAMES[:2], [1.0, 2.0], "sum", "cat")
    assert torch.equal(ours[0].weight, weight)
    single = [deltas(ours, name) for name in NAMES[:2]]
    for path, delta in deltas(ours, "sum").items():
        assert torch.allclose(delta, single[0][path] + 2 * single[1][path], atol=1e-6)


def test_a_saved_module_goes_with_the_sum():
    ours = base()
    ours.append(nn.LayerNorm(9))
    lk.inject_lora(ours, lk.LoraConfig(**SAME[0]))
    lk.inject_lora(ours, lk.LoraConfig(**SAME[1], modules_to_save=["4"]), "b")
    with torch.no_grad():
        ours[4].modules_to_save["b"].weight.fill_(3.0)
    add_weighted_adapter(ours, NAMES[:2], [1.0, 1.0], "sum", "cat")
    adapters.set_adapter(ours, "sum")
    assert torch.equal(ours[4].weight, torch.full((9,), 3.0))
    assert ours[4].current() is not ours[4].modules_to_save["b"]


def test_a_sum_is_saved_and_read(tmp_path):
    ours, _ = both(DIFFERENT)
    add_weighted_adapter(ours, NAMES, [0.5, -2.0, 3.0], "sum", "cat")
    adapters.set_adapter(ours, "sum")
    adapters.save_adapters(ours, tmp_path, ["sum"])
    again = base()
    adapters.load_adapter_into(again, tmp_path / "sum")
    assert torch.equal(again(x()), ours(x()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": ["default", "nobody"]}, r"\['nobody'\] not found"),
        ({"adapters": ["b", "b"]}, r"expected each name once, got \['b', 'b'\]"),
        ({"adapters": [], "weights": []}, "at least one name"),
        ({"weights": [1.0]}, r"expected 2 finite numbers, .* got \[1.0\]"),
        ({"weights": [1.0, float("nan")]}, "expected 2 finite numbers"),
        ({"adapter_name": "b"}, "'b' exists already"),
        ({"adapter_name": "a/b"}, "adapter_name"),
        ({"adapters": ["default", "c"], "combination_type": "linear"}, r"one rank, got \[3, 1\]"),
        ({"combination_type": "ties"}, r"one of \('linear', 'cat', 'svd'\), got 'ties'"),
        ({"combination_type": "dare_linear_svd"}, "combination_type: .*dare_linear_svd"),
        ({"combination_type": "magnitude_prune"}, "combination_type: .*magnitude_prune"),
        ({"svd_rank": 0}, "svd_rank: expected at least 1, got 0"),
        ({"svd_clamp": 1.5}, r"svd_clamp: expected a number in \[0, 1\]"),
        ({"adapters": ["default", "dora"]}, "'dora' has use_dora=True"),
        ({"adapters": ["default", "biased"]}, "'biased' has lora_bias=True"),
    ],
    ids=str,
)
def test_an_error_changes_nothing(changes: dict, message: str):
    ours, _ = both([*SAME, DIFFERENT[2]])
    lk.inject_lora(ours, lk.LoraConfig(**ALL, use_dora=True), "dora")
    lk.inject_lora(ours, lk.LoraConfig(**ALL, lora_bias=True), "biased")
    state = copy.deepcopy(ours.state_dict())
    arguments = {
        "adapters": NAMES[:2], "weights": [1.0, 2.0], "adapter_name": "sum",
        "combination_type": "svd", **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(ours, **arguments)
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
    assert list(ours.lora_configs) == [*NAMES, "dora", "biased"]


def test_copies_of_one_module_cannot_be_summed():
    ours = base()
    ours.append(nn.LayerNorm(9))
    for name, each in zip(NAMES, SAME, strict=False):
        lk.inject_lora(ours, lk.LoraConfig(**each, modules_to_save=["4"]), name)
    with pytest.raises(ValueError, match=r"copy of 4 .* got \['default', 'b'\]"):
        add_weighted_adapter(ours, NAMES[:2], [1.0, 1.0], "sum", "cat")
