"""The adapters of a whole model: switched, merged, unloaded, and exchanged with PEFT by file."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import LoraConfig, LoraLinear, adapters, inject_lora
from lora_kernels.layers import active_adapters, lora_layers

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["q"](x).tanh() * block["v"](x)
        return self.head(x)


def config(**changes) -> LoraConfig:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], "init_lora_weights": False}
    return LoraConfig(**{**settings, **changes})


def net() -> Net:
    """Adapter "a" on q and v (active), "b" on q alone, "c" on v and the head."""
    torch.manual_seed(0)
    model = inject_lora(Net().double(), config(), "a")
    inject_lora(model, config(target_modules=["q"], r=1), "b")
    inject_lora(model, config(target_modules=["v", "head"], r=3), "c")
    return model


def x() -> Tensor:
    return torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def active(model: nn.Module) -> dict[str, list[str]]:
    return {path: layer.active_adapters for path, layer in lora_layers(model)}


def trainable(model: nn.Module) -> set[str]:
    """Adapter names with a parameter that requires a gradient."""
    return {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def snapshot(model: nn.Module) -> tuple:
    layers = {
        path: (layer.active_adapters[:], layer.merged_adapters[:], layer.disabled)
        for path, layer in lora_layers(model)
    }
    parameters = {
        name: (p.requires_grad, p.detach().clone().view(-1).tolist())
        for name, p in model.named_parameters()
    }
    modules = {name: type(m) for name, m in model.named_modules()}
    return layers, parameters, modules, dict(adapters.adapter_configs(model))


# Switching.


def test_setting_is_for_every_layer_that_has_the_adapter():
    model = net()
    adapters.set_adapter(model, "b")
    assert active(model) == {
        "blocks.0.q": ["b"], "blocks.0.v": [], "blocks.1.q": ["b"], "blocks.1.v": [], "head": [],
    }  # fmt: skip
    assert trainable(model) == {"b"} and active_adapters(model) == ["b"]
    adapters.set_adapter(model, ["c", "a"])
    assert active(model)["blocks.1.v"] == ["c", "a"] and active(model)["head"] == ["c"]
    assert active(model)["blocks.1.q"] == ["a"] and trainable(model) == {"a", "c"}
    adapters.set_adapter(model, ["a"], inference_mode=True)
    assert active_adapters(model) == ["a"] and trainable(model) == set()


def test_disabling_is_for_a_while_and_ends_with_an_error_too():
    model = net()
    adapted = model(x())
    model.head.enable_adapters(False)
    plain = copy.deepcopy(model)
    adapters.unload(plain)
    with pytest.raises(KeyError), adapters.disable_adapter(model):
        assert torch.equal(model(x()), plain(x())) and not torch.equal(model(x()), adapted)
        with adapters.disable_adapter(model):
            assert torch.equal(model(x()), plain(x()))
        assert torch.equal(model(x()), plain(x()))
        raise KeyError
    assert torch.equal(model(x()), adapted)
    assert model.head.disabled, "a layer that was disabled before was enabled"


def test_disabling_a_merged_model_unmerges_it():
    model = net()
    before = weights(model)
    adapted = model(x())
    adapters.merge_adapter(model)
    with pytest.warns(UserWarning, match="unmerged"), adapters.disable_adapter(model):
        assert_same_weights(model, before)
    assert torch.equal(model(x()), adapted)


@pytest.mark.parametrize(
    ("start", "deleted", "expected"),
    [
        (["a"], "b", ["a"]),
        (["a"], "a", ["b"]),
        (["c"], "c", ["a"]),
        (["a", "c"], "a", ["c"]),
        (["c", "b"], "b", ["c"]),
        ([], "a", []),
    ],
)
def test_deleting_leaves_one_choice_for_the_whole_model(start, deleted, expected):
    model = net()
    adapters.set_adapter(model, start)
    adapters.delete_adapter(model, deleted)
    for _, layer in lora_layers(model):
        assert deleted not in layer.lora_A
        assert layer.active_adapters == [name for name in expected if name in layer.lora_A]
    assert list(adapters.adapter_configs(model)) == [n for n in "abc" if n != deleted]
    assert trainable(model) == set(expected)


def test_deleting_an_inactive_adapter_touches_nothing_else():
    model = net()
    adapters.set_adapter(model, "a", inference_mode=True)
    adapters.merge_adapter(model)
    merged = weights(model)
    adapters.delete_adapter(model, "b")
    assert {tuple(layer.merged_adapters) for _, layer in lora_layers(model)} == {("a",), ()}
    assert trainable(model) == set()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, merged[name])


def test_deleting_the_last_adapter_leaves_the_base():
    model = inject_lora(net(), config(), "d")
    plain = copy.deepcopy(model)
    adapters.unload(plain)
    for name in "abcd":
        adapters.delete_adapter(model, name)
    assert torch.equal(model(x()), plain(x())) and trainable(model) == set()
    inject_lora(model, config(target_modules=["head"]), "new")
    assert active_adapters(model) == ["new"]


@pytest.mark.parametrize(
    "action",
    [
        lambda m: adapters.set_adapter(m, "z"),
        lambda m: adapters.set_adapter(m, ["a", "z"]),
        lambda m: adapters.set_adapter(m, ["a", "a"]),
        lambda m: adapters.set_adapter(m, ["c", "c"]),
        lambda m: adapters.delete_adapter(m, "z"),
        lambda m: adapters.delete_adapter(m, "a"),
        lambda m: adapters.merge_adapter(m, "z"),
        lambda m: adapters.merge_adapter(m, ["a", "z"]),
        lambda m: adapters.merge_adapter(m, "b"),
        lambda m: adapters.adapter_state_dict(m, "z"),
        lambda m: adapters.save_adapters(m, "never-written", ["a", "z"]),
        lambda m: inject_lora(m, config(), "b"),
    ],
)
def test_errors_on_a_merged_model_change_nothing(action: Callable, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = net()
    adapters.merge_adapter(model)
    before = snapshot(model)
    with pytest.raises(ValueError):
        action(model)
    assert snapshot(model) == before and list(tmp_path.iterdir()) == []


# Merging.


@pytest.mark.parametrize("names", [None, "b", ["a", "c"], ["c", "b", "a"]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merging_changes_the_weights_and_unmerging_restores_every_bit(
    names, dtype: torch.dtype, same_bits
):
    model = net().to(dtype)
    before = weights(model)
    wanted = ["a"] if names is None else [names] if isinstance(names, str) else names
    adapters.merge_adapter(model, names)
    for path, layer in lora_layers(model):
        chosen = [name for name in wanted if name in layer.lora_A]
        assert layer.merged_adapters == chosen
        assert torch.equal(layer.weight, before[f"{path}.weight"]) == (chosen == [])
    adapters.unmerge_adapter(model)
    assert_same_weights(model, before)
    name = "weights that differ after merge and unmerge"
    same_bits(28, name, weights(model).values(), before.values())


@pytest.mark.parametrize("names", ["b", ["a", "c"], ["c", "b", "a"]])
def test_a_merged_model_computes_what_the_active_adapters_did(names):
    model = net()
    adapters.set_adapter(model, names)
    expected = model(x())
    adapters.merge_adapter(model)
    torch.testing.assert_close(model(x()), expected, rtol=1e-12, atol=1e-12)
    assert trainable(model) == set(names)


def test_merging_by_default_is_what_each_layer_has_active():
    model = net()
    model.head.set_adapter("c")
    model.blocks[0]["q"].set_adapter([])
    expected = model(x())
    adapters.merge_adapter(model)
    assert model.head.merged_adapters == ["c"] and not model.blocks[0]["q"].merged_adapters
    torch.testing.assert_close(model(x()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_layer_leaves_all_unmerged(position: int, value: float):
    model = net()
    path, bad = list(lora_layers(model))[position]
    with torch.no_grad():
        bad.lora_B["a"][1, 1] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{path}: merge: .*NaN or Inf"):
        adapters.merge_adapter(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
    assert all(not layer.merged_adapters for _, layer in lora_layers(model))


def test_a_failure_of_another_kind_also_leaves_all_unmerged(monkeypatch: pytest.MonkeyPatch):
    model = net()
    before = weights(model)
    last = model.blocks[1]["v"]

    def out_of_memory(names):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(last, "merged_tensors", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        adapters.merge_adapter(model)
    assert_same_weights(model, before)
    assert all(not layer.merged_adapters for _, layer in lora_layers(model))


def test_merging_while_disabled_is_an_error_that_changes_nothing():
    model = net()
    before = weights(model)
    with adapters.disable_adapter(model), pytest.raises(ValueError, match="disabled"):
        adapters.merge_adapter(model)
    assert_same_weights(model, before)


def test_merging_into_a_shared_weight_is_refused():
    model = net()
    model.tied = nn.Embedding(5, 8)
    model.tied.weight = model.head.weight
    before = weights(model)
    for names in ("c", ["a", "c"]):
        with pytest.raises(ValueError, match=r"head: its weight is shared by \['head', 'tied'\]"):
            adapters.merge_adapter(model, names)
        assert_same_weights(model, before)
    adapters.merge_adapter(model, "a")
    assert torch.equal(model.head.weight, before["head.weight"])


def test_unloading_gives_back_plain_layers_over_the_same_weights():
    model = net()
    plain_before = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    model.blocks[0].register_module("again", model.blocks[0]["q"])
    model.eval()
    adapters.merge_adapter(model)
    merged = model(x())
    adapters.unload(model)
    assert dict(model.named_parameters()) == plain_before
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert model.blocks[0]["again"] is model.blocks[0]["q"]
    assert type(model.head) is nn.Linear and not model.head.training
    assert torch.equal(model(x()), merged) and adapters.adapter_configs(model) == {}


# Files, with PEFT at the other end.


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        )
    ).to(dtype).eval()  # fmt: skip


IDS = torch.arange(3, 12)[None]


def logits(model: nn.Module) -> Tensor:
    """Computed in float32, so that models over bfloat16 can be compared closely too."""
    with torch.no_grad():
        return copy.deepcopy(model).float()(input_ids=IDS).logits


def assert_equal_logits(got: nn.Module, expected: nn.Module, base: nn.Module) -> None:
    """To float32's accuracy; and the adapter must matter."""
    difference = (logits(got) - logits(expected)).norm() / logits(expected).norm()
    assert difference <= 1e-5
    assert (logits(expected) - logits(base)).norm() / logits(base).norm() > 0.05


