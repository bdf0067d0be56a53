"""Every field of LoraConfig and FinetuneOptions with a value that it cannot have.

The tables are compared with the dataclasses: a field without a case fails.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from lora_kernels.config import LoraConfig
from lora_llama import cli
from lora_llama.options import FinetuneOptions

INFINITE = (math.nan, math.inf, -math.inf)
NO_BOOL: tuple[Any, ...] = (1, 0, None, "yes", "true", [])
NO_TEXT: tuple[Any, ...] = (1, 1.5, True, ["a"], {"a": 1})
NO_INT: tuple[Any, ...] = ("8", 8.0, True, None, [8], {})
NO_NUMBER: tuple[Any, ...] = ("8", True, None, [8.0], {})
NO_NAMES: tuple[Any, ...] = (1, True, {"a": 1}, [1], [None], [["a"]])

# field: (values of a wrong type, values out of range)
LORA: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "r": (NO_INT, (0, -1, -(10**9))),
    "target_modules": (NO_NAMES, ([], "", [""], "(", "*", "a{2,1}", "[")),
    "exclude_modules": (NO_NAMES, ([""], "(", "*")),
    "lora_alpha": (NO_NUMBER, (*INFINITE, 10**400)),
    "lora_dropout": (NO_NUMBER, (*INFINITE, -0.1, 1.0, 2)),
    "fan_in_fan_out": (NO_BOOL, ()),
    "bias": ((1, None, True, ["all"], {}), ("some", "", "ALL")),
    "use_rslora": (NO_BOOL, ()),
    "modules_to_save": ((*NO_NAMES, "lm_head"), ([""],)),
    "init_lora_weights": ((1, None, [True], {}), ("", "eva", "loftq", "pissa_niter_", "PiSSA_")),
    "layers_to_transform": (("1", 1.0, True, {}, ["1"], [True]), (-1, [0, -1])),
    "layers_pattern": ((1, {"a": 1}, [1]), ([""], "h", ["h"])),
    "rank_pattern": ((None, [], "q", {1: 2}, {"q": "2"}, {"q": 2.0}), ({"q": 0}, {"(": 1})),
    "alpha_pattern": ((None, [], "q", {1: 2}, {"q": "2"}), ({"q": math.nan}, {"(": 1})),
    "use_dora": (NO_BOOL, ()),
    "lora_bias": (NO_BOOL, ()),
    "task_type": (NO_TEXT, ("CAUSAL", "", "causal_lm")),
    "base_model_name_or_path": (NO_TEXT, ()),
    "revision": (NO_TEXT, ()),
    "inference_mode": (NO_BOOL, ()),
    "extra": ((None, [], "x", 1), ({"target_parameters": ["w"]}, {"use_qalora": True})),
}  # fmt: skip
LORA_TOGETHER: tuple[tuple[dict[str, Any], str], ...] = (
    ({"lora_bias": True, "use_dora": True}, "lora_bias"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "init_lora_weights"),
    ({"layers_pattern": "h"}, "layers_pattern"),
    ({"target_modules": "q", "layers_to_transform": 1}, "layers_to_transform"),
)

FINETUNE: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "model": ((*NO_TEXT, None), ("",)),
    "data": ((*NO_TEXT, None), ("",)),
    "output_dir": ((*NO_TEXT, None), ("", __file__)),
    "gguf_file": (NO_TEXT, ("",)),
    "dtype": ((1, None, True), ("", "float16", "float8", "int8")),
    "val_set_size": (NO_NUMBER, (*INFINITE, -1, -0.1)),
    "max_length": (NO_INT, (1, 0, -5, 10**25)),
    "packing": (NO_BOOL, ()),
    "train_on_inputs": (NO_BOOL, ()),
    "lora_r": (NO_INT, (0, -1, 2**16 + 1, 10**25)),
    "lora_alpha": (NO_NUMBER, (*INFINITE, 0, -1, 1e300, 1e-300)),
    "lora_dropout": (NO_NUMBER, (*INFINITE, -0.1, 1, 2)),
    "lora_target_modules": ((1, None, {"a": 1}, [1], [None]), (
        [], "", [""], "q_proj,,v_proj", ["q_proj", "q_proj"], "q_proj,v_proj, q_proj",
    )),
    "lora_modules_to_save": (
        (1, True, {"a": 1}, [1], [None]), ([""], "", "lm_head,", ["lm_head"] * 2),
    ),
    "lora_bias": (NO_BOOL, ()),
    "init_lora_weights": ((1, None, [True], {}), ("", "eva", "true", "pissa_niter_", "0")),
    "use_rslora": (NO_BOOL, ()),
    "use_dora": (NO_BOOL, ()),
    "learning_rate": (NO_NUMBER, (*INFINITE, 0, -1e-4, 1e-320)),
    "lr_scheduler_type": ((1, None, True), ("", "cosin", "reduce_lr_on_plateau")),
    # By default it depends on max_steps.
    "warmup_steps": (tuple(value for value in NO_INT if value is not None), (-1, 2**31)),
    "weight_decay": (NO_NUMBER, (*INFINITE, -0.1)),
    "max_grad_norm": (NO_NUMBER, (*INFINITE, 0, -1, 1e-320)),
    "num_train_epochs": (NO_NUMBER, (*INFINITE, 0, -1, 1e300)),
    "max_steps": (NO_INT, (0, -2, 2**31)),
    "per_device_train_batch_size": (NO_INT, (0, -1, 2**31)),
    "per_device_eval_batch_size": (("8", 8.0, True, [8], {}), (0, -1)),
    "gradient_accumulation_steps": (NO_INT, (0, -1)),
    "gradient_checkpointing": (NO_BOOL, ()),
    "logging_steps": (NO_INT, (0, -1)),
    "eval_steps": (NO_INT, (-1,)),
    "eval_samples": (NO_INT, (-1,)),
    "save_steps": (NO_INT, (-1,)),
    "save_total_limit": (("1", 1.0, True, [1]), (0, -1)),
    "resume_from_checkpoint": (NO_TEXT, ("",)),
    "report_to": ((*NO_TEXT, None), ("", "nowhere", "all")),
    "seed": (NO_INT, (-1, 2**32)),
}  # fmt: skip
FINETUNE_TOGETHER: tuple[tuple[dict[str, Any], str], ...] = (
    ({"eval_samples": 3, "val_set_size": 0}, "eval_samples"),
    ({"eval_steps": 1, "val_set_size": 0}, "eval_steps"),
    ({"save_total_limit": 1}, "save_total_limit"),
    ({"save_total_limit": 1, "save_steps": 0}, "save_total_limit"),
    ({"warmup_steps": 100, "max_steps": 2}, "warmup_steps"),
    ({"warmup_steps": 2, "max_steps": 2}, "warmup_steps"),
    ({"warmup_steps": 2, "lr_scheduler_type": "constant"}, "warmup_steps"),
    ({"lora_modules_to_save": "q_proj"}, "lora_modules_to_save"),
    (
        {"lora_modules_to_save": ["lm_head"], "lora_target_modules": "lm_head"},
        "lora_modules_to_save",
    ),
    ({"lora_bias": True, "use_dora": True}, "lora_bias"),
    ({"lora_bias": True, "init_lora_weights": "pissa"}, "init_lora_weights"),
)


def cases(table: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}={str(value)[:30]}")
        for name, (types, ranges) in table.items()
        for value in (*types, *ranges)
    ]


def refused(make: Callable[[], Any], name: str, record_property: Callable[..., None]) -> None:
    """One TypeError or ValueError, which begins with the field's name."""
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    # What a training calls lora_r is r in the adapter's own config.
    names = "|".join({re.escape(name), re.escape(name.removeprefix("lora_"))})
    assert re.match(rf"({names})\b", str(caught.value)), str(caught.value)[:300]
    figure = {"row": 30, "name": "faulty options refused by name", "value": 1.0, "combine": "sum"}
    record_property("figure", figure)


