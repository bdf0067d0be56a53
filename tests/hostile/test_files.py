"""A corpus of bad files: each is refused with an error that names it, nothing else is opened."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kernels.adapter_files import load_adapter, read_adapter_outline
from lora_kernels.adapters import load_adapter_into
from lora_llama import LoraLlama

# The fixtures' module is no package: its names come with the fixtures.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def copy(good, tmp_path) -> Callable[[str], Path]:
    """A copy of the good directory of a kind."""

    def copied(kind: str) -> Path:
        return shutil.copytree(good[kind], tmp_path / f"{kind}-{len(os.listdir(tmp_path))}")

    return copied


def all_refused(watch, kind, directory: Path, name: str, faults: Iterable[Any]) -> None:
    """Every fault of one file; the ones that fail the test are named together."""
    file = directory / name
    content = file.read_bytes()
    failures = []
    for fault in faults:
        bad = fault.content(content)
        assert bad != content, fault.name
        file.write_bytes(bad)
        try:
            watch.refused(kind.read, directory, file, fault.match)
        except (AssertionError, pytest.fail.Exception) as error:
            failures.append(f"{fault.name}: {str(error)[:300]}")
    file.write_bytes(content)
    kind.read(directory)
    assert not failures, "\n".join(failures)


def test_good_directories_are_read_within_the_bounds(kinds, watch, good):
    for kind in kinds.values():
        watch.measured(lambda kind=kind: kind.read(good[kind.name]))


TENSOR_FILES = [
    ("adapter", "adapter_model.safetensors"), ("llama", "model.safetensors"),
    ("sharded", "shard.safetensors"), ("training", "adapter_model.safetensors"),
    ("training", "optimizer.safetensors"), ("training", "rng_state_0.safetensors"),
]  # fmt: skip
JSON_FILES = [
    ("adapter", "adapter_config.json"), ("llama", "config.json"),
    ("llama", "generation_config.json"), ("sharded", "model.safetensors.index.json"),
    ("training", "adapter_config.json"), ("training", "trainer_state.json"),
    ("training", "optimizer.json"), ("training", "scheduler.json"),
    ("training", "rng_state_0.json"), ("training", "training.json"),
]  # fmt: skip


@pytest.mark.parametrize("where", TENSOR_FILES, ids="/".join)
def test_files_of_tensors(where, kinds, tensor_faults, watch, copy):
    kind, name = where
    all_refused(watch, kinds[kind], copy(kind), name, tensor_faults)


@pytest.mark.parametrize(
    "where",
    [TENSOR_FILES[0], *(pytest.param(w, marks=pytest.mark.long) for w in TENSOR_FILES[1:])],
    ids="/".join,
)
def test_files_of_tensors_with_megabytes_of_header(where, kinds, long_headers, watch, copy):
    kind, name = where
    all_refused(watch, kinds[kind], copy(kind), name, long_headers)


@pytest.mark.parametrize("where", JSON_FILES, ids="/".join)
def test_files_of_json(where, kinds, json_faults, watch, copy):
    kind, name = where
    all_refused(watch, kinds[kind], copy(kind), name, json_faults)


def test_every_file_is_in_the_corpus(kinds, good):
    listed = {*TENSOR_FILES, *JSON_FILES}
    assert listed == {
        (kind.name, name) for kind in kinds.values() for name in (*kind.tensors, *kind.objects)
    }
    # The other shards are of the first one's kind.
    present = {
        (kind, path.name)
        for kind, directory in good.items()
        for path in directory.iterdir()
        if not path.name.startswith("model-")
    }
    assert present - listed == {("sharded", "config.json"), ("sharded", "generation_config.json")}


# What is no regular file of the directory.


def outside(file: Path) -> Path:
    """Moves a file out of its directory."""
    target = file.parent.parent / f"outside-{file.parent.name}-{file.name}"
    file.rename(target)
    return target


def relative_link(file: Path) -> None:
    file.symlink_to(Path("..") / outside(file).name)


def absolute_link(file: Path) -> None:
    file.symlink_to(outside(file).absolute())


def link_through_a_link(file: Path) -> None:
    (file.parent / "up").symlink_to("..")
    file.symlink_to(Path("up") / outside(file).name)


def link_to(target: str) -> Callable[[Path], None]:
    def make(file: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return make


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def pickle(file: Path) -> None:
    file.rename(file.with_suffix(".bin"))


PLACES = {
    "relative link": relative_link,
    "absolute link": absolute_link,
    "link through a link": link_through_a_link,
    "link to a device": link_to("/dev/zero"),
    "link to the terminal": link_to("/dev/tty"),
    "link to a file of the system": link_to("/etc/passwd"),
    "link to the process": link_to("/proc/self/mem"),
    "link to itself": link_to("adapter_config.json"),
    "dangling link": link_to("nowhere"),
    "pipe": pipe,
    "directory": folder,
    "missing": lambda file: file.unlink(),
    "renamed to .bin": pickle,
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_of_the_directory(place, kinds, watch, copy):
    for kind in kinds.values():
        for name in (*kind.tensors, *kind.objects):
            # A model may do without it.
            if name == "generation_config.json" and "link" not in place:
                continue
            directory = copy(kind.name)
            PLACES[place](directory / name)
            if name == "generation_config.json" and not (directory / name).exists():
                continue
            # What is missing is looked for under several names.
            watch.refused(kind.read, directory, directory, "")


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="needs the superuser")
def test_devices(kinds, watch, copy):
    import stat

    for kind in kinds.values():
        for name in (*kind.tensors, *kind.objects):
            directory = copy(kind.name)
            (directory / name).unlink()
            try:
                os.mknod(directory / name, stat.S_IFCHR | 0o600, os.makedev(1, 5))
            except PermissionError:
                pytest.skip("no devices can be made here")
            if name != "generation_config.json":
                watch.refused(kind.read, directory, directory, "")


# An index that leads elsewhere.


@pytest.mark.parametrize("name", [
    "../outside.safetensors", "/etc/passwd", "/tmp/outside.safetensors", "sub/shard.safetensors",
    "..\\outside.safetensors", "C:outside.safetensors", "./shard.safetensors", "", ".", "..",
    "shard.bin", "shard.safetensors\0", "~/shard.safetensors", "file:///etc/passwd", None, 3, [],
    ["shard.safetensors"], {"a": 1}, "x" * 100_000, "shard.safetensors/../../outside.safetensors",
], ids=lambda name: repr(name)[:40])  # fmt: skip
def test_an_index_leads_nowhere_else(name, kinds, watch, copy):
    directory = copy("sharded")
    file = directory / "model.safetensors.index.json"
    shutil.copy(directory / "shard.safetensors", directory.parent / "outside.safetensors")
    content = json.loads(file.read_text())
    where = content["weight_map"]
    where[next(iter(where))] = name
    file.write_text(json.dumps(content))
    watch.refused(kinds["sharded"].read, directory, file, "weight_map: expected the plain name")


@pytest.mark.parametrize("value", [None, [], 3, "x", {}, True], ids=repr)
def test_an_index_without_a_map(value, kinds, watch, copy):
    directory = copy("sharded")
    file = directory / "model.safetensors.index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "weight_map": value}))
    watch.refused(kinds["sharded"].read, directory, file, "weight_map: expected")


# Contents of a config or of tensors.

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r: expected an int >= 1"),
    ({"r": -4}, "r: expected an int >= 1"),
    ({"r": 10**9}, "expected rank 1000000000, got 4"),
    ({"r": 10**4000}, "expected rank 1"),
    ({"r": 4.0}, "r: expected an int"),
    ({"r": None}, "r: expected an int"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern.*expected an int >= 1"),
    ({"rank_pattern": {"q": 10**9}}, "expected rank 1000000000"),
    ({"lora_alpha": 10**400}, "lora_alpha: expected a finite number"),
    ({"peft_type": "LOHA"}, "peft_type: expected 'LORA'"),
    ({"peft_type": {"a": 1}}, "peft_type: expected 'LORA'"),
    ({"target_modules": [["q"]]}, "target_modules: expected a list of str"),
    ({"target_modules": {"q": 1}}, "target_modules: expected"),
    ({"target_modules": "("}, "target_modules: expected a regular expression"),
    ({"target_modules": "(" * 50_000 + ")" * 50_000}, "target_modules: expected"),
    ({"target_modules": ["no_such_module"]}, "target_modules: expected names of modules"),
    ({"target_modules": [f"m{i}" for i in range(90_000)]}, "target_modules: expected names"),
    ({"exclude_modules": "*"}, "exclude_modules: expected a regular expression"),
    ({"modules_to_save": [f"m{i}" for i in range(50_000)]}, "modules_to_save: expected at most"),
    ({"modules_to_save": ["no_such_module"]}, "modules_to_save: expected names"),
    ({"layers_to_transform": list(range(90_000))}, "layers_to_transform: expected"),
    ({"layers_to_transform": [10**4000]}, "layers_to_transform: expected"),
    ({"init_lora_weights": "eva"}, "init_lora_weights: expected"),
    ({"use_dora": True}, "lora_magnitude_vector beside it"),
    ({"target_parameters": ["q"]}, "target_parameters: expected None"),
    ({"init_lora_weights": "pissa_niter_9999"}, "init_lora_weights: .* with N at most 64"),
    ({"lora_alpha": 1e300}, "lora_alpha: expected a number from"),
    ({"alpha_pattern": {"q": -1e39}}, "alpha_pattern.*: expected a number from"),
    *(
        ({"init_lora_weights": mode, **scale}, "lora_alpha: .* expects a scaling from")
        for mode in ("pissa", "pissa_niter_4", "olora")
        for scale in (
            {"lora_alpha": 0},
            {"lora_alpha": -8},
            {"lora_alpha": 1e38},
            {"lora_alpha": 1e-300},
            {"alpha_pattern": {"v": 0}},
        )
    ),
    ({"auto_mapping": {"base_model_class": "os"}, "r": 3}, "expected rank 3"),
]


@pytest.mark.parametrize(("changes", "match"), CONFIGS, ids=lambda value: str(value)[:40])
def test_configs_of_adapters(changes, match, kinds, watch, copy):
    directory = copy("adapter")
    file = directory / "adapter_config.json"
    limit = sys_int_digits()
    try:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    finally:
        sys_int_digits(limit)
    watch.refused(kinds["adapter"].read, directory, directory, match)


def sys_int_digits(limit: int = 0) -> int:
    import sys

    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(limit)
    return before


UNSUPPORTED = (r"(a)\1", "(?>a+)b")


@pytest.mark.parametrize(
    "field",
    ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"],
)
@pytest.mark.parametrize("text", [
    "(a+)+$", "(a|aa)+$", "(.*)*b", "(a?){50}a{50}b", ".*" * 30 + "x", "(?=(a+)+$)b", "((a*)*)*b",
    "(a{1000}){1000}", "(?:(?=(?:(?=.*x)?.)*).)*", *UNSUPPORTED,
])  # fmt: skip
def test_expressions_that_take_for_ever_in_re(text, field, watch, tmp_path):
    """Of a file's config, against the names in the file and in the model."""
    names = [f"{'a' * 64}{i}_" for i in range(200)]
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in names})
    config = {"peft_type": "LORA", "r": 1, "target_modules": names}
    config[field] = {text: 2} if field.endswith("k_pattern") or field == "alpha_pattern" else text
    if field == "layers_pattern":
        config["layers_to_transform"] = [0]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{name}.lora_{matrix}.weight": torch.ones(shape)
        for name in names
        for matrix, shape in (("A", (1, 2)), ("B", (2, 1)))
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if field in ("exclude_modules", "alpha_pattern") and text not in UNSUPPORTED:
        # Whatever it matches, or that it takes too many steps, is known soon.
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            watch.measured(lambda: load_adapter_into(model, tmp_path))
        return
    watch.refused(lambda path: load_adapter_into(model, path), tmp_path, tmp_path, "")


