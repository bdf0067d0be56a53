"""`adapter_names`: rows of a batch under different adapters, against PEFT and each alone."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lora_kernels as lk
from lora_kernels import LoraConfig, LoraLinear, inject_lora, mixed_adapters
from lora_kernels.layers import lora_layers
from lora_kernels.mixed_batch import mixed_batch
from lora_llama import LoraLlama

NAMES = ["b", "__base__", "a", "b", "c"]
ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"},
    "b": {"r": 7, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
    "c": {"r": 2, "target_modules": ["k_proj", "down_proj", "up_proj"], "lora_bias": True},
}
LENGTH = 6


class Float64RMSNorm(LlamaRMSNorm):
    """transformers' own rounds float64 to float32 within."""

    def forward(self, hidden_states):
        mean = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * (mean + self.variance_epsilon).rsqrt())


def base_model(dtype=torch.float64) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = Float64RMSNorm
    return model


def lora_llama(adapters=ADAPTERS, dropout=0.0, dtype=torch.float64) -> LoraLlama:
    """Every adapter with values of its own, large enough to be seen in the logits."""
    base = base_model(dtype)
    model = LoraLlama(copy.deepcopy(base.config)).to(dtype)
    model.load_state_dict(base.state_dict())
    for name, settings in adapters.items():
        model.add_adapter(name, LoraConfig(**settings, lora_dropout=dropout))
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        for name in layer.lora_A:
            for parameter in layer.adapter_parameters(name).values():
                parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture
def model() -> LoraLlama:
    return lora_llama()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Five rows, two of them padded on the left, with labels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 61, (len(NAMES), LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[4, :1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def row_of(batch, row):
    return {name: tensor[row : row + 1] for name, tensor in batch.items()}


def logits_alone(model, batch, name, row):
    """One row's logits with its adapter active, or the base's."""
    model.set_adapter([] if name == "__base__" else name)
    return model(**row_of(batch, row)).logits


def adapter_gradients(model):
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if ".lora_" in name and parameter.grad is not None
    }


@torch.no_grad()
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_every_row_as_its_adapter_alone(impl, model, batch):
    expected = [logits_alone(model, batch, name, row) for row, name in enumerate(NAMES)]
    model.set_adapter("a")
    with lk.implementation(impl):
        logits = model(**batch, adapter_names=NAMES).logits
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-10, atol=1e-10)
    spread = (logits - model(**batch).logits).abs().amax((1, 2))
    assert (spread > 0.01).tolist() == [name != "a" for name in NAMES]


