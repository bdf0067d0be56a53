"""LoraLinear, the grouped projection, and the injection of LoRA layers into any model."""

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import lora_kernels
from lora_kernels import LoraConfig, LoraLinear, inject_lora
from lora_kernels import layers as layers_module
from lora_kernels.injection import replace_modules
from lora_kernels.layers import active_adapters, grouped_projection, lora_layers
from lora_kernels.testing import MAX_RATIO, compare


def config(**changes) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**{**settings, **changes})


def linear(
    inputs: int = 10, outputs: int = 7, bias: bool = True, dtype: torch.dtype = torch.float64
) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)


def layer_with(*adapters: LoraConfig, dtype: torch.dtype = torch.float64, bias: bool = True):
    """A LoraLinear with adapters "a", "b", ... in evaluation mode."""
    torch.manual_seed(0)
    layer = LoraLinear.from_linear(linear(bias=bias, dtype=dtype))
    for name, adapter in zip("abc", adapters, strict=False):
        layer.add_adapter(name, adapter)
    return layer.eval()


def delta(layer: LoraLinear, name: str, x: Tensor) -> Tensor:
    return layer.scaling[name] * (x @ layer.lora_A[name].T @ layer.lora_B[name].T)


def base(layer: LoraLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """To float64's accuracy: ten products in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


def trainable(layer: nn.Module) -> set[str]:
    return {name for name, parameter in layer.named_parameters() if parameter.requires_grad}


def snapshot(model: nn.Module) -> tuple:
    """All that an operation on a model could change, to be compared after an error."""
    layers = {
        path: (
            layer.active_adapters[:], layer.merged_adapters[:], layer.disabled,
            dict(layer.scaling), dict(layer.lora_dropout),
        )
        for path, layer in lora_layers(model)
    }  # fmt: skip
    parameters = {
        name: (id(p), p.requires_grad, p.detach().clone().view(-1).tolist())
        for name, p in model.named_parameters(remove_duplicate=False)
    }
    modules = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}
    return layers, parameters, modules, dict(getattr(model, "lora_configs", {}))


# Construction.


def test_from_linear_takes_over_the_very_same_weight_and_bias():
    plain = linear().train(False)
    layer = LoraLinear.from_linear(plain, config(), "a")
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert not layer.training
    assert layer.in_features == 10 and layer.out_features == 7
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A.a", "lora_B.a"]
    assert layer.lora_A["a"].shape == (3, 10) and layer.lora_B["a"].shape == (7, 3)
    assert LoraLinear.from_linear(linear(bias=False)).bias is None


@pytest.mark.parametrize("kind", [nn.Bilinear, LoraLinear, NonDynamicallyQuantizableLinear])
def test_from_linear_takes_nothing_but_a_plain_linear(kind: type[nn.Module]):
    module = kind(2, 3, 4)
    with pytest.raises(TypeError, match=rf"linear: expected torch.nn.Linear, got {kind.__name__}"):
        LoraLinear.from_linear(module)


def test_from_linear_refuses_hooks_that_it_would_lose():
    for register in (
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: setattr(m, "forward", m.forward),
    ):
        plain = linear()
        register(plain)
        with pytest.raises(ValueError, match="hooks"):
            LoraLinear.from_linear(plain, config())
        assert plain.weight.requires_grad


@pytest.mark.parametrize("bias", [False, True])
def test_without_adapter_it_is_the_linear_layer_itself(bias: bool):
    plain = linear(bias=bias)
    layer = LoraLinear.from_linear(plain)
    x = torch.randn(4, 10, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert plain.weight.grad is not None


def test_initialisation_is_pefts():
    torch.manual_seed(0)
    layer = LoraLinear(400, 300, dtype=torch.float32)
    layer.add_adapter("kaiming", LoraConfig(r=50))
    bound = 1 / math.sqrt(400)
    a = layer.lora_A["kaiming"].detach()
    assert 0.99 * bound < a.abs().max() <= bound and abs(a.mean()) < 0.01 * bound
    # A uniform distribution's standard deviation; 20,000 draws hit it within 2%.
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.lora_B["kaiming"].any()
    layer.add_adapter("gaussian", LoraConfig(r=50, init_lora_weights="gaussian"))
    assert layer.lora_A["gaussian"].std().item() == pytest.approx(1 / 50, rel=0.02)
    assert not layer.lora_B["gaussian"].any()
    layer.add_adapter("random", LoraConfig(r=50, init_lora_weights=False))
    assert layer.lora_A["random"].any() and layer.lora_B["random"].any()
    before = layer.lora_A["random"].detach().clone()
    layer.reset_adapter_parameters("random")
    assert not torch.equal(layer.lora_A["random"], before)


@pytest.mark.parametrize(
    ("settings", "scaling", "rank"),
    [
        ({}, 2.0, 3),
        ({"use_rslora": True}, 6 / math.sqrt(3), 3),
        ({"rank_pattern": {"up": 4}, "alpha_pattern": {"mlp.up": 1}}, 0.25, 4),
        ({"rank_pattern": {"down": 4}}, 2.0, 3),
    ],
)
def test_rank_and_scaling_follow_the_module_name(settings: dict, scaling: float, rank: int):
    layer = LoraLinear(10, 7)
    layer.add_adapter("a", config(**settings), module_name="layers.0.mlp.up")
    assert layer.scaling["a"] == scaling and layer.lora_A["a"].shape[0] == rank


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adapters_over_16_bits_are_float32(dtype: torch.dtype):
    layer = layer_with(config(), dtype=dtype)
    low = dtype in (torch.float16, torch.bfloat16)
    assert layer.lora_A["a"].dtype == layer.lora_B["a"].dtype == (torch.float32 if low else dtype)
    layer.add_adapter("b", config(), autocast_adapter_dtype=False)
    assert layer.lora_A["b"].dtype == layer.lora_B["b"].dtype == dtype
    x = torch.randn(4, 10, dtype=dtype, requires_grad=True)
    layer.set_adapter(["a", "b"])
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    for name in "ab":
        assert layer.lora_A[name].grad.dtype == layer.lora_A[name].dtype
        assert layer.lora_B[name].grad.dtype == layer.lora_B[name].dtype


# Forward.


@pytest.mark.parametrize("shape", [(10,), (4, 10), (2, 3, 10), (0, 10)])
def test_output_is_base_plus_scaled_delta(shape: tuple[int, ...]):
    layer = layer_with(config())
    x = torch.randn(shape, dtype=torch.float64)
    assert layer(x).shape == (*shape[:-1], 7)
    assert_close(layer(x), base(layer, x) + delta(layer, "a", x))
    if x.numel():
        assert delta(layer, "a", x).norm() > 0.1 and base(layer, x).norm() > 0.1


def test_gradients_are_those_of_the_formula_and_the_base_has_none():
    layer = layer_with(config())
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 7, dtype=torch.float64)
    (layer(x) * weight).sum().backward()
    got = [x.grad, layer.lora_A["a"].grad, layer.lora_B["a"].grad]
    inputs = [x, layer.lora_A["a"], layer.lora_B["a"]]
    formula = ((base(layer, x) + delta(layer, "a", x)) * weight).sum()
    for gradient, expected in zip(got, torch.autograd.grad(formula, inputs), strict=True):
        assert_close(gradient, expected)
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.5, 0.0, 0.25)])
def test_active_adapters_are_summed(dropouts: tuple[float, ...]):
    layer = layer_with(
        *(
            config(r=rank, lora_alpha=alpha, lora_dropout=p)
            for rank, alpha, p in zip((3, 1, 8), (6, 5, 4), dropouts, strict=True)
        )
    )
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 7, dtype=torch.float64)
    subsets = itertools.chain.from_iterable(itertools.permutations("abc", n) for n in (1, 2, 3))
    for names in subsets:
        layer.set_adapter(names)
        layer.zero_grad()
        (layer(x) * weight).sum().backward()
        formula = base(layer, x) + sum(delta(layer, name, x) for name in names)
        assert_close(layer(x), formula)
        parameters = [p for name in names for p in (layer.lora_A[name], layer.lora_B[name])]
        expected = torch.autograd.grad((formula * weight).sum(), parameters)
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert_close(parameter.grad, gradient)
        for name in set("abc") - set(names):
            assert layer.lora_A[name].grad is None and layer.lora_B[name].grad is None


# Dropout.


def identity_layer(p: float, adapters: str = "a", size: int = 100) -> LoraLinear:
    """No base; adapter i's branch copies x to the i-th block of outputs, with weight 3."""
    layer = LoraLinear(size, size * len(adapters), bias=False, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    for index, name in enumerate(adapters):
        layer.add_adapter(name, config(r=size, lora_alpha=3 * size, lora_dropout=p))
        with torch.no_grad():
            layer.lora_A[name].copy_(eye)
            layer.lora_B[name].zero_()[index * size : (index + 1) * size] = eye
    with torch.no_grad():
        layer.weight.zero_()
    layer.set_adapter(list(adapters))
    return layer


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("adapters", ["a", "ab", "abc"])
def test_dropout_zeroes_and_scales_the_branch_input(adapters: str, implementation: str):
    p = 0.25
    layer = identity_layer(p, adapters)
    x = torch.rand(50, 100, dtype=torch.float64) + 1
    x.requires_grad_()
    torch.manual_seed(1)
    with lora_kernels.implementation(implementation):
        y = layer(x)
        y.sum().backward()
    keeps = [block / (3 * x) for block in y.detach().chunk(len(adapters), dim=1)]
    for keep in keeps:
        dropped = keep == 0
        assert_close(keep[~dropped], torch.full_like(keep[~dropped], 1 / (1 - p)))
        # 5,000 draws: five standard deviations are 0.031.
        assert abs(dropped.double().mean().item() - p) < 0.031
    for one, other in itertools.combinations(keeps, 2):
        assert not torch.equal(one == 0, other == 0), "two adapters had the same mask"
    # Backward has forward's masks.
    assert_close(x.grad, 3 * sum(keeps))
    for name, keep in zip(adapters, keeps, strict=True):
        a, b = layer.lora_A[name], layer.lora_B[name]
        branch = 3 * (x.detach() * keep) @ a.T @ b.T
        expected = torch.autograd.grad(branch.sum(), [a, b])
        assert_close(a.grad, expected[0])
        assert_close(b.grad, expected[1])
    torch.manual_seed(1)
    with lora_kernels.implementation(implementation):
        assert torch.equal(layer(x), y)
        assert not torch.equal(layer(x), y)


def test_dropout_leaves_the_base_alone_and_evaluation_whole():
    layer = identity_layer(0.5)
    x = torch.rand(6, 100, dtype=torch.float64)
    assert_close(layer.eval()(x), 3 * x)
    for names in ("a", ["a", "b"]):
        layer = layer_with(config(lora_dropout=0.5), config(lora_dropout=0.3)).train()
        layer.set_adapter(names)
        with torch.no_grad():
            for lora_b in layer.lora_B.values():
                lora_b.zero_()
        assert torch.equal(layer(x[:, :10]), base(layer, x[:, :10]))


# Adapters of one layer.


def test_adding_setting_and_deleting():
    layer = LoraLinear.from_linear(linear())
    assert trainable(layer) == {"weight", "bias"}
    layer.add_adapter("a", config())
    assert trainable(layer) == {"lora_A.a", "lora_B.a"} and layer.active_adapters == ["a"]
    layer.add_adapter("b", config(r=2))
    assert trainable(layer) == {"lora_A.a", "lora_B.a"} and layer.active_adapters == ["a"]
    layer.set_adapter("b")
    assert trainable(layer) == {"lora_A.b", "lora_B.b"} and layer.active_adapters == ["b"]
    layer.set_adapter(("b", "a"))
    assert trainable(layer) == {"lora_A.a", "lora_B.a", "lora_A.b", "lora_B.b"}
    assert layer.active_adapters == ["b", "a"]
    layer.set_adapter(["a"], inference_mode=True)
    assert trainable(layer) == set() and layer.active_adapters == ["a"]
    layer.delete_adapter("a")
    assert layer.active_adapters == ["b"] and trainable(layer) == {"lora_A.b", "lora_B.b"}
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A.b", "lora_B.b"]
    assert list(layer.scaling) == list(layer.lora_dropout) == ["b"]
    layer.delete_adapter("b")
    x = torch.randn(3, 10, dtype=torch.float64)
    assert torch.equal(layer(x), base(layer, x))
    layer.add_adapter("a", config(r=1))
    assert layer.active_adapters == ["a"] and layer.lora_A["a"].shape == (1, 10)


def test_deleting_one_of_several_active_keeps_the_others():
    layer = layer_with(config(), config(), config())
    layer.set_adapter(["c", "a"])
    layer.delete_adapter("a")
    assert layer.active_adapters == ["c"] and trainable(layer) == {"lora_A.c", "lora_B.c"}
    layer.delete_adapter("b")
    assert layer.active_adapters == ["c"]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda layer: layer.add_adapter("a", config()), "'a' exists already"),
        (lambda layer: layer.add_adapter("a.b", config()), "adapter_name: expected"),
        (lambda layer: layer.add_adapter("keys", config()), "reserved"),
        (lambda layer: layer.set_adapter("z"), r"\['z'\] not found"),
        (lambda layer: layer.set_adapter(["a", "z", "y"]), r"\['z', 'y'\] not found"),
        (lambda layer: layer.set_adapter(["a", "a"]), "each name once"),
        (lambda layer: layer.delete_adapter("z"), r"\['z'\] not found"),
        (lambda layer: layer.merge("z"), r"\['z'\] not found"),
        (lambda layer: layer.merge(["b", "b"]), "each name once"),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_wrong_names_are_errors_that_change_nothing(action, message: str, merged: bool):
    layer = layer_with(config(), config(r=1))
    if merged:
        layer.merge()
    before = snapshot(layer)
    with pytest.raises(ValueError, match=message):
        action(layer)
    assert snapshot(layer) == before


def test_disabled_is_the_base_bit_by_bit():
    layer = layer_with(config())
    x = torch.randn(3, 10, dtype=torch.float64)
    adapted = layer(x)
    layer.enable_adapters(False)
    assert layer.disabled and torch.equal(layer(x), base(layer, x))
    layer.enable_adapters(True)
    assert torch.equal(layer(x), adapted) and not torch.equal(adapted, base(layer, x))


# Merging.

LOW = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("names", [None, "a", "b", ["b", "a"], ["a", "b"]])
def test_merging_adds_in_float32_and_rounds_once(dtype: torch.dtype, names):
    layer = layer_with(config(), config(r=5, lora_alpha=1), dtype=dtype)
    merged = {None: ["a"], "a": ["a"], "b": ["b"]}.get(names if not isinstance(names, list) else 0)
    merged = merged or names
    total = layer.weight.detach().float()
    for name in merged:
        total += layer.scaling[name] * (layer.lora_B[name] @ layer.lora_A[name]).detach()
    original, parameter = layer.weight.detach().clone(), layer.weight
    layer.merge(names)
    assert layer.weight is parameter and layer.merged_adapters == merged
    # One rounding to dtype; the float32 sum itself may differ in its last bits.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer.weight.float(), total, rtol=eps, atol=1e-6)
    assert not torch.equal(layer.weight, original)
    x = torch.randn(4, 10).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.unmerge()
    assert torch.equal(layer.weight, original) and layer.merged_adapters == []
    layer.unmerge()
    assert torch.equal(layer.weight, original)


@pytest.mark.parametrize("dtype", LOW)
def test_merged_in_low_precision_it_is_as_exact_as_unmerged(dtype: torch.dtype, figure):
    """One rounding of the weight more: the ratio of errors has the limit that all others have."""
    torch.manual_seed(0)
    layer = LoraLinear(192, 96)
    layer.add_adapter("a", config(r=8, lora_alpha=16))
    layer.set_adapter("a")
    layer, x = layer.to(dtype), torch.randn(64, 192).to(dtype)
    oracle = copy.deepcopy(layer).double()(x.double())
    unmerged = layer(x)
    layer.merge()
    found = compare(layer(x), unmerged, oracle)
    figure(28, "error of merged over unmerged outputs", found.ratio, MAX_RATIO)
    assert found.ratio <= MAX_RATIO


def test_merged_output_equals_unmerged_output():
    layer = layer_with(config(), config(r=1))
    x = torch.randn(4, 10, dtype=torch.float64)
    for names in (["a"], ["a", "b"]):
        layer.set_adapter(names)
        expected = layer(x)
        layer.merge()
        assert_close(layer(x), expected)
        layer.unmerge()
        assert torch.equal(layer(x), expected)


def test_a_merged_layer_trains_no_adapter_but_passes_the_gradient():
    layer = layer_with(config())
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    layer.merge()
    layer(x).sum().backward()
    assert_close(x.grad, expected)
    assert layer.lora_A["a"].grad is None and layer.weight.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_merging_refuses_non_finite_weights_and_changes_nothing(half: str, value: float):
    layer = layer_with(config(), config())
    with torch.no_grad():
        getattr(layer, half)["b"][0, 0] = value
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.merge(["a", "b"])
    assert layer.merged_adapters == [] and layer._unmerged_weight is None
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]) or name.startswith(half)
    layer.merge("a")