LLAMAS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 500"),
    ({"num_hidden_layers": 500}, "weights are missing"),
    ({"vocab_size": 10**12}, "model.embed_tokens.weight: expected|describes no Llama"),
    ({"hidden_size": 2**62, "num_attention_heads": 2}, "config.json"),
    ({"head_dim": 10**15}, "config.json"),
    ({"intermediate_size": 10**30}, "config.json: describes no Llama"),
    ({"max_position_embeddings": -1}, "max_position_embeddings: expected"),
    ({"model_type": "gpt2"}, "model_type 'llama'"),
    ({"model_type": ["llama"]}, "model_type 'llama'"),
    ({"auto_map": {"AutoModelForCausalLM": "evil--evil"}, "vocab_size": 0}, "vocab_size"),
    ({"attn_implementation": "somebody/kernel"}, "attn_implementation: expected a plain name"),
    ({"_attn_implementation": "somebody/kernel"}, "_attn_implementation: expected a plain name"),
    ({"_attn_implementation_internal": "a/b:c"}, "_internal: expected a plain name"),
    ({"experts_implementation": "../x"}, "experts_implementation: expected a plain name"),
    ({"attn_implementation": {"": "a/b"}}, "attn_implementation: expected a plain name"),
    ({"transformers_weights": "../x.safetensors"}, "transformers_weights: expected the plain name"),
    ({"transformers_weights": "/etc/passwd"}, "transformers_weights: expected the plain name"),
    ({"quantization_config": "int4"}, "quantization_config: expected an object"),
    ({"hidden_act": "__import__('os')"}, "hidden_act: expected"),
    ({"dtype": "PICKLE"}, "dtype: expected"),
    ({"dtype": "save"}, "dtype: expected"),
    ({"dtype": "float8_e4m3fn"}, "dtype: expected a floating dtype"),
    ({"torch_dtype": "float8_e5m2", "dtype": None}, "dtype: expected a floating dtype"),
    ({"auto_map": {"AutoConfig": "evil/x--c.C"}}, "auto_map: expected no code"),
    ({"auto_map": []}, "auto_map: expected no code"),
    ({"num_labels": 200_000}, "num_labels: expected at most 10000 labels"),
    ({"num_labels": -1}, "num_labels: expected at most"),
    ({"num_labels": "9"}, "num_labels: expected at most"),
    ({"id2label": {str(i): "x" for i in range(200_000)}}, "id2label: expected at most"),
    ({"label2id": {str(i): i for i in range(200_000)}}, "label2id: expected at most"),
    ({"partial_rotary_factor": 1e7}, "partial_rotary_factor: expected .* at most 1"),
    *(
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, **rope}}, m)
        for rope, m in (
            ({"partial_rotary_factor": 1e7}, "partial_rotary_factor: expected .* at most 1"),
            ({"partial_rotary_factor": -1}, "partial_rotary_factor: expected"),
            ({"partial_rotary_factor": "x"}, "partial_rotary_factor: expected"),
            ({"factor": 0}, "rope_parameters.factor: expected a finite number above 0"),
            ({"factor": "x"}, "rope_parameters.factor: expected a finite number above 0"),
            ({"original_max_position_embeddings": 0}, "original_max_position_embeddings: expected"),
        )
    ),
    *(
        ({"quantization_config": {"quant_method": method}}, "quant_method: expected one of")
        for method in ("nosuch", ["x"], {"x": 1}, None, 3, "gguf")
    ),
    ({"quantization_config": {}}, "quant_method: expected one of"),
    *(
        ({"quantization_config": {"quant_method": method}}, f"quantised by '{method}', got those")
        for method in ("mxfp4", "fp8", "bitsandbytes", "hqq", "torchao")
    ),
]


