"""The command line as its users meet it: what it does, and one clear error where it cannot."""

import dataclasses
import inspect
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaForCausalLM

from lora_kernels import LoraConfig
from lora_kernels.adapter_files import load_adapter
from lora_llama import cli
from lora_llama.model import LoraLlamaForCausalLM
from lora_llama.options import ALL_PROJECTIONS, FinetuneOptions
from lora_llama.trainer import LoraTrainer


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one error message, which is all that stderr holds beside progress bars."""
        assert "Traceback" not in self.err
        assert self.err.count("lora-llama: error: ") == 1, self.err
        return self.err.partition("lora-llama: error: ")[2].strip()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `lora-llama` in this process."""

    def run_command(*arguments: Any) -> Outcome:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return run_command


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def finetune_command(tiny_llama, sums, write_rows, output) -> list[str]:
    """A short training on the sums; options appended to it win."""
    options = {
        "model": tiny_llama, "data": write_rows(sums), "output_dir": output, "dtype": "float32",
        "max_steps": 3, "warmup_steps": 0, "lora_r": 4, "lora_alpha": 8, "learning_rate": 5e-3,
    }  # fmt: skip
    return ["finetune", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="session")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with an effect, on all seven projections, whose config names its base."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(ALL_PROJECTIONS), init_lora_weights=False
    )
    directory = tmp_path_factory.mktemp("adapters") / "adapter"
    LoraLlamaForCausalLM.from_pretrained(tiny_llama, lora=config).save_pretrained(directory)
    return directory


def edited(adapter: Path, copy: Path, **changes: Any) -> Path:
    """A copy of the adapter with another config."""
    shutil.copytree(adapter, copy)
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


# Commands that work.


def test_finetune_generate_merge(run, finetune_command, output, tmp_path, tiny_llama):
    done = run(*finetune_command, "--max_steps=40", "--val_set_size=4", "--learning_rate=0.02")
    assert done.code == 0, done.err
    for text in (
        "trainable params: 7,424 ",
        "training on SupervisedDataset(36 rows, ",
        "held out: SupervisedDataset(4 rows",
        "gradients of the first step",
        "q_proj            2  0, as it must be while B is 0 ",
        "40 steps, ",
        " tokens/s, peak memory ",
        "held-out loss ",
        f"adapter, loss.png and metrics.json: {output}",
    ):
        assert text in done.out, text
    # Progress bars alone: no warning, no error.
    for line in done.err.replace("\r", "\n").replace("\x1b[A", "").splitlines():
        assert not line.strip() or "it/s" in line or "s/it" in line or "?it" in line, line

    question = ["--prompt", "add 1+2", "--max_new_tokens", 6, "--dtype", "float32"]
    answer = run("generate", "--model", output, *question)
    assert answer.code == 0 and answer.out.strip()
    same = run("generate", "--model", tiny_llama, "--adapter", output, *question)
    assert (same.code, same.out) == (0, answer.out)
    base = run("generate", "--model", tiny_llama, *question)
    assert base.code == 0 and base.out != answer.out
    system = run("generate", "--model", tiny_llama, "--system", "speak", *question)
    assert system.code == 0 and system.out != base.out

    merged = tmp_path / "merged"
    done = run("merge", "--adapter", output, "--output_dir", merged, "--dtype=float32")
    assert done.code == 0 and done.out == f"merged {output} into {tiny_llama}: {merged}\n"
    again = run("generate", "--model", merged, *question)
    assert (again.code, again.out) == (0, answer.out)


