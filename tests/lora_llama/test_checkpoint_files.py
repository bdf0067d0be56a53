"""Base checkpoints that are faulty: found before a weight is read, and named on one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lora_llama import LoraLlama, loading
from lora_llama.checkpoint_files import one_line, read_shapes

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
IDS = torch.arange(3, 14)[None]


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama in one file."""
    return shutil.copytree(tiny_llama, tmp_path / "checkpoint")


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """The same in several files, with an index."""
    directory = tmp_path / "sharded"
    LlamaForCausalLM.from_pretrained(tiny_llama).save_pretrained(directory, max_shard_size="60KB")
    assert len(shards(directory)) > 3 and not (directory / WEIGHTS).exists()
    return directory


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(path: str | Path, **options: Any) -> str:
    """The message of the error that loading raises, which is one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        LoraLlama.from_pretrained(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# Files that cannot be read.


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_weights_that_are_cut_short(keep: int, checkpoint: Path):
    file = checkpoint / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    assert refused(checkpoint).startswith(f"{file}: no safetensors file, or cut short: ")


def test_weights_that_are_something_else(checkpoint: Path):
    (checkpoint / WEIGHTS).write_bytes(b"<!DOCTYPE html><html></html>" * 100)
    assert refused(checkpoint).startswith(f"{checkpoint / WEIGHTS}: no safetensors file")


@pytest.mark.parametrize("which", [0, 2, -1])
def test_a_shard_that_is_cut_short(which: int, sharded: Path):
    file = shards(sharded)[which]
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(sharded).startswith(f"{file}: no safetensors file, or cut short: ")


def test_a_file_that_may_not_be_read_is_not_called_missing(checkpoint: Path, monkeypatch):
    def denied(file: str, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", file)

    file = str(checkpoint / WEIGHTS)
    with monkeypatch.context() as patch, pytest.raises(PermissionError, match=WEIGHTS):
        patch.setattr("builtins.open", denied)
        read_shapes([file])
    assert read_shapes([file])["model.norm.weight"] == [64]


def test_a_directory_without_weights(checkpoint: Path):
    (checkpoint / WEIGHTS).rename(checkpoint / "weights.safetensors")
    expected = f"{checkpoint}: no {WEIGHTS} and no {INDEX} there"
    assert refused(checkpoint) == expected
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even a pickle")
    message = refused(checkpoint)
    assert message.startswith(expected) and "pytorch_model.bin is a pickle" in message
    (checkpoint / WEIGHTS).mkdir()
    assert refused(checkpoint).startswith(expected)


# Weights of another configuration.


def named_shapes(message: str) -> dict[str, tuple[list[int], list[int]]]:
    """The (expected, actual) shapes in a message, by weight."""
    found = re.findall(r"([\w.]+): expected (\[[\d, ]*\]), got (\[[\d, ]*\])", message)
    return {name: (json.loads(expected), json.loads(got)) for name, expected, got in found}


@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 80},
        {"hidden_size": 32},
        {"vocab_size": 100},
        {"num_key_value_heads": 4},
        {"head_dim": 8},
        {"hidden_size": 32, "intermediate_size": 80},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["checkpoint", "sharded"])
def test_every_weight_of_another_shape_is_named(changes, layout, request):
    directory: Path = request.getfixturevalue(layout)
    actual = read_shapes(map(str, [*directory.glob("*.safetensors")]))
    edit(directory / CONFIG, **changes)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(directory))
    differing = {
        name: (list(weight.shape), actual[name])
        for name, weight in model.state_dict().items()
        if name in actual and list(weight.shape) != actual[name]
    }
    message = refused(directory)
    assert message.startswith(f"{directory}: weights do not fit config.json: ")
    assert named_shapes(message) == differing and differing


def test_every_missing_weight_is_named(checkpoint: Path):
    edit(checkpoint / CONFIG, num_hidden_layers=3, attention_bias=True)
    message = refused(checkpoint)
    assert message.startswith(f"{checkpoint}: weights are missing: ")
    names = re.findall(r"'(model\.layers\.\d\.[\w.]+)'", message)
    assert len(names) == len(set(names)) == 3 * 4 + 9
    assert sum(name.startswith("model.layers.2.") for name in names) == 4 + 9


def test_a_tied_head_needs_one_weight_and_an_untied_one_two(checkpoint: Path):
    tensors = load_file(checkpoint / WEIGHTS)
    assert "lm_head.weight" not in tensors
    edit(checkpoint / CONFIG, tie_word_embeddings=False)
    assert refused(checkpoint) == f"{checkpoint}: weights are missing: ['lm_head.weight']"
    edit(checkpoint / CONFIG, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    LoraLlama.from_pretrained(checkpoint)
    del tensors["lm_head.weight"]
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    assert "['lm_head.weight', 'model.embed_tokens.weight']" in refused(checkpoint)


def test_the_weights_of_a_bare_model_lack_a_prefix(checkpoint: Path):
    expected = logits(LlamaForCausalLM.from_pretrained(checkpoint))
    tensors = load_file(checkpoint / WEIGHTS)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, checkpoint / WEIGHTS, metadata={"format": "pt"})
    torch.testing.assert_close(logits(LoraLlama.from_pretrained(checkpoint)), expected)
    edit(checkpoint / CONFIG, vocab_size=100)
    assert "model.embed_tokens.weight: expected [100, 64], got [261, 64]" in refused(checkpoint)


def test_options_that_change_the_shapes_are_taken_into_account(checkpoint: Path):
    assert len(LoraLlama.from_pretrained(checkpoint, num_hidden_layers=1).model.layers) == 1
    assert "model.layers.2.mlp" in refused(checkpoint, num_hidden_layers=3)
    config = LlamaConfig.from_pretrained(checkpoint, num_hidden_layers=1)
    assert len(LoraLlama.from_pretrained(checkpoint, config=config).model.layers) == 1
    edit(checkpoint / CONFIG, intermediate_size=80)
    model = LoraLlama.from_pretrained(checkpoint, intermediate_size=96)
    assert model.model.layers[1].mlp.up_proj.weight.shape == (96, 64)
    edit(checkpoint / CONFIG, intermediate_size=96, vocab_size=100)
    model = LoraLlama.from_pretrained(checkpoint, ignore_mismatched_sizes=True)
    assert model.model.embed_tokens.weight.shape == (100, 64)
    assert "model.embed_tokens.weight" in refused(checkpoint)


def test_a_variant_has_files_of_its_own(checkpoint: Path):
    expected = logits(LoraLlama.from_pretrained(checkpoint))
    file = checkpoint / "model.fp32.safetensors"
    (checkpoint / WEIGHTS).rename(file)
    assert torch.equal(logits(LoraLlama.from_pretrained(checkpoint, variant="fp32")), expected)
    assert f"no {WEIGHTS} and" in refused(checkpoint)
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(checkpoint, variant="fp32").startswith(f"{file}: ")


# config.json.

FAULTY_FIELDS: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, rf"{name}: expected a positive integer, got {re.escape(repr(value))}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for value in (0, -64, "64", 64.0, None, True, [64])
    ),
    ({"intermediate_size": -96}, "intermediate_size: expected a positive integer, got -96"),
    ({"num_key_value_heads": 0}, "num_key_value_heads: expected a positive integer, got 0"),
    ({"head_dim": "16"}, "head_dim: expected a positive integer, got '16'"),
    ({"max_position_embeddings": -1}, "max_position_embeddings: expected a positive integer"),
    ({"hidden_size": 63}, "num_attention_heads: expected a divisor of hidden_size 63, got 4"),
    (
        {"num_key_value_heads": 3},
        "num_key_value_heads: expected a divisor of num_attention_heads 4, got 3",
    ),
    ({"head_dim": 15}, "head_dim: expected an even number, got 15"),
    ({"head_dim": None, "hidden_size": 60}, "head_dim: expected an even number, got 15"),
    ({"pad_token_id": 261}, "pad_token_id: expected a token of vocab_size 261, or null, got 261"),
    ({"pad_token_id": "x"}, "pad_token_id: expected .*, got 'x'"),
    ({"eos_token_id": "x"}, "eos_token_id"),
    ({"hidden_act": "swiglue"}, "hidden_act: expected an activation's name.* got 'swiglue'"),
    ({"hidden_act": 3}, "hidden_act: expected an activation's name.* got 3"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps: expected a finite number of at least 0, got 'small"),
    ({"rms_norm_eps": -1.0}, r"rms_norm_eps: expected a finite number of at least 0, got -1\.0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a finite number.* got nan"),
    ({"attention_dropout": 2.0}, "attention_dropout: expected .*at least 0 and below 1, got 2"),
    ({"attention_bias": "yes"}, "attention_bias"),
    ({"mlp_bias": 1}, "mlp_bias"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"rope_theta": 0}, "rope_theta: expected a finite number above 0, got 0"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}},
        "rope_parameters.rope_theta: expected a finite number above 0, got 'big'",
    ),
    ({"rope_parameters": [1]}, r"rope_parameters: expected an object, got \[1\]"),
    (
        {"rope_parameters": {"rope_type": "yarnn", "rope_theta": 1e4}},
        "rope_parameters.rope_type: expected one of .*'yarn'.*, got 'yarnn'",
    ),
    (
        {"rope_parameters": None, "rope_scaling": {"type": "dynamo", "factor": 2}},
        "rope_parameters.rope_type: expected one of .*, got 'dynamo'",
    ),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ({"dtype": "float17"}, "dtype: expected a floating dtype, as 'bfloat16', got 'float17'"),
    ({"dtype": "int8"}, "dtype: expected a floating dtype, as 'bfloat16', got 'int8'"),
    ({"quantization_config": "int4"}, "quantization_config: expected an object, got 'int4'"),
    ({"hidden_size": "64", "vocab_size": -1, "hidden_act": ""}, "vocab_size.*hidden_size.*_act"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), FAULTY_FIELDS, ids=lambda value: str(value)[:60])
def test_a_faulty_field_is_named_with_its_file(changes, message, checkpoint: Path):
    edit(checkpoint / CONFIG, **changes)
    (checkpoint / WEIGHTS).write_bytes(b"not read")
    found = refused(checkpoint)
    assert found.startswith(f"{checkpoint / CONFIG}: ")
    assert re.search(message, found), found


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": None, "num_attention_heads": 4},
        {"head_dim": None},
        {"pad_token_id": None},
        {"pad_token_id": -1},
        {"rope_theta": None},
        {"dtype": None, "torch_dtype": "float16"},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0},
        {"something_of_another_tool": {"a": [1]}},
        {"attn_implementation": "flash_attention_2"},
    ],
    ids=str,
)
def test_fields_that_are_allowed(changes, checkpoint: Path):
    edit(checkpoint / CONFIG, **changes)
    assert loading.read_llama_config(str(checkpoint), None, check_weights=False)


@pytest.mark.parametrize("name", [CONFIG, INDEX, "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "llama",', "not JSON, or cut short: "),
        (b"", "not JSON, or cut short: "),
        (b"[]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'"llama"', "expected a JSON object, got str"),
        (b"\xff\xfe\x00", "not UTF-8 text: "),
        (b"[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_is_no_json_object(name, content, message, sharded: Path):
    (sharded / name).write_bytes(content)
    assert refused(sharded).startswith(f"{sharded / name}: {message}")


def test_a_faulty_generation_config(checkpoint: Path):
    (checkpoint / "generation_config.json").write_text('{"max_new_tokens": -3}')
    assert refused(checkpoint).startswith(f"{checkpoint / 'generation_config.json'}: ")
    (checkpoint / "generation_config.json").unlink()
    LoraLlama.from_pretrained(checkpoint)


# The index.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_map": None}, "weight_map: expected .*, got None"),
        ({"weight_map": {}}, "weight_map: expected .*, got {}"),
        ({"weight_map": ["a"]}, r"weight_map: expected .*, got \['a'\]"),
        ({"weight_map": {"a": 3}}, "weight_map: expected the plain name .* got 3"),
        ({"weight_map": {"a": ""}}, "weight_map: expected the plain name .* got ''"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "weight_map: expected the plain name"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"files that are missing: \['gone\.safetens"),
        ({"metadata": None}, "metadata: expected an object, got None"),
    ],
    ids=str,
)
def test_a_faulty_index(changes, message, sharded: Path):
    edit(sharded / INDEX, **changes)
    found = refused(sharded)
    assert found.startswith(f"{sharded / INDEX}: ") and re.search(message, found), found


def test_every_missing_shard_is_named(sharded: Path):
    gone = [shards(sharded)[0], shards(sharded)[2]]
    for file in gone:
        file.unlink()
    expected = f"{sharded / INDEX}: names files that are missing: {[file.name for file in gone]}"
    assert refused(sharded) == expected


OUTSIDE: dict[str, Callable[[Path], str]] = {
    "above": lambda file: f"../{file.name}",
    "above, windows": lambda file: f"..\\{file.name}",
    "absolute": str,
    "through the directory": lambda file: f"./../{file.name}",
    "below": lambda file: f"sub/{file.name}",
    "drive": lambda file: f"C:{file.name}",
}


@pytest.mark.parametrize("way", OUTSIDE)
def test_no_index_leads_out_of_its_directory(way: str, sharded: Path):
    """The file is a good one and the index complete: it is refused for where it is."""
    outside = sharded.parent / shards(sharded)[1].name
    (sharded / "sub").mkdir()
    shutil.copy(shards(sharded)[1], sharded / "sub")
    shards(sharded)[1].rename(outside)
    content = json.loads((sharded / INDEX).read_text())
    name = OUTSIDE[way](outside)
    moved = {
        weight: name if file == outside.name else file
        for weight, file in content["weight_map"].items()
    }
    assert moved != content["weight_map"]
    edit(sharded / INDEX, weight_map=moved)
    assert refused(sharded) == (
        f"{sharded / INDEX}: weight_map: expected the plain name of a safetensors file, in the "
        f"same directory, got {name!r}"
    )


def test_a_file_named_by_config_json_is_a_plain_name_too(checkpoint: Path):
    expected = logits(LoraLlama.from_pretrained(checkpoint))
    (checkpoint / WEIGHTS).rename(checkpoint / "other.safetensors")
    edit(checkpoint / CONFIG, transformers_weights="other.safetensors")
    assert torch.equal(logits(LoraLlama.from_pretrained(checkpoint)), expected)
    edit(checkpoint / CONFIG, transformers_weights="gone.safetensors")
    assert refused(checkpoint) == f"{checkpoint}: no gone.safetensors there"
    (checkpoint / "other.safetensors").rename(checkpoint.parent / "other.safetensors")
    edit(checkpoint / CONFIG, transformers_weights="../other.safetensors")
    assert "transformers_weights: expected the plain name" in refused(checkpoint)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_link_inside_the_directory_or_of_a_hubs_cache_is_followed(name, checkpoint: Path):
    expected = logits(LoraLlama.from_pretrained(checkpoint))
    (checkpoint / name).rename(checkpoint / "blob")
    (checkpoint / name).symlink_to("blob")
    assert torch.equal(logits(LoraLlama.from_pretrained(checkpoint)), expected)

    repository = checkpoint.parent / "models--somebody--tiny"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    (checkpoint / "blob").rename(repository / "blobs" / "abcd")
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to("../../blobs/abcd")
    snapshot.parent.mkdir()
    checkpoint.rename(snapshot)
    assert torch.equal(logits(LoraLlama.from_pretrained(snapshot)), expected)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "generation_config.json"])
def test_a_link_to_another_place_is_refused(name, checkpoint: Path):
    (checkpoint / name).rename(checkpoint.parent / "elsewhere")
    (checkpoint / name).symlink_to("../elsewhere")
    assert refused(checkpoint).startswith(f"{checkpoint / name}: is a link to ")


# A hub's models, in its cache.


@pytest.fixture
def cached(sharded: Path, tmp_path: Path) -> Path:
    """The files of "somebody/tiny", as the hub's client keeps them."""
    repository = tmp_path / "cache" / "models--somebody--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return shutil.copytree(sharded, repository / "snapshots" / commit)


