"""The initialisations, against PEFT's own: the same numbers, and the same base left behind."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import LoraConfig, LoraLinear, adapters, inject_lora
from lora_kernels.init_weights import changes_weight

EXACT = ["pissa", "olora", "orthogonal", "gaussian", True, False]
OLORA_CONV1D = ("olora", True)
CHANGING = ["pissa", "pissa_niter_8", "olora"]


def net(dtype: torch.dtype = torch.float32, conv1d: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first = Conv1D(20, 12) if conv1d else nn.Linear(12, 20)
    with torch.no_grad():
        # Singular values far enough apart for a randomised SVD to find them.
        u, s, vh = torch.linalg.svd(first.weight, full_matrices=False)
        first.weight.copy_(u * (2 * 0.7 ** torch.arange(len(s))) @ vh)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(20, 9)).to(dtype)


def settings(mode: bool | str, **options) -> dict:
    return {"r": 4, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": mode, **options}


def x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, 60).view(5, 12).to(dtype)


def both(mode: bool | str, model: nn.Module, **options) -> tuple[LoraLinear, nn.Module]:
    """The layer as we make it and as PEFT does; what is drawn, is drawn from the same seed."""
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(**settings(mode, **options))
    ).base_model.model[0]
    ours = inject_lora(model, LoraConfig(**settings(mode, **options)))[0]
    if not changes_weight(mode):
        # PEFT makes, and so draws, two nn.Linear before the numbers that it keeps.
        torch.manual_seed(5)
        if mode == "orthogonal":
            theirs.orthogonal_init("default")
        elif mode is False:
            theirs.lora_A["default"].reset_parameters()
            theirs.lora_B["default"].reset_parameters()
        else:
            theirs.reset_lora_parameters("default", mode)
        torch.manual_seed(5)
        ours.reset_adapter_parameters("default")
    return ours, theirs


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    ("mode", "conv1d"),
    # PEFT's OLoRA decomposes a Conv1D's transposed weight, whose parts do not fit A and B.
    [
        (mode, conv1d)
        for mode in EXACT
        for conv1d in (False, True)
        if (mode, conv1d) != OLORA_CONV1D
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_numbers_are_those_of_peft(mode: bool | str, dtype: torch.dtype, conv1d: bool):
    ours, theirs = both(mode, net(dtype, conv1d), lora_alpha=3)
    assert ours.lora_A["default"].dtype == ours.lora_B["default"].dtype == torch.float32
    assert torch.equal(ours.lora_A["default"], theirs.lora_A["default"].weight.float())
    assert torch.equal(ours.lora_B["default"], theirs.lora_B["default"].weight.float())
    assert torch.equal(ours.weight, theirs.base_layer.weight)
    assert ours.weight.shape == theirs.base_layer.weight.shape


def test_a_bias_on_b_begins_as_pefts():
    ours, theirs = both(False, net(), lora_bias=True)
    assert torch.equal(ours.lora_bias["default"], theirs.lora_B["default"].bias)
    ours, theirs = both(True, net(), lora_bias=True)
    assert not ours.lora_bias["default"].any()
    assert not theirs.lora_B["default"].bias.any()


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("mode", CHANGING)
def test_the_part_moves_from_the_base_to_the_adapter(mode: str, conv1d: bool):
    """At first the layer computes what it did; the base alone is the residual, also deleted."""
    model = net(conv1d=conv1d)
    before, weight = model(x()), model[0].weight.detach().clone()
    flag = {"fan_in_fan_out": conv1d}
    layer = inject_lora(model, LoraConfig(**settings(mode, **flag)))[0]
    assert (model(x()) - before).norm() < 1e-5 * before.norm()
    with adapters.disable_adapter(model):
        residual = model(x())
    assert (residual - before).norm() > 0.05 * before.norm()
    delta = 1.5 * layer.lora_B["default"] @ layer.lora_A["default"]
    whole = weight.t() if conv1d else weight
    assert torch.allclose(layer.weight_by_rows + delta, whole, atol=1e-6)
    if mode != "olora":
        # The leading singular values have gone.
        left = torch.linalg.svdvals(layer.weight)
        assert torch.allclose(left[:-4], torch.linalg.svdvals(weight)[4:], atol=1e-4)
    adapters.delete_adapter(model, "default")
    assert torch.equal(model(x()), residual)


@pytest.mark.parametrize("mode", CHANGING)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lora_alpha": 0}, "lora_alpha: .* expects a scaling from .* got 0.0 \\(2\\)"),
        ({"lora_alpha": -8}, "lora_alpha: .* expects a scaling from"),
        ({"lora_alpha": 1e38}, "lora_alpha: .* expects a scaling from"),
        ({"weight": torch.nan}, "expects a finite weight .* norm nan"),
        ({"weight": torch.inf}, "expects a finite weight .* norm inf"),
        ({"weight": 3e38}, "expects a finite weight .* norm inf"),
    ],
    ids=str,
)
def test_what_would_leave_no_number_in_the_base_is_refused(mode, changes, match):
    """Of the second layer alone: the first is unchanged as well."""
    model = net()
    weight = changes.get("weight")
    alpha = {"alpha_pattern": {"2": changes["lora_alpha"]}} if weight is None else {}
    if weight is not None:
        with torch.no_grad():
            model[2].weight[:2].fill_(weight)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        inject_lora(model, LoraConfig(**settings(mode, target_modules=["0", "2"], **alpha)))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("scaling", "dtype"), [(1e-4, torch.float16), (1e4, torch.bfloat16)])
@pytest.mark.parametrize("mode", ["pissa", "olora"])
def test_the_smallest_and_the_largest_scaling_keep_the_weight(mode, scaling, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False).to(dtype)
    weight = linear.weight.detach().float()
    layer = LoraLinear.from_linear(linear)
    layer.add_adapter("a", LoraConfig(r=4, lora_alpha=4 * scaling, init_lora_weights=mode))
    delta = scaling * layer.lora_B["a"] @ layer.lora_A["a"]
    error = (layer.weight.float() + delta - weight).norm() / weight.norm()
    # Of OLoRA both parts are as large as the scaling.
    assert error <= 8 * torch.finfo(dtype).eps * max(1, scaling if mode == "olora" else 1)


@pytest.mark.parametrize("mode", CHANGING)
def test_a_saved_adapter_takes_the_same_part_out_of_a_new_base(mode: str, tmp_path):
    model = inject_lora(net(), LoraConfig(**settings(mode)))
    with torch.no_grad():
        model[0].lora_B["default"].add_(0.1)
    adapters.save_adapters(model, tmp_path)
    again = net()
    torch.manual_seed(7)
    adapters.load_adapter_into(again, tmp_path)
    assert torch.equal(again(x()), model(x()))


def test_the_seed_of_a_randomised_svd_is_its_own():
    layer = LoraLinear.from_linear(net()[0])
    state = torch.get_rng_state()
    layer.add_adapter("a", LoraConfig(**settings("pissa_niter_2")))
    assert torch.equal(torch.get_rng_state(), state)


def test_dora_begins_with_the_lengths_of_what_pissa_leaves_and_takes():
    model = net()
    weight = model[0].weight.detach().clone()
    layer = inject_lora(model, LoraConfig(**settings("pissa", use_dora=True)))[0]
    magnitude = layer.lora_magnitude_vector["default"]
    assert torch.allclose(magnitude, weight.norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (net, {"init_lora_weights": "pissa", "r": 13}, ValueError, "r: 'pissa' expects at most 12"),
        (net, {"init_lora_weights": "olora", "r": 13}, ValueError, "r: 'olora' expects at most 12"),
        (net, {"init_lora_weights": "orthogonal", "r": 3}, ValueError, "even rank, got 3"),
        (
            lambda: net(torch.float64),
            {"init_lora_weights": "pissa"},
            TypeError,
            "16 or 32 bits, got torch.float64",
        ),
        (lambda: net().to("meta"), {"init_lora_weights": "olora"}, ValueError, "has no memory"),
        (
            net,
            {"init_lora_weights": "pissa", "target_modules": ["0", "2"], "rank_pattern": {"2": 10}},
            ValueError,
            r"at most 9 for weight \(9, 20\), got 10 \(2\)",
        ),
    ],
)
def test_an_unsuitable_layer_is_an_error_that_changes_nothing(make, options, error, message):
    model = make()
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        inject_lora(model, LoraConfig(**settings(True, **options)))
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "lora_configs")


def test_a_shared_weight_is_not_decomposed():
    model = net()
    model.append(nn.Linear(12, 20))
    model[3].weight = model[0].weight
    for mode in ("pissa", "olora"):
        with pytest.raises(ValueError, match=r"0: its weight is shared by \['0', '3'\]"):
            inject_lora(model, LoraConfig(**settings(mode)))
    with pytest.warns(UserWarning, match=r"0: its weight is shared with \['3'\]"):
        inject_lora(model, LoraConfig(**settings(True)))


def test_a_merged_weight_is_not_decomposed():
    model = inject_lora(net(), LoraConfig(**settings(False)))
    adapters.merge_adapter(model)
    for options in ({"init_lora_weights": "pissa"}, {"use_dora": True}):
        with pytest.raises(ValueError, match="are merged into the weight"):
            inject_lora(model, LoraConfig(**settings(True, **options)), "b")
    adapters.unmerge_adapter(model)
    inject_lora(model, LoraConfig(**settings("pissa")), "b")