def test_sampling_is_seeded(run, tiny_llama):
    command = ["generate", "--model", tiny_llama, "--prompt=a", "--temperature=1.5"]
    answers = [run(*command, f"--seed={seed}").out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_generate_without_a_chat_template(run, tiny_llama, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(tiny_llama, plain)
    (plain / "chat_template.jinja").unlink()
    assert run("generate", "--model", plain, "--prompt", "add").code == 0
    assert "no token" not in run("generate", "--model", plain, "--prompt", "add").err
    assert "chat template" in run("generate", "--model", plain, "--prompt=a", "--system=b").error()


def test_verify(run, adapter, tiny_llama):
    for model in (adapter, tiny_llama):
        done = run("verify", "--model", model, "--tokens=32", "--lora_r=4")
        assert done.code == 0
        assert done.out.endswith("verified\n")
        assert "28 gradients, largest difference from the reference" in done.out


def test_config_file(run, finetune_command, output, tmp_path):
    _, *options = finetune_command
    values = dict(option.removeprefix("--").split("=") for option in options)
    config = tmp_path / "config.yaml"
    values |= {"lora_target_modules": "[q_proj, v_proj]", "use_rslora": "true"}
    config.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    # The command line wins, wherever it stands.
    assert run("finetune", "--lora_alpha=16", "--config", config, "--lora_r=2").code == 0
    saved, tensors = load_adapter(output)
    assert (saved.r, saved.lora_alpha, saved.use_rslora) == (2, 16, True)
    assert saved.target_modules == ["q_proj", "v_proj"] and len(tensors) == 8


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
        ("all-linear", "all-linear"),
    ],
)
def test_lists_on_the_command_line(value, expected, run, monkeypatch, finetune_command):
    class Stop(ValueError):
        pass

    def finetune(options: FinetuneOptions) -> None:
        raise Stop(repr(options.lora_config().target_modules))

    monkeypatch.setattr(cli, "finetune", finetune)
    assert run(*finetune_command, "--lora_target_modules", value).error() == repr(expected)


def parameters_of(command: str) -> dict[str, inspect.Parameter]:
    target = FinetuneOptions if command == "finetune" else getattr(cli, command)
    return dict(inspect.signature(target).parameters)


@pytest.mark.parametrize("command", ["finetune", "generate", "verify", "merge", "estimate", "demo"])
def test_help_names_every_option_with_its_default(command, run):
    shown = run(command, "--help")
    assert shown.code == 0 and not shown.err
    text = " ".join(shown.out.split())
    _, _, text = text.partition("options: -h")
    assert "--config CONFIG" in text
    parameters = parameters_of(command)
    for name, following in itertools.pairwise([*parameters, ""]):
        parameter = parameters[name]
        _, found, entry = text.partition(f" --{name} ")
        assert found, name
        description = entry.partition(f" --{following} ")[0]
        if parameter.default is inspect.Parameter.empty:
            assert "(required, type:" in description, name
        elif name == "lora_target_modules" and command == "finetune":
            assert f"default: {list(ALL_PROJECTIONS)}" in description
        else:
            default = "null" if parameter.default is None else parameter.default
            # The help breaks its lines at hyphens too.
            assert f"default: {default})" in description.replace("- ", "-"), name
        # More than the type: a sentence that says what it is.
        assert len(description.partition("(")[0].split()) >= 3, name


def test_help_names_every_command(run):
    shown = run("--help")
    assert shown.code == 0
    for command in ("finetune", "generate", "verify", "merge", "estimate", "demo"):
        assert f"\n    {command}  " in shown.out


