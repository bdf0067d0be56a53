"""modules_to_save and trained biases: whose copy computes, what trains, and what is left behind."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import LoraConfig, adapters, inject_lora
from lora_kernels.layers import LoraLinear
from lora_kernels.saved_modules import ModulesToSave, saved_modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.q(x))
        h = h + self.mlp["down"](self.mlp["up"](h).tanh())
        return self.head(self.inner(h))


def config(**options) -> LoraConfig:
    options = {"modules_to_save": ["head", "norm"], **options}
    return LoraConfig(r=2, target_modules=["q"], init_lora_weights=False, **options)


def net(*configs: LoraConfig) -> Net:
    """An evaluating model with adapters "a", "b", ...: of each, the copies differ from the base."""
    model = Net().eval()
    for name, each in zip("abc", configs, strict=False):
        inject_lora(model, each, name)
        with torch.no_grad():
            for _, module in saved_modules(model):
                if name in module.modules_to_save:
                    for parameter in module.modules_to_save[name].parameters():
                        parameter.add_(0.1 * (ord(name) - 90))
    return model


def x() -> Tensor:
    return torch.linspace(-1, 1, 24).view(4, 6)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def copies(name: str) -> set[str]:
    return {
        f"{path}.modules_to_save.{name}.{kind}"
        for path in ("head", "norm")
        for kind in ("weight", "bias")
    }


def lora(name: str) -> set[str]:
    return {f"q.lora_A.{name}", f"q.lora_B.{name}"}


def snapshot(model: nn.Module) -> dict:
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "state": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "trained": trained(model),
        "configs": list(adapters.adapter_configs(model)),
    }


def test_the_copy_computes_and_the_original_is_kept():
    model = net(config())
    original = Net().head
    assert isinstance(model.head, ModulesToSave)
    assert torch.equal(model.head.original_module.weight, original.weight)
    assert torch.equal(model.head.weight, model.head.modules_to_save["a"].weight)
    assert not torch.equal(model.head.weight, original.weight)
    assert model.head.in_features == 8
    with pytest.raises(AttributeError, match="nothing"):
        model.head.nothing  # noqa: B018
    with adapters.disable_adapter(model):
        assert torch.equal(model(x()), Net().eval()(x()))
        assert model.head.weight is model.head.original_module.weight
    assert not torch.allclose(model(x()), Net().eval()(x()))


def test_what_is_active_trains_and_switches():
    model = net(config(), config(modules_to_save=["head"]), config(modules_to_save=None))
    assert trained(model) == lora("a") | copies("a")
    with_a = model(x())
    adapters.set_adapter(model, "b")
    assert trained(model) == lora("b") | {name for name in copies("b") if name.startswith("head")}
    assert model.norm.current() is model.norm.original_module
    assert torch.equal(model.head(torch.ones(8)), model.head.modules_to_save["b"](torch.ones(8)))
    adapters.set_adapter(model, "c")
    assert trained(model) == lora("c")
    assert model.head.current() is model.head.original_module
    adapters.set_adapter(model, ["c", "a"], inference_mode=True)
    assert trained(model) == set() and model.head.active_adapter == "a"
    adapters.set_adapter(model, "a")
    assert trained(model) == lora("a") | copies("a")
    assert torch.equal(model(x()), with_a)


def test_adding_an_adapter_leaves_what_trains_alone():
    model = net(config(bias="all"))
    model.mlp["up"].weight.requires_grad_(True)
    before, output = trained(model), model(x())
    inject_lora(model, config(), "b")
    assert trained(model) == before
    assert torch.equal(model(x()), output)
    # A copy begins with the base's values, not with another adapter's.
    assert torch.equal(model.head.modules_to_save["b"].weight, Net().head.weight)


def test_deleting_the_last_copy_puts_the_original_back():
    model = net(config(), config(modules_to_save=["head"]))
    adapters.delete_adapter(model, "a")
    assert isinstance(model.norm, nn.LayerNorm) and isinstance(model.head, ModulesToSave)
    assert model.head.active_adapter == "b"
    assert trained(model) == lora("b") | {name for name in copies("b") if name.startswith("head")}
    adapters.delete_adapter(model, "b")
    assert type(model.head) is nn.Linear and torch.equal(model(x()), Net().eval()(x()))
    # The name is free again.
    inject_lora(model, config(), "a")
    assert trained(model) == lora("a") | copies("a")


def test_a_deep_copy_is_equal_and_independent():
    model = net(config())
    other = copy.deepcopy(model)
    assert torch.equal(other(x()), model(x()))
    with torch.no_grad():
        other.head.weight.zero_()
    assert model.head.weight.any() and not other.head.modules_to_save["a"].weight.any()


def test_a_whole_block_with_buffers_goes_to_a_file_and_back(tmp_path: Path):
    model = net(config(modules_to_save=["inner"])).train()
    model(x())
    model.eval()
    adapters.save_adapters(model, tmp_path)
    state = adapters.adapter_state_dict(model, "a")
    assert {key for key in state if key.startswith("inner.")} == {
        f"inner.{key}" for key in Net().inner.state_dict()
    }
    again = Net().eval()
    adapters.load_adapter_into(again, tmp_path / "a")
    assert torch.equal(again(x()), model(x()))
    assert int(again.inner.current()[1].num_batches_tracked) == 1
    assert not trained(again)


def test_a_saved_layer_of_ours_is_saved_as_a_linear():
    """As in LoraLlama, whose projections are LoraLinears before they have an adapter."""
    model = Net().eval()
    model.head = LoraLinear.from_linear(model.head)
    model.inner[0] = LoraLinear.from_linear(model.inner[0])
    inject_lora(model, config(modules_to_save=["head", "inner"]), "a")
    with torch.no_grad():
        model.head.modules_to_save["a"].weight.mul_(2)
    expected = model(x())
    adapters.merge_adapter(model)
    plain = adapters.base_state_dict(model)
    adapters.unload(model)
    assert torch.allclose(model(x()), expected, atol=1e-5)
    assert [type(module) for module in model.modules()] == [type(m) for m in Net().modules()]
    assert plain.keys() == Net().state_dict().keys()
    assert torch.equal(plain["head.weight"], model.head.weight)


def test_merged_the_copy_stays_and_unloaded_it_is_the_module():
    model = net(config())
    expected = model(x())
    adapters.merge_adapter(model)
    assert torch.allclose(model(x()), expected, atol=1e-5)
    copied = model.head.modules_to_save["a"]
    adapters.unload(model)
    assert model.head is copied and torch.allclose(model(x()), expected, atol=1e-5)
    disabled = net(config(), config(modules_to_save=None))
    adapters.set_adapter(disabled, "b")
    original = disabled.head.original_module
    adapters.unload(disabled)
    assert disabled.head is original


def again(name: str = "b", **options) -> Callable[[Net], None]:
    return lambda model: inject_lora(model, config(**options), name)


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (again("a"), ValueError, "'a' exists already"),
        (again(modules_to_save=["haed"]), ValueError, r"modules_to_save: .*\['haed'\]"),
        (again(modules_to_save=["head", "haed"]), ValueError, r"\['haed'\], which match none"),
        (again(modules_to_save=["mlp"]), TypeError, "mlp: expected a module, got ModuleDict"),
        (again(modules_to_save=["inner", "inner.0"]), ValueError, r"got inner\.0 in inner"),
        (again(modules_to_save=["q"]), ValueError, "matches no module"),
        (lambda m: inject_lora(m, LoraConfig(target_modules=["head"]), "b"), TypeError, "head"),
        (
            lambda m: inject_lora(m, LoraConfig(target_modules=["up"], modules_to_save=["q"]), "b"),
            ValueError,
            "q: expected a module without adapters, q has one",
        ),
        (lambda m: adapters.set_adapter(m, ["a", "both"]), ValueError, r"got \['a', 'both'\]"),
        (again(bias="all"), ValueError, "bias: expected 'none', as .* 'biased' already"),
    ],
)
def test_an_error_changes_nothing(action: Callable, error: type[Exception], message: str):
    model = net(config())
    inject_lora(model, config(), "both")
    inject_lora(model, config(bias="lora_only", modules_to_save=None), "biased")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        action(model)
    assert snapshot(model) == before


def test_a_classifiers_head_may_have_either_name():
    """As PEFT has it, all of them save both names, of which a model has one."""
    for names in (None, ["norm"], ["classifier", "score"]):
        model = Net()
        model.score = model.head
        del model.head
        inject_lora(model, config(modules_to_save=names, task_type="SEQ_CLS"))
        assert isinstance(model.score, ModulesToSave)
        assert isinstance(model.norm, ModulesToSave) == (names == ["norm"])
        saved = model.lora_configs["default"].modules_to_save
        assert set(saved) == {"classifier", "score", *(names or [])}
    with pytest.raises(ValueError, match="classifier"):
        inject_lora(Net(), config(modules_to_save=["classifier"]))


# Biases.


BIASES = {
    "none": set(),
    "lora_only": {"q.bias"},
    "all": {"q.bias", "mlp.up.bias", "mlp.down.bias", "inner.0.bias", "inner.1.bias"},
}


@pytest.mark.parametrize("kind", BIASES)
def test_biases_train_with_their_adapter(kind: str):
    """Those of saved modules are their copies'."""
    model = net(config(bias=kind), config(modules_to_save=None))
    assert trained(model) == lora("a") | copies("a") | BIASES[kind]
    adapters.set_adapter(model, "b")
    assert trained(model) == lora("b")
    adapters.set_adapter(model, ["b", "a"])
    assert trained(model) == lora("a") | lora("b") | copies("a") | BIASES[kind]
    adapters.set_adapter(model, "a", inference_mode=True)
    assert trained(model) == set()
    adapters.set_adapter(model, "a")
    adapters.delete_adapter(model, "a")
    assert trained(model) == lora("b")