def test_merging_refuses_what_overflows_the_weights_dtype():
    layer = layer_with(config(), dtype=torch.float16)
    with torch.no_grad():
        layer.lora_A["a"].fill_(200.0)
        layer.lora_B["a"].fill_(200.0)
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.merge()
    assert layer.weight.isfinite().all()


def test_merging_twice_or_while_disabled_is_an_error():
    layer = layer_with(config(), config())
    original = layer.weight.detach().clone()
    layer.enable_adapters(False)
    with pytest.raises(ValueError, match="disabled"):
        layer.merge()
    assert torch.equal(layer.weight, original)
    layer.enable_adapters(True)
    layer.merge("a")
    once = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"\['a'\] are merged already"):
        layer.merge("b")
    assert torch.equal(layer.weight, once)
    layer.unmerge()
    layer.merge([])
    assert layer.merged_adapters == [] and torch.equal(layer.weight, original)


def test_setting_or_disabling_a_merged_layer_unmerges_it_and_says_so():
    layer = layer_with(config(), config(r=1))
    original = layer.weight.detach().clone()
    x = torch.randn(4, 10, dtype=torch.float64)
    layer.merge()
    with pytest.warns(UserWarning, match="unmerged"):
        layer.set_adapter("b")
    assert torch.equal(layer.weight, original)
    assert_close(layer(x), base(layer, x) + delta(layer, "b", x))
    layer.merge()
    with pytest.warns(UserWarning, match="unmerged"):
        layer.enable_adapters(False)
    assert torch.equal(layer.weight, original) and torch.equal(layer(x), base(layer, x))
    layer.enable_adapters(True)
    assert layer.merged_adapters == []