# Wrong usage: exit code 2, nothing done.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected .subcommand. to be one of {finetune,generate,verify,merge,estimate, ...}"),
        (["finetun"], "invalid choice: 'finetun'"),
        (["finetune"], r"required: .*model, .*data"),
        (["finetune", "--model=m"], r"required: .*data"),
        (["generate", "--model=m"], r"required: .*prompt"),
        (["merge", "--adapter=a"], r"required: .*output_dir"),
        (["finetune", "--lora_rank=4"], "unrecognized arguments: --lora_rank=4"),
        (["finetune", "--lora=4"], "unrecognized arguments: --lora=4"),
        (["demo", "--steps=4"], "unrecognized arguments: --steps=4"),
        (["finetune", "--model"], "--model: expected one argument"),
        (["finetune", "--lora_r=abc"], r'"lora_r": Expected a .*int.* Got value: abc'),
        (["finetune", "--lora_r=1.5"], r'"lora_r": Expected a .*int.* Got value: 1.5'),
        (["finetune", "--learning_rate=fast"], r'"learning_rate": Expected a .*float.* fast'),
        (["finetune", "--learning_rate=nan"], r'"learning_rate": Expected a .*float.* nan'),
        (["finetune", "--packing=maybe"], r'"packing": Expected a .*bool.* maybe'),
        (["finetune", "--dtype=float16"], r'"dtype": Expected .*bfloat16.* float16'),
        (["generate", "--dtype=int8"], r'"dtype": Expected .*float16.* int8'),
        (["finetune", "--lr_scheduler_type=cosin"], r'"lr_scheduler_type": Expected .*cosine'),
        (["finetune", "--max_steps=null"], r'"max_steps": Expected a .*int.* None'),
        (["finetune", "--config=nowhere.yaml"], r"File does not exist: .*nowhere.yaml"),
        (["finetune", "--config=."], r"Path is not a file"),
        (["finetune", "--config="], r"--config: expected a file, got ''"),
        ([""], "invalid choice: ''"),
    ],
)
def test_wrong_usage(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.code == 2 and not done.out
    assert len(done.err.strip().splitlines()) == 1
    assert re.search(message, done.error()), done.err
    assert done.error().endswith("(--help lists commands and options)")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "does not accept option 'learning_rat'"),
        ("lora_r: abc", '"lora_r": Expected a'),
        ("lora: {r: 4}", "does not accept option 'lora.r'"),
        ("lora_r: [", "config.yaml: not YAML: "),
        ("a: b: c", "config.yaml: not YAML: "),
        ("\udcff", "config.yaml: not YAML: 'utf-8' codec can't decode byte 0xff"),
        ("- 1", "config.yaml: expected lines of the form option: value, got list"),
        ("words", "config.yaml: expected lines of the form option: value, got str"),
        ("", "config.yaml: expected lines of the form option: value, got NoneType"),
    ],
)
def test_a_faulty_config_file(content, message, run, finetune_command, tmp_path, output):
    config = tmp_path / "config.yaml"
    config.write_bytes(content.encode(errors="surrogateescape") + b"\n")
    done = run(*finetune_command, "--config", config)
    assert done.code == 2 and message in done.error()
    assert len(done.err.strip().splitlines()) == 1
    assert not output.exists()