@pytest.mark.parametrize(("kind", "table"), [(LoraConfig, LORA), (FinetuneOptions, FINETUNE)])
def test_every_field_has_its_cases(kind, table):
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields == set(table)
    assert all(types for types, _ in table.values())
    # A number or a name that has no bounds is a mistake.
    unbounded = {name for name, (_, ranges) in table.items() if not ranges}
    assert unbounded == {
        LoraConfig: {
            "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "base_model_name_or_path",
            "revision", "inference_mode",
        },
        FinetuneOptions: {
            "packing", "train_on_inputs", "lora_bias", "use_rslora", "use_dora",
            "gradient_checkpointing",
        },
    }[kind]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), cases(LORA))
def test_fields_of_lora_config(name, value, record_property):
    message_names = {"extra": "extra|target_parameters|use_qalora"}.get(name, name)
    changes = {name: value}
    if name == "layers_pattern" and not (value == "h" or value == ["h"]):
        changes["layers_to_transform"] = 1
    with pytest.raises((TypeError, ValueError)) as caught:
        LoraConfig(**changes)
    assert re.match(rf"({message_names})\b", str(caught.value)), str(caught.value)[:300]
    figure = {"row": 30, "name": "faulty options refused by name", "value": 1.0, "combine": "sum"}
    record_property("figure", figure)