@torch.no_grad()
def test_as_peft(model, batch):
    """PEFT's own mixed batch over the same weights: logits."""
    theirs = base_model().eval()
    for index, (name, settings) in enumerate(ADAPTERS.items()):
        config = peft.LoraConfig(**settings)
        if index == 0:
            theirs = peft.get_peft_model(theirs, config, name)
        else:
            theirs.add_adapter(name, config)
    layers = dict(lora_layers(model))
    for path, module in theirs.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            for name in module.lora_A:
                for key, parameter in layers[path].adapter_parameters(name).items():
                    kind, attribute = key.split(".")
                    getattr(getattr(module, kind)[name], attribute).copy_(parameter)
    theirs = theirs.double().eval()
    expected = theirs(**batch, adapter_names=NAMES).logits
    assert not torch.allclose(expected, theirs(**batch).logits, atol=1e-3)
    ours = model(**batch, adapter_names=NAMES).logits
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not"])
def test_training_as_each_adapter_alone(checkpointing, batch):
    """In training mode: the same gradients as separate passes over each adapter's rows.

    Under activation checkpointing the blocks run again after the forward pass has ended.
    """
    model = lora_llama().train()
    items = (batch["labels"][:, 1:] != -100).sum()
    model.set_adapter(["a", "b", "c"])
    alone: dict[str, torch.Tensor] = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        rows = [row for row, used in enumerate(NAMES) if used == name]
        part = {key: tensor[rows] for key, tensor in batch.items()}
        model(**part, num_items_in_batch=items).loss.backward()
        alone |= {key: g for key, g in adapter_gradients(model).items() if f".{name}" in key}
        model.zero_grad()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.set_adapter(["a", "b", "c"])
    model(**batch, adapter_names=NAMES, num_items_in_batch=items).loss.backward()
    together = adapter_gradients(model)
    assert together.keys() == alone.keys()
    for key, gradient in together.items():
        assert gradient.any(), key
        torch.testing.assert_close(gradient, alone[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_under_checkpointing(use_reentrant, batch):
    """The replay draws the same masks: the gradients are those without checkpointing."""
    results = []
    for checkpointing in (False, True):
        model = lora_llama(dropout=0.3).train()
        model.set_adapter(["a", "b", "c"])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        torch.manual_seed(7)
        model(**batch, adapter_names=NAMES).loss.backward()
        results.append(adapter_gradients(model))
    assert results[0].keys() == results[1].keys()
    for key, gradient in results[0].items():
        assert torch.equal(gradient, results[1][key]), key
    plain = lora_llama().train()
    plain.set_adapter(["a", "b", "c"])
    plain(**batch, adapter_names=NAMES).loss.backward()
    key = "model.layers.0.self_attn.q_proj.lora_A.a"
    assert not torch.allclose(adapter_gradients(plain)[key], results[0][key])


def test_two_forward_passes_before_one_backward(batch):
    """Checkpointed blocks remember the rows of their own pass."""
    model = lora_llama().train()
    model.set_adapter(["a", "b", "c"])
    other = ["a", "a", "c", "__base__", "b"]
    expected: dict[str, torch.Tensor] = {}
    for names in (NAMES, other):
        model(**batch, adapter_names=names).loss.backward()
    expected = adapter_gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [model(**batch, adapter_names=names).loss for names in (NAMES, other)]
    sum(losses).backward()
    for key, gradient in adapter_gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-12, msg=key)


def test_an_adapter_without_rows_and_one_that_does_not_train(batch):
    model = lora_llama().train()
    model.set_adapter(["a", "b"])
    model(**batch, adapter_names=["b", "b", "c", "__base__", "b"]).loss.backward()
    gradients = adapter_gradients(model)
    assert gradients and all(".b" in key for key in gradients)
    model.zero_grad()
    model(**batch, adapter_names=["a", "b", "c", "__base__", "b"]).loss.backward()
    assert {key.split(".")[-1] for key in adapter_gradients(model)} == {"a", "b"}


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}],
    ids=str,
)
def test_generate(options, model, batch):
    """Greedy and beam search: each row as with its adapter alone."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, **options}
    together = model.generate(**inputs, adapter_names=NAMES, **settings)
    copies = options.get("num_return_sequences", 1)
    unlike = 0
    for row, name in enumerate(NAMES):
        model.set_adapter([] if name == "__base__" else name)
        alone = model.generate(**row_of(inputs, row), **settings)
        ours = together[row * copies : (row + 1) * copies, : alone.shape[1]]
        assert torch.equal(ours, alone), name
        model.set_adapter("a")
        unlike += not torch.equal(alone, model.generate(**row_of(inputs, row), **settings))
    assert unlike


def state_of(model):
    return {
        path: (layer.active_adapters, layer.merged_adapters, layer.disabled, layer.mixed)
        for path, layer in lora_layers(model)
    }


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "b"], ValueError, "adapter_names: expected 5, one for each row.*got 2"),
        (["a", "x", "b", "y", "x"], ValueError, r"adapter_names: \['x', 'y'\] not found.*'a', 'b'"),
        ("aabbc", TypeError, "adapter_names: expected a list of strings, got 'aabbc'"),
        ([1, 2, 3, 4, 5], TypeError, "adapter_names: expected a list of strings"),
    ],
)
def test_bad_names_change_nothing(names, error, message, model, batch):
    before, expected = state_of(model), model(**batch).logits
    with pytest.raises(error, match=message):
        model(**batch, adapter_names=names)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(error, match=message):
        model.generate(**inputs, adapter_names=names, max_new_tokens=2)
    assert state_of(model) == before
    assert torch.equal(model(**batch).logits, expected)


def test_an_error_within_a_layer_leaves_no_batch_behind(model, batch):
    """A layer that raises: afterwards every layer is as it was."""
    before = state_of(model)
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch, adapter_names=NAMES)
    handle.remove()
    assert state_of(model) == before and not any(row[-1] for row in before.values())


def test_merged_adapters_are_refused(model, batch):
    model.merge_adapter("a")
    with pytest.raises(ValueError, match=r"adapter_names: \['a'\] are merged into .*unmerge"):
        model(**batch, adapter_names=NAMES)
    model.unmerge_adapter()
    model(**batch, adapter_names=NAMES)


def test_dora_and_saved_modules_are_refused(batch):
    model = lora_llama({"a": ADAPTERS["a"], "d": {**ADAPTERS["a"], "use_dora": True}})
    with pytest.raises(ValueError, match="adapter_names: 'd' is a DoRA adapter"):
        model(**batch, adapter_names=["a", "d", "a", "a", "a"])
    model(**batch, adapter_names=["a", "__base__", "a", "a", "a"])
    model = lora_llama({"a": ADAPTERS["a"], "s": {**ADAPTERS["b"], "modules_to_save": ["lm_head"]}})
    with pytest.raises(ValueError, match=r"adapter_names: lm_head is a copy of \['s'\]"):
        model(**batch, adapter_names=["a", "s", "a", "a", "a"])
    model(**batch, adapter_names=["a", "__base__", "a", "a", "a"])
    model.set_adapter("s")
    with pytest.raises(ValueError, match=r"adapter_names: lm_head is a copy of \['s'\]"):
        model(**batch, adapter_names=["a", "__base__", "a", "a", "a"])


@torch.no_grad()
def test_disabled_adapters_are_the_base(model, batch):
    with model.disable_adapter():
        expected = model(**batch).logits
        assert torch.equal(model(**batch, adapter_names=NAMES).logits, expected)


class Net(nn.Module):
    """Any torch model: rows of any shape, one layer without an adapter of every name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 10)
        self.second = nn.Linear(10, 4, bias=False)

    def forward(self, x):
        return self.second(self.first(x).sin())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    net = Net().double()
    for name, targets in (("a", ["first", "second"]), ("b", ["second"])):
        inject_lora(net, LoraConfig(r=3, target_modules=targets, init_lora_weights=False), name)
    return net


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_any_model_in_a_context(shape, net):
    x = torch.randn(4, *shape, 8, dtype=torch.float64)
    names = ["b", "a", "__base__", "b"]
    with mixed_adapters(net, names):
        y = net(x)
    for row, name in enumerate(names):
        for layer in (net.first, net.second):
            layer.set_adapter([name] if name in layer.lora_A else [])
        torch.testing.assert_close(y[row], net(x[row]), rtol=1e-12, atol=1e-12)
    assert all(layer.mixed is None for layer in (net.first, net.second))


def test_a_layer_names_a_wrong_number_of_rows(net):
    with (
        mixed_adapters(net, ["a", "b"]),
        pytest.raises(ValueError, match=r"adapter_names: .* the batch \(3,\), got 2"),
    ):
        net(torch.randn(3, 8, dtype=torch.float64))
    assert net.first.mixed is None


def test_the_rows_are_sorted_once_for_the_layers_that_have_the_same_adapters(model, monkeypatch):
    sorts = []
    original = lk.MixedRows.of.__func__
    monkeypatch.setattr(
        lk.MixedRows, "of", classmethod(lambda *given: sorts.append(1) or original(*given))
    )
    rows = mixed_batch(model, ["a", "b"])
    with rows.applied(model):
        for _ in range(3):
            model(input_ids=torch.ones(2, 4, dtype=torch.long))
    # Layers with a alone, and with a and b.
    assert len(sorts) == 2


def test_torch_compile_of_a_layer(net):
    """A layer of a mixed batch has no graph break."""
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    layer: LoraLinear = net.first
    with mixed_adapters(net, ["a", "__base__", "a", "b"]):
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