# Faulty values: exit code 1, nothing written.


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--lora_r=0", "lora_r: expected at least 1, got 0"),
        ("--lora_alpha=0", "lora_alpha: expected a positive number, got 0.0"),
        ("--lora_dropout=1", "lora_dropout: expected a number in [0, 1), got 1.0"),
        ("--lora_dropout=-0.1", "lora_dropout: expected a number in [0, 1), got -0.1"),
        ("--learning_rate=-1", "learning_rate: expected a positive number, got -1.0"),
        ("--max_length=1", "max_length: expected at least 2, got 1"),
        ("--max_steps=0", "max_steps: expected a positive number or -1, got 0"),
        ("--num_train_epochs=0", "num_train_epochs: expected a positive number, got 0.0"),
        ("--per_device_train_batch_size=0", "per_device_train_batch_size: expected at least 1"),
        ("--save_total_limit=0", "save_total_limit: expected at least 1, got 0"),
        ("--seed=-1", "seed: expected at least 0, got -1"),
        ("--seed=4294967296", "seed: expected less than 2**32, got 4294967296"),
        ("--val_set_size=1.5", "val_set_size: expected a fraction below 1 or a number of rows"),
        ("--val_set_size=40", "val_set_size: holding out 40 of 40 rows leaves nothing"),
        ("--lora_target_modules=[]", "target_modules: expected at least one name, got []"),
        ("--lora_target_modules=qproj", "got ['qproj'], which match none; the model has 15 "),
        ("--lora_target_modules=embed_tokens", "expected names of nn.Linear modules"),
        ("--report_to=nonsense", "report_to: expected none, or an integration"),
        ("--resume_from_checkpoint=latest", "no finished checkpoint-N directory in "),
        ("--resume_from_checkpoint=nowhere", "resume_from_checkpoint: nowhere is no checkpoint"),
        ("--output_dir=", "output_dir: expected a directory, got ''"),
        ("--max_length=4", "has a trained token within max_length=4; the shortest prompt needs"),
        ("--data=nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--data=.", ".: expected a JSON Lines file, got a directory"),
        ("--data=", "data: expected a name, got ''"),
        ("--model=", "model: expected a name, got ''"),
        ("--gguf_file=", "gguf_file: expected a name, got ''"),
        ("--resume_from_checkpoint=", "resume_from_checkpoint: expected a name, got ''"),
        ("--report_to=", "report_to: expected none, or an integration"),
        ("--lora_target_modules=", "target_modules: expected non-empty names, got ''"),
        ("--gguf_file=nowhere.gguf", "nowhere.gguf"),
    ],
)
def test_faulty_values(option, message, run, finetune_command, output):
    done = run(*finetune_command, option)
    assert done.code == 1 and message in done.error()
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "rows.jsonl:2: not JSON"),
        ('{"text": "a"}\n\n{"question": "a", "answer": "b"}\n', "rows.jsonl:3: keys ['answer', 'q"),
        ('{"prompt": "a", "completion": 1}', "rows.jsonl:1: completion: expected a string"),
        ("", "rows.jsonl: no rows"),
        ("\n \n\n", "rows.jsonl: no rows"),
        ('{"text": "a"}\n{"text": "\udcff"}', "rows.jsonl:2: not UTF-8 text: byte 0xff at column"),
        ("\0" * 99, "rows.jsonl:1: not JSON"),
        ('{"text": ' * 99_999, "rows.jsonl:1: nested too deeply"),
        ('[{"text": "a"}]', "rows.jsonl:1: a JSON array; expected JSON Lines"),
    ],
)
def test_faulty_data(content, message, run, finetune_command, output, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    done = run(*finetune_command)
    assert done.code == 1 and message in done.error()
    assert len(done.err.strip().splitlines()) == 1 and not done.out
    assert not output.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--max_new_tokens=0"], "max_new_tokens: expected at least 1, got 0"),
        (["generate", "--temperature=-1"], "temperature: expected at least 0, got -1.0"),
        (["generate", "--seed=-1"], "seed: expected at least 0, got -1"),
        (["generate", "--seed=4294967296"], "seed: expected less than 2**32, got 4294967296"),
        (["generate", "--adapter="], "adapter: expected a directory, got ''"),
        (["verify", "--tokens=1"], "tokens: expected at least 2, got 1"),
        (["verify", "--lora_r=0"], "lora_r: expected at least 1, got 0"),
        (["verify", "--seed=-1"], "seed: expected at least 0, got -1"),
        (["verify", "--seed=4294967296"], "seed: expected less than 2**32, got 4294967296"),
        (["demo", "--max_steps=0"], "max_steps: expected at least 1, got 0"),
    ],
)
def test_faulty_values_of_other_commands(command, message, run, tiny_llama):
    name, option = command
    given = {"generate": ["--prompt=a"], "verify": [], "demo": []}[name]
    model = [] if name == "demo" else [f"--model={tiny_llama}"]
    done = run(name, *model, *given, option)
    assert done.code == 1 and message in done.error()