@pytest.mark.parametrize(("changes", "name"), LORA_TOGETHER, ids=str)
def test_fields_of_lora_config_together(changes, name, record_property):
    refused(lambda: LoraConfig(**changes), name, record_property)


def complete(**changes: Any) -> None:
    """All that is made of the options before a training is begun."""
    options = FinetuneOptions(**{"model": "m", "data": "d", **changes})
    options.lora_config()
    options.training_arguments(has_eval=True)


def test_good_options_are_taken(tmp_path):
    complete(output_dir=str(tmp_path), lora_alpha=16, val_set_size=1, learning_rate=1)
    complete(eval_steps=1, save_steps=1, save_total_limit=1, lora_r=2**16, max_grad_norm=1e300)
    complete(max_steps=1, lr_scheduler_type="constant", lora_modules_to_save=["lm_head"])
    complete(max_steps=3, warmup_steps=2, lora_target_modules="all-linear")
    LoraConfig()


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 10), ({"max_steps": 20}, 10), ({"max_steps": 5}, 2), ({"max_steps": 1}, 0),
     ({"max_steps": 30, "warmup_steps": 20}, 20), ({"warmup_steps": 0}, 0)],
    ids=str,
)  # fmt: skip
def test_the_warm_up_is_shorter_than_the_training(changes, steps):
    options = FinetuneOptions(model="m", data="d", **changes)
    assert options.training_arguments(has_eval=False).warmup_steps == steps


@pytest.mark.parametrize(("name", "value"), cases(FINETUNE))
def test_fields_of_finetune_options(name, value, record_property):
    refused(lambda: complete(**{name: value}), name, record_property)


@pytest.mark.parametrize(("changes", "name"), FINETUNE_TOGETHER, ids=str)
def test_fields_of_finetune_options_together(changes, name, record_property):
    refused(lambda: complete(**changes), name, record_property)


@pytest.mark.parametrize("kind", [LoraConfig, FinetuneOptions])
@pytest.mark.parametrize("name", ["lora_rank", "__class__", "R", "modle"])
def test_unknown_fields(kind, name):
    with pytest.raises(TypeError, match=name):
        kind(**{"model": "m", "data": "d", name: 1} if kind is FinetuneOptions else {name: 1})


# The same through the command line and its config files.


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code in (1, 2) and not captured.out
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lora-llama: error: ")
    return lines[0]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(FinetuneOptions)])