EXCHANGED = {
    "no targets named": {"target_modules": None},
    "default": {"target_modules": ["q_proj", "v_proj"]},
    "all seven, rslora": {"target_modules": PROJECTIONS, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\..*(q|down)_proj"},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {"down_proj": 9},
    },
    "layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
}


def exchanged(name: str) -> dict:
    return {"r": 3, "lora_alpha": 12, "init_lora_weights": False, **EXCHANGED[name]}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in EXCHANGED), ("all-linear", torch.bfloat16)],
)
def test_peft_reads_what_we_save(case: str, dtype: torch.dtype, tmp_path: Path):
    base = llama(dtype)
    model = inject_lora(copy.deepcopy(base), LoraConfig(**exchanged(case), task_type="CAUSAL_LM"))
    adapters.save_adapters(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {TENSORS, CONFIG}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_equal_logits(theirs, model, base)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in EXCHANGED), ("all-linear", torch.bfloat16)],
)
def test_we_read_what_peft_saves(case: str, dtype: torch.dtype, tmp_path: Path):
    base = llama(dtype)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**exchanged(case))).eval()
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    adapters.load_adapter_into(model, tmp_path)
    assert_equal_logits(model, theirs, base)
    state = adapters.adapter_state_dict(model, "default")
    saved = load_file(tmp_path / TENSORS)
    assert {PREFIX + key for key in state} == saved.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, saved[PREFIX + key]) and tensor.dtype == torch.float32