def test_disabling_warns_that_trained_biases_stay():
    model = net(config(bias="all"))
    with torch.no_grad():
        model.q.bias[0] += 1.0
    with pytest.warns(UserWarning, match="'a' has trained"), adapters.disable_adapter(model):
        assert not torch.allclose(model(x()), Net().eval()(x()))


@pytest.mark.parametrize("kind", ["lora_only", "all"])
def test_biases_go_to_a_file_and_into_the_base(kind: str, tmp_path: Path):
    model = net(config(bias=kind))
    with torch.no_grad():
        for name in BIASES[kind]:
            model.get_parameter(name).add_(0.5)
    adapters.save_adapters(model, tmp_path)
    read = Net().eval()
    adapters.load_adapter_into(read, tmp_path / "a")
    assert torch.equal(read(x()), model(x())) and not trained(read)
    trainable = Net().eval()
    adapters.load_adapter_into(trainable, tmp_path / "a", is_trainable=True)
    assert trained(trainable) == lora("default") | copies("default") | BIASES[kind]


def test_a_file_without_its_biases_is_refused(tmp_path: Path):
    model = net(config(bias="all"))
    tensors = adapters.adapter_state_dict(model, "a")
    del tensors["q.base_layer.bias"], tensors["mlp.up.bias"]
    adapters.save_adapter(tmp_path, adapters.adapter_configs(model)["a"], tensors)
    read = Net().eval()
    before = snapshot(read)
    with pytest.raises(ValueError, match=r"missing q\.bias; missing mlp\.up\.bias"):
        adapters.load_adapter_into(read, tmp_path)
    assert snapshot(read) == before