def test_a_hubs_model_is_checked_in_the_cache(cached: Path, tmp_path: Path):
    options = {"cache_dir": str(tmp_path / "cache")}
    model = LoraLlama.from_pretrained("somebody/tiny", **options)
    assert model.config.num_hidden_layers == 2
    edit(cached / CONFIG, intermediate_size=80)
    message = refused("somebody/tiny", **options)
    assert message.startswith("somebody/tiny: weights do not fit config.json: ")
    assert len(named_shapes(message)) == 6
    edit(cached / CONFIG, intermediate_size="96")
    assert refused("somebody/tiny", **options).startswith(f"{cached / CONFIG}: intermediate_size: ")
    edit(cached / CONFIG, intermediate_size=96)
    file = shards(cached)[1]
    file.write_bytes(file.read_bytes()[:-1])
    assert refused("somebody/tiny", **options).startswith(f"{file}: no safetensors file")


def test_a_hubs_index_leads_nowhere_else_either(cached: Path, tmp_path: Path):
    edit(cached / INDEX, weight_map={"model.norm.weight": "../../../other.safetensors"})
    message = refused("somebody/tiny", cache_dir=str(tmp_path / "cache"))
    assert message.startswith(f"{cached / INDEX}: weight_map: expected the plain name")


# Messages.


def test_one_line():
    assert one_line(ValueError("a\n  b\tc\n")) == "a b c"
    assert one_line(EOFError()) == "EOFError"
    assert one_line(KeyError("name")) == "KeyError 'name'"
