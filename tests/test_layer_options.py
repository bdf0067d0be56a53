"""One LoraLinear with what an adapter can have beside A and B: a bias on B, DoRA, a Conv1D."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels import LoraConfig, LoraLinear, adapters
from lora_kernels.layers import grouped_projection

OPTIONS = {
    "plain": {},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
}
SCALING = {"plain": 1.25, "lora_bias": 1.25, "dora": 1.25, "dora, rslora": 5 / 2}
IN, OUT, RANK = 7, 9, 4


def linear(bias: bool = True, conv1d: bool = False) -> nn.Module:
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT, bias)
    nn.init.normal_(base.weight, std=0.4)
    if base.bias is not None:
        nn.init.normal_(base.bias)
    return base.double()


def layer(kind: str, bias: bool = True, conv1d: bool = False, **options) -> LoraLinear:
    """With parameters that are nowhere zero, and magnitudes that are not the norms."""
    config = LoraConfig(r=RANK, lora_alpha=5, init_lora_weights=False, **OPTIONS[kind], **options)
    made = LoraLinear.from_linear(linear(bias, conv1d), config)
    with torch.no_grad():
        for parameter in made.adapter_parameters("default").values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def x(rows: int = 5) -> Tensor:
    return torch.sin(torch.arange(rows * IN, dtype=torch.float64) * 1.7).view(rows, IN)


def formula(made: LoraLinear, kind: str, inputs: Tensor) -> Tensor:
    """Straight from the definition, with the updated weight made whole."""
    weight = made.weight.t() if made.fan_in_fan_out else made.weight
    a, b = made.lora_A["default"], made.lora_B["default"]
    whole = weight + SCALING[kind] * b @ a
    if "dora" in kind:
        length = whole.detach().norm(dim=1)
        whole = (made.lora_magnitude_vector["default"] / length)[:, None] * whole
    y = inputs @ whole.t()
    if made.bias is not None:
        y = y + made.bias
    if kind == "lora_bias":
        y = y + SCALING[kind] * made.lora_bias["default"]
    return y


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize(("bias", "conv1d"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("implementation", ["eager", "reference"])
def test_output_and_gradients_are_those_of_the_formula(kind, bias, conv1d, implementation):
    made = layer(kind, bias, conv1d)
    parameters = [p for p in made.parameters() if p.requires_grad]
    assert len(parameters) == (2 if kind == "plain" else 3)
    inputs = x().requires_grad_()
    with lk.implementation(implementation):
        got = made(inputs)
        gradients = torch.autograd.grad(got.tanh().sum(), [inputs, *parameters])
    expected = formula(made, kind, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    exact = torch.autograd.grad(expected.tanh().sum(), [inputs, *parameters])
    for gradient, wanted in zip(gradients, exact, strict=True):
        assert wanted.any()
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("conv1d", [False, True])
def test_the_kernels_compute_the_formula_too(kind: str, conv1d: bool, device: torch.device):
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    made = layer(kind, conv1d=conv1d).to(device, dtype)
    parameters = list(made.adapter_parameters("default").values())
    inputs = x().to(device, dtype).requires_grad_()
    with lk.implementation("triton"):
        got = made(inputs)
        gradients = torch.autograd.grad(got.tanh().sum(), [inputs, *parameters])
    expected = formula(made, kind, inputs)
    exact = torch.autograd.grad(expected.tanh().sum(), [inputs, *parameters])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for value, wanted in zip([got, *gradients], [expected, *exact], strict=True):
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("conv1d", [False, True])
def test_merged_it_computes_the_same_and_unmerged_it_is_what_it_was(kind, conv1d):
    made = layer(kind, conv1d=conv1d)
    expected = made(x())
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.merge()
    torch.testing.assert_close(made(x()), expected, rtol=1e-12, atol=1e-12)
    plain = made.to_linear()
    torch.testing.assert_close(plain(x()), expected, rtol=1e-12, atol=1e-12)
    assert type(plain) is (Conv1D if conv1d else nn.Linear)
    made.unmerge()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_bias_on_b_needs_a_bias_to_merge_into():
    made = layer("lora_bias", bias=False)
    before = made.weight.clone()
    with pytest.raises(ValueError, match=r"no bias to merge it into \(adapters \['default'\]\)"):
        made.merge()
    assert torch.equal(made.weight, before) and made.merged_adapters == []


@pytest.mark.parametrize("part", ["lora_bias", "lora_magnitude_vector"])
def test_merging_refuses_what_is_not_finite(part: str):
    made = layer("dora" if part == "lora_magnitude_vector" else "lora_bias")
    with torch.no_grad():
        getattr(made, part)["default"][3] = math.inf
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match="has NaN or Inf"):
        made.merge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    assert made.merged_adapters == []


def test_a_magnitude_begins_with_the_length_of_its_row():
    """So that a new DoRA adapter changes nothing; also where B is not zero at first."""
    base = linear()
    made = LoraLinear.from_linear(base, LoraConfig(r=RANK, use_dora=True))
    torch.testing.assert_close(made(x()), base(x()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        made.lora_magnitude_vector["default"].detach(), base.weight.norm(dim=1)
    )
    random = LoraLinear.from_linear(
        base, LoraConfig(r=RANK, use_dora=True, init_lora_weights=False)
    )
    whole = base.weight + 2 * random.lora_B["default"] @ random.lora_A["default"]
    torch.testing.assert_close(
        random.lora_magnitude_vector["default"], whole.norm(dim=1).detach(), check_stride=False
    )


def test_dropout_of_dora_is_pefts():
    """What dropout leaves of x goes through the scaled products, the rest through the base."""
    made = layer("dora", lora_dropout=0.5).train()
    torch.manual_seed(1)
    dropped = F.dropout(x(), 0.5)
    torch.manual_seed(1)
    got = made(x())
    whole = formula(made, "dora", dropped) - made.bias
    expected = whole + F.linear(x() - dropped, made.weight, made.bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(made.eval()(x()), layer("dora")(x()))


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_adapters_dtype_is_that_of_a_and_b(kind: str):
    for dtype in (torch.float16, torch.bfloat16):
        made = LoraLinear.from_linear(linear().to(dtype))
        made.add_adapter("wide", LoraConfig(**OPTIONS[kind]))
        made.add_adapter("narrow", LoraConfig(**OPTIONS[kind]), autocast_adapter_dtype=False)
        assert {p.dtype for p in made.adapter_parameters("wide").values()} == {torch.float32}
        assert {p.dtype for p in made.adapter_parameters("narrow").values()} == {dtype}
        made.set_adapter("wide")
        y = made(x().to(dtype))
        assert y.dtype == dtype
        y.sum().backward()
        for parameter in made.adapter_parameters("wide").values():
            assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("kinds", [["lora_bias", "dora"], ["dora", "plain"], ["dora"]], ids=str)
def test_a_state_dict_a_copy_and_a_deletion(kinds: list[str]):
    made = layer(kinds[0])
    for index, kind in enumerate(kinds[1:]):
        made.add_adapter(f"more{index}", LoraConfig(init_lora_weights=False, **OPTIONS[kind]))
    made.set_adapter(list(made.lora_A))
    expected = made(x())
    other = copy.deepcopy(made)
    assert torch.equal(other(x()), expected)
    other.load_state_dict({k: torch.zeros_like(v) + 1 for k, v in made.state_dict().items()})
    other.load_state_dict(load(save(made.state_dict())))
    assert torch.equal(other(x()), expected)
    for name in list(made.lora_A):
        made.delete_adapter(name)
        assert made.adapter_parameters(name) == {}
    assert set(made.state_dict()) == {"weight", "bias"}
    assert torch.equal(made(x()), linear()(x()))


def test_only_what_is_active_trains():
    made = layer("dora")
    made.add_adapter("b", LoraConfig(r=2, lora_bias=True))
    assert all(p.requires_grad for p in made.adapter_parameters("default").values())
    assert not any(p.requires_grad for p in made.adapter_parameters("b").values())
    made.set_adapter("b")
    assert not any(p.requires_grad for p in made.adapter_parameters("default").values())
    assert all(p.requires_grad for p in made.adapter_parameters("b").values())
    assert not made.weight.requires_grad and not made.bias.requires_grad


def test_trained_base_biases_get_their_gradient():
    for kind in OPTIONS:
        made = layer(kind)
        made.bias.requires_grad_(True)
        made(x()).tanh().sum().backward()
        got = made.bias.grad
        made.bias.grad = None
        formula(made, kind, x()).tanh().sum().backward()
        torch.testing.assert_close(got, made.bias.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_grouped_layers_of_different_kinds_equal_single_calls(dropout: float):
    made = [layer(kind, lora_dropout=dropout).train() for kind in OPTIONS]
    torch.manual_seed(0)
    together = grouped_projection(x(), made)
    torch.manual_seed(0)
    for y, single in zip(together, made, strict=True):
        torch.testing.assert_close(y, single(x()), rtol=1e-12, atol=1e-12)


def test_a_conv1d_keeps_its_weight_as_it_is():
    base = linear(conv1d=True)
    made = LoraLinear.from_linear(base)
    assert made.weight is base.weight and made.bias is base.bias and made.fan_in_fan_out
    assert (made.in_features, made.out_features) == (IN, OUT)
    torch.testing.assert_close(made(x()), base(x()), rtol=1e-12, atol=1e-12)
    assert not LoraLinear.from_linear(linear()).fan_in_fan_out

    class Other(Conv1D):
        pass

    with pytest.raises(TypeError, match=r"expected torch\.nn\.Linear, got Other"):
        LoraLinear.from_linear(Other(2, 2))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_checkpointed_gradients_are_the_same(kind: str, reentrant: bool):
    made = layer(kind, lora_dropout=0.3).train()
    parameters = list(made.adapter_parameters("default").values())
    found = []
    for through in (made, lambda t: checkpoint(made, t, use_reentrant=reentrant)):
        torch.manual_seed(2)
        through(x().requires_grad_()).tanh().sum().backward()
        found.append([p.grad for p in parameters])
        made.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "configs",
    [
        [{"use_dora": True}],
        [{"lora_bias": True}],
        [{"use_dora": True}, {"lora_bias": True}],
        [{"modules_to_save": ["1"], "bias": "all"}],
    ],
    ids=str,
)
def test_compiled_without_a_graph_break(configs: list[dict]):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Linear(OUT, 4))
    for index, options in enumerate(configs):
        config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
        lk.inject_lora(model, config, f"a{index}")
    adapters.set_adapter(model, [f"a{index}" for index in range(len(configs))])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (model, compiled):
        y = run(x().float())
        y.tanh().sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