def test_a_config_file_with_a_faulty_value(name, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    content = {"model": "m", "data": "d", name: {"a": [1]}}
    file.write_text(yaml.safe_dump(content))
    assert name in error_of(["finetune", "--config", str(file)], capsys)


@pytest.mark.parametrize(
    "text",
    [
        "lora_rank: 3", "model: m\nmodle: m", "- model", "model", "3", "{", 
        "model: !!python/name:os.system",
        "model: !!python/object/apply:os.system ['exit 1']", "\0", "model: &a [*a]",
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
        "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nmodel: *c",
    ],
    ids=lambda text: repr(text)[:30],
)  # fmt: skip
def test_config_files_that_are_none(text, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    message = error_of(["finetune", "--config", str(file), "--data", "d"], capsys)
    assert len(message) < 5000


def test_unknown_options_and_commands(capsys):
    assert "lora_rank" in error_of(["finetune", "--lora_rank", "3"], capsys)
    assert "train" in error_of(["train", "--model", "m"], capsys)


NO_CLI_INT: tuple[Any, ...] = ("eight", 1.5, None, [[8]], {"a": 1})
NO_CLI_TEXT: tuple[Any, ...] = (["a"], {"a": 1})
NO_NAME = ((*NO_CLI_TEXT, None), ("",))
# Of a training these are None where they are not given.
MAYBE_NAME = (NO_CLI_TEXT, ("",))
NO_DTYPE: tuple[tuple[Any, ...], tuple[Any, ...]] = ((1, None, ["a"]), ("", "int8", "float8"))
SEED = (NO_CLI_INT, (-1, 2**32))
# command: its options that are required, and of each option what it may not be, as in a config file
COMMANDS: dict[str, tuple[dict[str, Any], dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]]] = {
    "generate": (
        {"model": "m", "prompt": "p"},
        {
            "model": NO_NAME,
            "prompt": ((*NO_CLI_TEXT, None), ("", " ", "\n")),
            "adapter": MAYBE_NAME,
            "system": (NO_CLI_TEXT, ()),
            "gguf_file": MAYBE_NAME,
            "dtype": NO_DTYPE,
            "max_new_tokens": (NO_CLI_INT, (0, -1, 2**31, 10**25)),
            "temperature": (("hot", None, [1.0], math.nan, math.inf), (-1, 1e-300, 1e-4, 1e300)),
            "seed": SEED,
        },
    ),
    "verify": (
        {},
        {
            "model": MAYBE_NAME,
            "gguf_file": MAYBE_NAME,
            "dtype": NO_DTYPE,
            "lora_r": (NO_CLI_INT, (0, -1, 2**16 + 1, 10**12)),
            "tokens": (NO_CLI_INT, (1, -1, 10**12)),
            "seed": SEED,
        },
    ),
    "merge": (
        {"adapter": "a", "output_dir": "nowhere/merged"},
        {
            "adapter": NO_NAME,
            "output_dir": ((*NO_CLI_TEXT, None), ("", __file__)),
            "model": MAYBE_NAME,
            "gguf_file": MAYBE_NAME,
            "dtype": NO_DTYPE,
        },
    ),
    "estimate": (
        {"model": "llama-8b"},
        {
            "model": NO_NAME,
            "seq_len": (NO_CLI_INT, (0, [], [8, 0], 10**25)),
            "gpus": (NO_CLI_INT, (0, [], [1, -1], 10**25)),
            "lora_r": (NO_CLI_INT, (0, [], [8, -8], 10**25)),
            "batch_size": (NO_CLI_INT, (0, -1, 10**25)),
            "lora_target_modules": (
                (1, None, {"a": 1}, [[1]]), ("", [], "qproj", ["q_proj"] * 2, "q_proj,q_proj"),
            ),
            "dtype": NO_DTYPE,
            "sharding": ((1, None), ("", "fsdp1")),
        },
    ),
    "demo": (
        {},
        {
            "output_dir": ((*NO_CLI_TEXT, None), ("", __file__)),
            "max_steps": (tuple(v for v in NO_CLI_INT if v is not None), (0, -1, 2**31)),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_every_command_have_their_cases(command, capsys):
    assert COMMANDS[command][1].keys() == inspect.signature(getattr(cli, command)).parameters.keys()
    assert "no_such_option" in error_of([command, "--no_such_option", "1"], capsys)


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        pytest.param(command, *case.values, id=f"{command}-{case.id}")
        for command, (_, table) in COMMANDS.items()
        for case in cases(table)
    ],
)
def test_options_of_every_command(
    command, name, value, tmp_path, capsys, monkeypatch, record_property
):
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("a model was looked for")

    # Nothing is read before all options are known to be good.
    for place in ("_load", "bundled_model", "base_model_of", "run_demo"):
        monkeypatch.setattr(cli, place, never)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump({**COMMANDS[command][0], name: value}))
    message = error_of([command, "--config", str(file)], capsys)
    assert re.search(rf"\b{name}\b", message), message
    assert len(message) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"]
    figure = {"row": 30, "name": "faulty options refused by name", "value": 1.0, "combine": "sum"}
    record_property("figure", figure)


def test_faulty_values_are_not_echoed_at_length():
    """A value of a megabyte is named by its beginning."""
    with pytest.raises(TypeError) as caught:
        LoraConfig.from_dict({"r": ["x" * 100_000]})
    assert len(str(caught.value)) < 1000