@pytest.mark.parametrize(("changes", "match"), LLAMAS, ids=lambda value: str(value)[:40])
def test_configs_of_llamas(changes, match, kinds, watch, copy):
    directory = copy("llama")
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    watch.refused(kinds["llama"].read, directory, directory, match)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["adapter", "training"])
def test_weights_that_are_not_finite(kind, value, kinds, watch, copy, save_tensors):
    directory = copy(kind)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        save_tensors({**tensors, key: tensors[key].index_fill(0, torch.tensor(1), value)}, file)
        watch.refused(kinds[kind].read, directory, file, "expected finite values")


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("value", [1e300, -1e39, 1e5])
def test_values_that_are_finite_in_the_file_alone(value, low, kinds, watch, copy, save_tensors):
    """float64 beyond float32, and float32 beyond a float16 base's own adapters."""
    directory = copy("adapter")
    file = directory / "adapter_model.safetensors"
    tensors = {key: tensor.double() for key, tensor in load_file(file).items()}
    key = next(key for key in tensors if "v.lora_B." in key)
    save_tensors({**tensors, key: tensors[key].index_fill(0, torch.tensor(1), value)}, file)
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(96, 96), "v": torch.nn.Linear(96, 96)})
    model.to(torch.float16 if low else torch.float32)

    def load(path: Path) -> None:
        load_adapter_into(model, path, autocast_adapter_dtype=not low)

    if abs(value) < 65504 or (not low and abs(value) < 1e38):
        load(directory)
        return
    watch.refused(load, directory, directory, r"v\.lora_B\.weight: expected values that are finite")
    assert not hasattr(model, "lora_configs")