COMMANDS = {
    "finetune": lambda model, rows, output: [
        f"--model={model}", f"--data={rows}", f"--output_dir={output}",
    ],
    "generate": lambda model, rows, output: [f"--model={model}", "--prompt=a"],
    "verify": lambda model, rows, output: [f"--model={model}"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_models_that_are_none(command, run, sums, write_rows, output, tmp_path, tiny_llama):
    rows = write_rows(sums)
    gpt2 = tmp_path / "gpt2"
    GPT2Config().save_pretrained(gpt2)
    (empty := tmp_path / "empty").mkdir()
    shutil.copytree(tiny_llama, no_weights := tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    shutil.copytree(no_weights, pickled := tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"not read")
    nowhere = "': neither a directory, nor a model that can be reached on the hub: "
    for model, message in {
        "./nowhere": f"model './nowhere{nowhere}",
        tmp_path / "nowhere": f"model '{tmp_path / 'nowhere'}{nowhere}",
        # The hub cannot be reached in tests.
        "somebody/nothing": f"model 'somebody/nothing{nowhere}",
        empty: f"{empty}: no config.json there",
        rows: f"{rows}: expected a model's directory, got a file",
        gpt2: f"{gpt2}: expected a Llama checkpoint (model_type 'llama'), got model_type 'gpt2'",
        no_weights: str(no_weights),
        pickled: "model.safetensors",
    }.items():
        done = run(command, *COMMANDS[command](model, rows, output))
        assert done.code == 1 and message in done.error(), model
        assert len(done.err.strip().splitlines()) == 1
        assert not output.exists() and not done.out


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other_sizes(config: Path) -> None:
    config.write_text(
        config.read_text().replace('"intermediate_size": 96', '"intermediate_size": 80')
    )


def no_sizes(config: Path) -> None:
    config.write_text(config.read_text().replace('"hidden_size": 64', '"hidden_size": "64"'))


BROKEN = {
    "weights": ("model.safetensors", cut, "{file}: no safetensors file, or cut short"),
    "config": ("config.json", cut, "{file}: not JSON, or cut short"),
    "field": (
        "config.json",
        no_sizes,
        "{file}: hidden_size: expected a positive integer, got '64'",
    ),
    "sizes": (
        "config.json",
        other_sizes,
        "{base}: weights do not fit config.json: model.layers.0.mlp",
    ),
    "generation": ("generation_config.json", cut, "{file}: not JSON, or cut short"),
    "tokenizer": ("tokenizer.json", cut, "{file}: not JSON, or cut short"),
    "tokenizer's config": ("tokenizer_config.json", cut, "{file}: not JSON, or cut short"),
    "no tokenizer": ("tokenizer.json", Path.unlink, "{base}: no tokenizer there"),
}


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (command, fault)
        for command in (*COMMANDS, "merge")
        for fault in BROKEN
        # verify makes its own tokens.
        if not (command == "verify" and "tokenizer" in fault)
    ],
)
def test_models_that_are_broken(
    command, fault, run, sums, write_rows, output, tmp_path, tiny_llama, adapter
):
    name, change, message = BROKEN[fault]
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    change(base / name)
    arguments = [f"--adapter={adapter}", f"--model={base}", f"--output_dir={output}"]
    if command != "merge":
        arguments = COMMANDS[command](base, write_rows(sums), output)
    done = run(command, *arguments)
    assert done.code == 1
    assert done.error().startswith(message.format(file=base / name, base=base))
    assert len(done.err.strip().splitlines()) == 1 and not done.out
    assert not output.exists() and not list(tmp_path.glob(".merge*"))


def test_a_row_that_the_chat_template_refuses(run, finetune_command, tiny_llama, tmp_path, output):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    template = base / "chat_template.jinja"
    fails = "{% if messages[0].content == 'bad' %}{{ 1 / 0 }}{% endif %}"
    template.write_text(template.read_text() + fails)
    rows = [{"prompt": "good", "completion": "a"}] * 5 + [{"prompt": "bad", "completion": "a"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    done = run(*finetune_command, "--model", base)
    refused = "the tokenizer's chat template refuses the messages: division by zero"
    assert done.code == 1 and done.error() == f"{tmp_path / 'rows.jsonl'}:11: {refused}"
    assert not output.exists() and not done.out


# Places that cannot be written.


def test_places_that_cannot_be_written(run, finetune_command, adapter, tmp_path, monkeypatch):
    """Known before anything is loaded."""

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(LoraLlamaForCausalLM, "from_pretrained", never)
    monkeypatch.setattr(cli, "run_demo", never)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    for name in ("file/below", "link", "n" * 300, "a\0b"):
        place = f"{tmp_path}/{name}"
        for command in (finetune_command, ["merge", "--adapter", adapter], ["demo"]):
            done = run(*command, f"--output_dir={place}")
            assert done.code == 1
            assert done.error().startswith(f"output_dir: {place!r} cannot be written: ")
            assert len(done.err.strip().splitlines()) == 1 and not done.out
    assert sorted(tmp_path.iterdir()) == before


def test_finetune_refuses_an_adapter_as_its_model(run, finetune_command, adapter, output):
    done = run(*finetune_command, "--model", adapter)
    assert done.code == 1 and "model: expected a base model, got the adapter" in done.error()
    assert not output.exists()


# Adapters that do not fit.


def keys_of(adapter: Path) -> list[str]:
    return sorted(load_adapter(adapter)[1])


@pytest.mark.parametrize("command", ["generate", "merge"])
def test_adapters_that_do_not_fit(command, run, adapter, tiny_llama, output, tmp_path):
    keys = keys_of(adapter)
    assert len(keys) == 28
    wider = tmp_path / "wider"
    shutil.copytree(adapter, wider)
    tensors = load_file(wider / "adapter_model.safetensors")
    mlp = [key for key in tensors if "up_proj" in key or "gate_proj.lora_B" in key]
    for key in mlp:
        tensors[key] = torch.cat([tensors[key]] * 2, dim=1 if "lora_A" in key else 0)
    save_file(tensors, wider / "adapter_model.safetensors")
    pickled = edited(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    cut = edited(adapter, tmp_path / "cut")
    content = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(content[:-100])
    not_q = [key for key in keys if "q_proj" not in key]
    cases = {
        edited(adapter, tmp_path / "rank", r=8): ("expected rank 8, got 4", keys),
        edited(adapter, tmp_path / "target", target_modules=["q_proj"]): ("unexpected", not_q),
        edited(adapter, tmp_path / "dora", use_dora=True): ("lora_magnitude_vector beside it", []),
        edited(adapter, tmp_path / "qalora", use_qalora=True): ("use_qalora", []),
        wider: ("expected shape", [key.removeprefix("base_model.model.") for key in mlp]),
        pickled: ("adapter_model.bin is a pickle, and pickles can run code", []),
        cut: ("is not a valid safetensors file", []),
        tmp_path / "nowhere": ("is missing", []),
        tiny_llama: ("adapter_config.json", []),
    }
    for directory, (message, named) in cases.items():
        arguments = {
            "generate": ["--model", tiny_llama, "--prompt=a", "--adapter", directory],
            "merge": ["--model", tiny_llama, "--adapter", directory, "--output_dir", output],
        }[command]
        done = run(command, *arguments)
        error = done.error()
        assert done.code == 1 and message in error, directory
        assert [key for key in named if key not in error] == []
        assert not output.exists()


@pytest.mark.parametrize("command", ["generate", "merge"])
def test_an_adapter_is_no_base_model(command, run, adapter, output, tmp_path):
    other = edited(adapter, tmp_path / "other")
    arguments = {"generate": ["--prompt=a"], "merge": ["--output_dir", output]}[command]
    done = run(command, "--model", other, "--adapter", adapter, *arguments)
    assert done.code == 1
    assert done.error() == f"model: expected the base model of {adapter}, got an adapter: {other}"
    # Nor is the one that an adapter names.
    of_itself = edited(adapter, tmp_path / "itself", base_model_name_or_path=str(adapter))
    role = {"generate": "--model", "merge": "--adapter"}[command]
    done = run(command, role, of_itself, *arguments)
    assert done.code == 1 and done.error() == (
        f"{of_itself}: base_model_name_or_path: expected a base model, got the adapter {adapter}"
    )
    assert not output.exists()


def test_an_adapter_is_read_before_its_base(run, adapter, output, tmp_path):
    broken = edited(adapter, tmp_path / "broken")
    cut(broken / "adapter_model.safetensors")
    done = run("generate", "--model=nowhere", "--prompt=a", "--adapter", broken)
    assert done.code == 1 and str(broken / "adapter_model.safetensors") in done.error()
    for empty in (["--adapter="], [f"--adapter={adapter}", "--model="]):
        done = run("merge", *empty, "--output_dir", output)
        assert done.code == 1 and re.match("(adapter|model): expected .*, got ''", done.error())
    assert not output.exists()


def test_merge_needs_to_know_the_base(run, adapter, output, tiny_llama, tmp_path):
    nameless = edited(adapter, tmp_path / "nameless", base_model_name_or_path=None)
    done = run("merge", "--adapter", nameless, "--output_dir", output)
    assert done.code == 1 and "names no base_model_name_or_path" in done.error()
    done = run("merge", "--adapter", nameless, "--output_dir", output, "--model", tiny_llama)
    assert done.code == 0 and (output / "model.safetensors").is_file()


# Merging.


def test_merge_writes_a_plain_checkpoint(run, adapter, tiny_llama, output, tmp_path):
    assert run("merge", "--adapter", adapter, "--output_dir", output).code == 0
    plain, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert type(plain) is LlamaForCausalLM and not any(info.values())
    assert plain.config.architectures == ["LlamaForCausalLM"]
    assert {p.name for p in output.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["output"]
    ids = torch.randint(261, (2, 30), generator=torch.Generator().manual_seed(0))
    ours = LoraLlamaForCausalLM.from_pretrained(adapter).eval()
    with torch.no_grad():
        expected = ours(ids).logits
        torch.testing.assert_close(plain.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
        with ours.disable_adapter():
            assert (ours(ids).logits - expected).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(output)("a")["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merge_keeps_the_dtype_of_the_base(dtype, run, adapter, tiny_llama, output, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=dtype).save_pretrained(base)
    merge = ["merge", "--adapter", adapter, "--model", base, "--output_dir"]
    assert run(*merge, output).code == 0
    assert {str(t.dtype) for t in load_file(output / "model.safetensors").values()} == {
        f"torch.{dtype}"
    }
    assert run(*merge, tmp_path / "half", "--dtype=float16").code == 0
    tensors = load_file(tmp_path / "half" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float16}


def test_merge_takes_an_empty_directory_and_no_other(run, adapter, tmp_path):
    merge = ["merge", "--adapter", adapter, "--output_dir"]
    (tmp_path / "empty").mkdir()
    assert run(*merge, tmp_path / "empty").code == 0
    before = load_file(tmp_path / "empty" / "model.safetensors")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path / "empty", tmp_path / "file", adapter, ""):
        done = run(*merge, taken)
        assert done.code == 1
        assert "output_dir: expected a new or empty directory, got " in done.error()
    after = load_file(tmp_path / "empty" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_a_merge_that_fails_leaves_nothing(stop, exists, run, adapter, output, monkeypatch):
    if exists:
        output.mkdir()
    save = LlamaForCausalLM.save_pretrained

    def stop_half_way(self, directory, *args: Any, **kwargs: Any) -> None:
        save(self, directory, *args, **kwargs)
        assert list(Path(directory).iterdir())
        raise stop

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", stop_half_way)
    done = run("merge", "--adapter", adapter, "--output_dir", output)
    if isinstance(stop, OSError):
        assert done.code == 1 and "No space left on device" in done.error()
    else:
        assert done.code == 130 and done.error() == "interrupted"
    assert output.exists() == exists
    assert [path for path in output.parent.rglob("*") if path != output] == []


# What stops a training from outside.


def test_out_of_memory_says_what_to_lower(run, finetune_command, tiny_llama, monkeypatch):
    def out_of_memory(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(LoraTrainer, "training_step", out_of_memory)
    done = run(*finetune_command)
    assert done.code == 1
    first, second = done.error().splitlines()
    assert first == "out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    for option in ("per_device_train_batch_size", "max_length", "lora_r", "gradient_checkpointing"):
        assert option in second
    monkeypatch.setattr(cli, "generate_answers", out_of_memory)
    done = run("generate", "--model", tiny_llama, "--prompt=a")
    assert done.code == 1 and "max_length" not in done.error() and "smaller" in done.error()
    monkeypatch.setattr(cli, "verify_model", out_of_memory)
    assert "lower lora_r or tokens" in run("verify", "--model", tiny_llama).error()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "memory",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "GPU memory"),
        (RuntimeError("CUDA error: out of memory"), "GPU memory"),
        (MemoryError("Unable to allocate"), "memory"),
    ],
)
def test_other_ways_to_run_out_of_memory(error, kind, run, finetune_command, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(LoraTrainer, "training_step", fail)
    done = run(*finetune_command)
    first, second = done.error().splitlines()
    assert done.code == 1 and first == f"out of {kind}: {error}" and "max_length" in second


def test_a_bug_is_not_made_a_users_error(run, finetune_command, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(LoraTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        run(*finetune_command)


def test_an_error_of_several_lines_is_printed_as_one(run, tiny_llama, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("one\n  two\nthree")

    monkeypatch.setattr(cli, "generate_answers", fail)
    done = run("generate", "--model", tiny_llama, "--prompt=a")
    assert (done.code, done.err) == (1, "lora-llama: error: one two three\n")


def test_an_interrupt_says_how_to_go_on(run, finetune_command, output, monkeypatch):
    original = LoraTrainer.training_step

    def interrupted(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", interrupted)
    done = run(*finetune_command, "--max_steps=8")
    assert done.code == 130
    assert done.error() == "interrupted; no checkpoint was saved; --save_steps saves them"
    done = run(*finetune_command, "--max_steps=8", "--save_steps=2")
    assert done.code == 130
    first, command = done.error().splitlines()
    assert first == f"interrupted; saved in {output / 'checkpoint-4'}; to go on:"
    assert command.endswith(f"--resume_from_checkpoint {output / 'checkpoint-4'}")
    monkeypatch.setattr(LoraTrainer, "training_step", original)
    done = run(*finetune_command, "--max_steps=8", "--resume_from_checkpoint", "latest")
    assert done.code == 0 and "8 steps, " in done.out


def test_a_faulty_gradient_is_one_error(run, finetune_command, output, monkeypatch):
    original = LoraTrainer.training_step

    def without_one_gradient(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = self.model.get_submodule("model.layers.1.mlp.down_proj")
        layer.lora_B["default"].requires_grad_(False)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LoraTrainer, "training_step", without_one_gradient)
    done = run(*finetune_command)
    assert done.code == 1
    assert "model.layers.1.mlp.down_proj.lora_B.default: no gradient" in done.error()
    assert not (output / "adapter_model.safetensors").exists()


# The real thing, in a process of its own.


def start(*arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_control_c(finetune_command, output):
    process = start("lora_llama.cli", *finetune_command, "--max_steps=100000", "--save_steps=5")
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-10").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "trainable params" in out
    # Ended between two of the saves that were asked for: by a save of its own.
    (last,) = re.findall(
        r"interrupted; saved in \S+/checkpoint-(\d+); to go on:\n  lora-llama", err
    )
    assert (output / f"checkpoint-{last}" / "trainer_state.json").exists()
    assert err.count("stopping after this step, with a checkpoint; again stops at once") == 1


@pytest.mark.slow
def test_two_processes_train_as_one(run, finetune_command, output, tmp_path, monkeypatch):
    """Data-parallel by torchrun: as many rows a step, the same losses and weights."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Three held-out rows for two processes: one of them is there twice.
    common = [*finetune_command, "--val_set_size=3", "--save_steps=2"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    process = start(
        *torchrun, sys.executable, "-m", "lora_llama.cli", *common,
        "--per_device_train_batch_size=2", "--per_device_eval_batch_size=1",
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("gradients of the first step") == out.count("trainable params") == 1
    assert (output / "checkpoint-2").is_dir()
    one = tmp_path / "one"
    assert run(*common, "--per_device_train_batch_size=4", "--output_dir", one).code == 0
    ours, whole = (json.loads((path / "metrics.json").read_text()) for path in (output, one))
    for name in ("train_losses", "eval_losses"):
        assert len(ours[name]) == len(whole[name]) > 1
        for (step, loss), (expected_step, expected) in zip(ours[name], whole[name], strict=True):
            assert step == expected_step and loss == pytest.approx(expected, rel=1e-5)
    for key, tensor in load_adapter(one)[1].items():
        difference = load_adapter(output)[1][key] - tensor
        assert difference.norm() <= 1e-3 * tensor.norm(), key