def test_adapters_of_16_bits_are_read_as_pefts_default_does(tmp_path: Path):
    base = llama(torch.bfloat16)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**exchanged("default")), autocast_adapter_dtype=False
    )
    theirs.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / TENSORS).values()} == {torch.bfloat16}
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = copy.deepcopy(base)
        adapters.load_adapter_into(model, tmp_path, autocast_adapter_dtype=autocast)
        state = adapters.adapter_state_dict(model, "default")
        assert {tensor.dtype for tensor in state.values()} == {dtype}
        peft_twin = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, autocast_adapter_dtype=autocast
        )
        assert_equal_logits(model, peft_twin, base)


def test_several_adapters_are_exchanged_as_peft_lays_them_out(tmp_path: Path):
    base = llama()
    model = inject_lora(copy.deepcopy(base), LoraConfig(**exchanged("default")))
    inject_lora(model, LoraConfig(**exchanged("patterns")), "second")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    adapters.save_adapters(model, ours)
    assert {path.name for path in ours.iterdir()} == {TENSORS, CONFIG, "second"}

    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), ours)
    wrapped.load_adapter(str(ours / "second"), "second")
    wrapped.save_pretrained(theirs)
    again = copy.deepcopy(base)
    adapters.load_adapter_into(again, theirs)
    adapters.load_adapter_into(again, theirs / "second", "second")
    for name in ("default", "second"):
        for anyone in (model, again):
            adapters.set_adapter(anyone, name)
        wrapped.set_adapter(name)
        assert_equal_logits(wrapped, model, base)
        assert torch.equal(logits(again), logits(model))
    adapters.save_adapters(model, tmp_path / "one", ["second"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["second"]


def test_saving_without_adapters_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one adapter"):
        adapters.save_adapters(llama(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_merged_or_disabled_adapter_is_saved_as_it_is(tmp_path: Path):
    model = inject_lora(llama(), LoraConfig(**exchanged("default")))
    expected = {k: t.clone() for k, t in adapters.adapter_state_dict(model, "default").items()}
    adapters.merge_adapter(model)
    adapters.save_adapters(model, tmp_path)
    saved = load_file(tmp_path / TENSORS)
    assert all(torch.equal(saved[PREFIX + key], tensor) for key, tensor in expected.items())


def saved_by_peft(directory: Path, case: str = "default") -> Path:
    peft.get_peft_model(llama(), peft.LoraConfig(**exchanged(case))).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_adapter_is_active_and_frozen_unless_asked(is_trainable: bool, tmp_path: Path):
    model = llama()
    adapters.load_adapter_into(model, saved_by_peft(tmp_path), is_trainable=is_trainable)
    assert active_adapters(model) == ["default"]
    assert trainable(model) == ({"default"} if is_trainable else set())


def test_a_loaded_adapter_waits_beside_an_active_one(tmp_path: Path):
    model = inject_lora(llama(), LoraConfig(**exchanged("patterns")), "mine")
    before = logits(model)
    adapters.load_adapter_into(model, saved_by_peft(tmp_path), "theirs", is_trainable=True)
    assert torch.equal(logits(model), before) and active_adapters(model) == ["mine"]
    assert trainable(model) == {"mine"}
    adapters.set_adapter(model, "theirs")
    assert trainable(model) == {"theirs"} and not torch.equal(logits(model), before)


def test_loading_names_every_key_that_does_not_fit(tmp_path: Path):
    saved_by_peft(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    layer = f"{PREFIX}model.layers.{{}}.self_attn.{{}}_proj"
    for half in "AB":
        del tensors[layer.format(1, "v") + f".lora_{half}.weight"]
        stray = layer.format(0, "k") + f".lora_{half}.weight"
        tensors[stray] = tensors[layer.format(0, "v") + f".lora_{half}.weight"].clone()
    tensors[layer.format(0, "q") + ".lora_B.weight"] = torch.ones(31, 3)
    save_file(tensors, tmp_path / TENSORS)
    model = inject_lora(llama(), LoraConfig(**exchanged("patterns")), "mine")
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        adapters.load_adapter_into(model, tmp_path)
    message = str(caught.value)
    path = "model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    assert str(tmp_path) in message and message.count("lora_") == 5
    for half in "AB":
        assert f"missing {path.format(1, 'v', half)}" in message
        assert f"unexpected {path.format(0, 'k', half)}" in message
    assert f"{path.format(0, 'q', 'B')}: expected shape (32, 3), got (31, 3)" in message
    assert snapshot(model) == before


def change_json(**changes) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**content, **changes}))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def poison(directory: Path) -> None:
    tensors = load_file(directory / TENSORS)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, directory / TENSORS)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove(CONFIG), FileNotFoundError, CONFIG),
        (remove(TENSORS), FileNotFoundError, TENSORS),
        (poison, ValueError, "NaN"),
        (change_json(r=4), ValueError, "expected rank 4, got 3"),
        (change_json(use_dora=True), ValueError, "expected .*lora_magnitude_vector beside it"),
        (change_json(lora_bias=True), ValueError, "expected .*lora_B.bias beside it"),
        (change_json(modules_to_save=["norm"]), ValueError, "missing model.norm.weight"),
        (change_json(use_qalora=True), ValueError, "use_qalora"),
        (
            change_json(target_modules=["q_proj", "v_proj", "k_proj"]),
            ValueError,
            "missing .*k_proj",
        ),
        (change_json(target_modules=["q_proj"]), ValueError, "unexpected .*v_proj"),
        (change_json(target_modules=["quary"]), ValueError, "quary"),
        (change_json(target_modules=["q_proj", "v_proj", "norm"]), TypeError, "norm"),
    ],
)
def test_a_failed_load_changes_nothing(damage, error, message: str, tmp_path: Path):
    damage(saved_by_peft(tmp_path))
    for model in (llama(), inject_lora(llama(), LoraConfig(**exchanged("patterns")), "mine")):
        before = snapshot(model)
        with pytest.raises(error, match=message):
            adapters.load_adapter_into(model, tmp_path)
        assert snapshot(model) == before


def test_a_name_that_is_taken_or_impossible_fails_before_anything_is_read(tmp_path: Path):
    model = inject_lora(llama(), LoraConfig(**exchanged("default")))
    before = snapshot(model)
    for name in ("default", "a/b", "..", "__base__"):
        with pytest.raises(ValueError, match="adapter_name"):
            adapters.load_adapter_into(model, tmp_path / "missing", name)
        with pytest.raises(ValueError, match="adapter_name"):
            adapters.save_adapters(model, tmp_path, [name + "x"])
    with pytest.raises(FileNotFoundError, match="missing"):
        adapters.load_adapter_into(model, tmp_path / "missing", "other")
    assert snapshot(model) == before and list(tmp_path.iterdir()) == []