@pytest.mark.parametrize("shape", [(0, 96), (96, 4), (4,), (4, 96, 1), (5, 96), (4, 95)], ids=str)
def test_adapters_of_other_shapes(shape, kinds, watch, copy, save_tensors):
    directory = copy("adapter")
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if ".lora_A." in key)
    save_tensors({**tensors, key: torch.ones(shape)}, file)
    watch.refused(kinds["adapter"].read, directory, directory, "expected")


def write_base(directory: Path, base: str) -> None:
    """Names a base model in an adapter's config."""
    file = directory / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "base_model_name_or_path": base}))


def test_data_are_not_read_before_the_header_is_checked(kinds, watch, copy, joined, good):
    """A GiB that the header is right about, but that no module of the model has."""
    directory = copy("adapter")
    file = directory / "adapter_model.safetensors"
    columns, header, end = 1 << 25, {}, 0
    for module in "qv":
        for matrix, shape in (("A", [4, columns]), ("B", [96, 4])):
            begin, end = end, end + 4 * shape[0] * shape[1]
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
            header[f"base_model.model.{module}.lora_{matrix}.weight"] = entry
    content = joined(header)
    with open(file, "wb") as opened:
        opened.write(content)
        opened.truncate(len(content) + end)
    watch.refused(kinds["adapter"].read, directory, directory, "expected shape")
    # Where no model is there yet, the header is all that is read.
    config, tensors = watch.measured(lambda: read_adapter_outline(directory))
    assert (config.r, len(tensors)) == (4, 4)
    write_base(directory, str(good["llama"]))
    with pytest.raises(ValueError, match=f"{directory}: target_modules: expected"):
        watch.measured(lambda: LoraLlama.from_pretrained(directory))
    training = copy("training")
    shutil.copy(directory / "adapter_config.json", training)
    file.rename(training / file.name)
    watch.refused(kinds["training"].read, training, training, "expected shape")
    (training / file.name).rename(file)
    # Without a model the same file is a whole adapter, as far as its header goes.
    seen: list[int] = []

    class Stop(Exception):
        pass

    def stop(config, outlines):
        seen.append(len(outlines))
        raise Stop

    with pytest.raises(Stop):
        load_adapter(directory, stop)
    assert seen == [4]


def test_pickles_beside_a_model_are_not_read(kinds, watch, copy):
    directory = copy("llama")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    watch.refused(kinds["llama"].read, directory, directory, "is a pickle.*never loaded")


def test_the_base_model_of_an_adapter_is_not_changed_by_a_bad_one(good, copy):
    """All of a Llama's weights, after an adapter that is not for it."""
    model = LoraLlama.from_pretrained(good["llama"])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="target_modules"):
        model.load_adapter(copy("adapter"), "bad")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not model.lora_configs