def test_a_merged_adapter_cannot_be_deleted_and_another_can():
    layer = layer_with(config(), config())
    layer.merge()
    merged = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="'a' is merged"):
        layer.delete_adapter("a")
    layer.delete_adapter("b")
    layer.add_adapter("c", config())
    assert layer.merged_adapters == ["a"] and torch.equal(layer.weight, merged)


# Copies, conversions, files.


@pytest.mark.parametrize("merged", [False, True])
def test_a_deep_copy_is_equal_and_independent(merged: bool):
    layer = layer_with(config(), config(r=1))
    original = layer.weight.detach().clone()
    if merged:
        layer.merge()
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 10, dtype=torch.float64)
    assert torch.equal(twin(x), layer(x))
    before = snapshot(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin.unmerge()
    twin.set_adapter("b")
    twin.delete_adapter("a")
    assert snapshot(layer) == before
    layer.unmerge()
    assert torch.equal(layer.weight, original)


def test_a_state_dict_goes_through_safetensors_and_back():
    layer, twin = layer_with(config(), config(r=1)), layer_with(config(), config(r=1))
    twin.set_adapter("b")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    data = safetensors_save({name: t.detach() for name, t in layer.state_dict().items()})
    twin.load_state_dict(safetensors_load(data))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor)
    plain = linear()
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert list(LoraLinear(10, 7).state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("merged", [False, True])
def test_conversion_of_dtype_and_device(merged: bool):
    layer = layer_with(config())
    original = layer.weight.detach().clone()
    if merged:
        layer.merge()
    layer.to(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer(torch.randn(2, 10)).dtype == torch.float32
    assert trainable(layer) == {"lora_A.a", "lora_B.a"}
    layer.unmerge()
    assert torch.equal(layer.weight, original.float())
    layer.to("meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu")
    layer.reset_adapter_parameters("a")
    assert layer.lora_A["a"].abs().max() <= 1 / math.sqrt(10)


def test_an_adapter_follows_the_weights_device():
    layer = LoraLinear(10, 7, device="meta")
    layer.add_adapter("a", config())
    assert layer.lora_A["a"].is_meta and layer.lora_B["a"].is_meta


def test_its_representation_names_adapters_and_ranks():
    text = repr(layer_with(config(), config(r=1)))
    assert "adapters={a: r=3, b: r=1}, active=['a']" in text
    assert "in_features=10, out_features=7" in text


# The grouped projection.


def projections(*adapted: bool, dropout: float = 0.0, **settings) -> list[LoraLinear]:
    torch.manual_seed(3)
    layers = []
    for index, has_adapter in enumerate(adapted):
        layer = LoraLinear(10, 6 + index, bias=index == 1, dtype=torch.float64)
        if has_adapter:
            layer.add_adapter("a", config(r=1 + index, lora_dropout=dropout, **settings))
        layers.append(layer)
    return layers


def both_ways(x: Tensor, layers: list[LoraLinear]) -> Iterator[tuple[list[Tensor], dict]]:
    """Outputs and gradients of the grouped call, then of single calls, from the same seed."""
    for call in (grouped_projection, lambda x, layers: tuple(layer(x) for layer in layers)):
        x = x.detach().requires_grad_()
        torch.manual_seed(5)
        outputs = list(call(x, layers))
        for layer in layers:
            layer.zero_grad()
        sum((y * (index + 1)).square().sum() for index, y in enumerate(outputs)).backward()
        gradients = {
            (index, name): parameter.grad
            for index, layer in enumerate(layers)
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        }
        yield outputs, {**gradients, "x": x.grad}


@pytest.mark.parametrize("adapted", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_grouped_equals_single_calls(adapted: tuple[bool, ...], dropout: float):
    layers = projections(*adapted, dropout=dropout)
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    (outputs, gradients), (expected, expected_gradients) = both_ways(x, layers)
    for got, wanted in zip(outputs, expected, strict=True):
        assert_close(got, wanted)
    assert gradients.keys() == expected_gradients.keys()
    for name, wanted in expected_gradients.items():
        assert_close(gradients[name], wanted)


@pytest.mark.parametrize("state", ["disabled", "merged", "two adapters", "different dropouts"])
def test_grouped_follows_the_state_of_each_layer(state: str):
    layers = projections(True, True, True, dropout=0.3)
    if state == "disabled":
        layers[0].enable_adapters(False)
    elif state == "merged":
        layers[1].merge()
    elif state == "two adapters":
        layers[1].add_adapter("b", config(lora_dropout=0.1))
        layers[1].set_adapter(["a", "b"])
    else:
        layers[2].lora_dropout["a"] = 0.0
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    (outputs, gradients), (expected, expected_gradients) = both_ways(x, layers)
    for got, wanted in zip(outputs, expected, strict=True):
        assert_close(got, wanted)
    for name, wanted in expected_gradients.items():
        assert_close(gradients[name], wanted)


def test_grouped_calls_hooks_replaced_forwards_subclasses_and_plain_layers():
    class Doubled(LoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(5, 10, dtype=torch.float64)
    layers = projections(True, True, True)
    single = [layer(x) for layer in layers]
    calls: list[str] = []
    handle = layers[1].register_forward_hook(lambda *_: calls.append("forward"))
    grouped_projection(x, layers)
    handle.remove()
    handle = layers[2].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert_close(grouped_projection(x, layers)[2], layers[2](x))
    handle.remove()
    handle = layers[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    sum(y.sum() for y in grouped_projection(x.clone().requires_grad_(), layers)).backward()
    handle.remove()
    assert calls == ["forward", "backward"]

    inner = layers[1].forward
    layers[1].forward = lambda x: 3 * inner(x)
    assert_close(grouped_projection(x, layers)[1], 3 * single[1])
    del layers[1].forward

    doubled = Doubled(10, 4, dtype=torch.float64)
    doubled.add_adapter("a", config())
    for other in (doubled, linear()):
        outputs = grouped_projection(x, (*layers, other))
        for got, expected in zip(outputs, (*single, other(x)), strict=True):
            assert_close(got, expected)


def test_grouped_reads_x_once_wherever_one_call_can(monkeypatch: pytest.MonkeyPatch):
    """Also where only some have an adapter (q and v), and in evaluation with any dropout."""
    calls = []

    def counted(x: Tensor, projections, dropout_p: float) -> tuple[Tensor, ...]:
        calls.append((len(projections), dropout_p))
        return lora_kernels.lora_linear_grouped(x, projections, dropout_p)

    monkeypatch.setattr(layers_module, "lora_linear_grouped", counted)
    x = torch.randn(5, 10, dtype=torch.float64)
    layers = projections(True, False, True, dropout=0.4)
    grouped_projection(x, layers)
    layers[0].lora_dropout["a"] = 0.1
    grouped_projection(x, layers)
    for layer in layers:
        layer.eval()
    grouped_projection(x, layers)
    layers[0].merge()
    layers[2].enable_adapters(False)
    grouped_projection(x, layers)
    assert calls == [(3, 0.4), (3, 0.0), (3, 0.0)]


def test_grouped_under_autocast_equals_single_calls():
    layers = [layer.float() for layer in projections(True, False, True)]
    x = torch.randn(5, 10)
    with torch.autocast("cpu", torch.bfloat16):
        for got, layer in zip(grouped_projection(x, layers), layers, strict=True):
            assert got.dtype == torch.bfloat16 and torch.equal(got, layer(x))


# Injection.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = linear(10, 10)
        self.norm = nn.LayerNorm(10, dtype=torch.float64)
        self.mlp = nn.Sequential(linear(10, 12, bias=False), nn.ReLU(), linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x + self.query(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 10, dtype=torch.float64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = linear(10, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_injection_replaces_the_targets_and_freezes_all_else():
    model = net()
    weights = {name: parameter for name, parameter in model.named_parameters()}
    ids = torch.arange(6)
    expected = model(ids)
    settings = config(target_modules=["query", "mlp.0"], init_lora_weights=True)
    assert inject_lora(model, settings) is model
    paths = [path for path, _ in lora_layers(model)]
    assert paths == ["blocks.0.query", "blocks.0.mlp.0", "blocks.1.query", "blocks.1.mlp.0"]
    assert torch.equal(model(ids), expected)
    after = dict(model.named_parameters())
    for name, parameter in weights.items():
        assert after[name] is parameter and not parameter.requires_grad
    assert trainable(model) == {f"{path}.lora_{half}.default" for path in paths for half in "AB"}
    assert model.lora_configs == {"default": settings}
    model(ids).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_all_linear_without_a_declared_head_takes_every_linear():
    model = inject_lora(net(), config())
    assert len(list(lora_layers(model))) == 7
    sequence = inject_lora(nn.Sequential(linear(), nn.ReLU(), linear(7, 3)), config())
    assert [path for path, _ in lora_layers(sequence)] == ["0", "2"]
    assert sequence(torch.randn(4, 10, dtype=torch.float64)).shape == (4, 3)


def test_a_second_adapter_is_inactive_until_it_is_set():
    model = inject_lora(net(), config(target_modules=["query"]))
    ids = torch.arange(6)
    expected, active = model(ids), trainable(model)
    inject_lora(model, config(target_modules=["query", "head"]), "second")
    assert torch.equal(model(ids), expected)
    assert active_adapters(model) == ["default"] and trainable(model) == active
    assert model.head.active_adapters == []
    assert list(model.lora_configs) == ["default", "second"]


def test_a_new_adapter_never_becomes_active_in_a_part_of_the_model():
    """Also where no adapter is active."""
    model = inject_lora(net(), config(target_modules=["query"]))
    for _, layer in lora_layers(model):
        layer.set_adapter([])
    inject_lora(model, config(target_modules=["query", "head"]), "second")
    assert active_adapters(model) == [] and trainable(model) == set()


class Sharing(nn.Module):
    """One linear layer under two names of one module and a third of another, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = linear(10, 10)
        self.again = self.first
        self.inner = nn.Sequential(linear(10, 10), self.first)
        self.inner_again = self.inner
        self.tied = linear(10, 10)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.inner_again(self.again(self.first(x))))


def test_a_shared_layer_stays_shared():
    torch.manual_seed(0)
    model = Sharing()
    x = torch.randn(3, 10, dtype=torch.float64)
    expected = model(x)
    inject_lora(model, config(init_lora_weights=True))
    assert model.first is model.again is model.inner[1] is model.inner_again[1]
    assert isinstance(model.first, LoraLinear) and isinstance(model.inner[0], LoraLinear)
    assert model.tied is not model.first and model.tied.weight is model.first.weight
    assert torch.equal(model(x), expected)
    assert len(list(lora_layers(model))) == 3
    model(x).sum().backward()
    assert model.first.lora_B["default"].grad is not None
    # The gradient of a layer that is used three times is the sum of three.
    assert len(trainable(model)) == 6


def test_replacing_modules_reaches_every_place():
    model = Sharing()
    new = linear(10, 10)
    replace_modules(model, {model.first: new})
    assert model.first is model.again is model.inner[1] is new


class Custom(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (None, {"target_modules": ["quary"]}, ValueError, "quary"),
        (None, {"target_modules": ["query", "quary"]}, ValueError, "quary"),
        (None, {"target_modules": "query"}, ValueError, "matches no module"),
        (None, {"target_modules": None}, ValueError, "target_modules"),
        (None, {"target_modules": ["query", "norm"]}, TypeError, "blocks.0.norm"),
        (None, {"target_modules": ["embed"]}, TypeError, "Embedding"),
        (None, {"rank_pattern": {"quary": 2}}, ValueError, "rank_pattern"),
        (lambda m: setattr(m, "head", Custom(10, 20)), {}, TypeError, "head: .* got Custom"),
        (
            lambda m: m.blocks[1].query.register_forward_hook(lambda *_: None),
            {},
            ValueError,
            "blocks.1.query: .*hooks",
        ),
    ],
)
def test_a_wrong_target_is_an_error_that_changes_nothing(change, settings, error, message):
    model = net()
    if change is not None:
        change(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        inject_lora(model, config(**settings))
    assert snapshot(model) == before and not hasattr(model, "lora_configs")


@pytest.mark.parametrize("name", ["default", "a.b", "", "keys", "__base__"])
def test_a_used_or_impossible_name_is_an_error_that_changes_nothing(name: str):
    model = inject_lora(net(), config(target_modules=["query"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_name"):
        inject_lora(model, config(target_modules=["head"]), name)
    assert snapshot(model) == before


def test_a_name_that_one_layer_has_by_itself_is_an_error():
    model = net()
    model.head = LoraLinear.from_linear(model.head, config(), "mine")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'mine' exists already in head"):
        inject_lora(model, config(), "mine")
    assert snapshot(model) == before


def test_a_model_that_is_itself_a_linear_layer_cannot_be_injected_into():
    plain = linear()
    with pytest.raises(ValueError, match="target_modules"):
        inject_lora(plain, config())
    assert plain.weight.requires_grad
