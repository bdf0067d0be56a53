"""Tokenizers of strangers: none of their code is run, and no file outside is opened."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_llama import LoraLlama, loading
from lora_llama.loading import load_tokenizer

CONFIG = "tokenizer_config.json"
SECRET = "top-secret"


def write_tokenizer(directory: Path) -> None:
    model = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>").save_pretrained(directory)


@pytest.fixture
def directory(good: dict[str, Path], tmp_path: Path, monkeypatch) -> Path:
    """A Llama with a tokenizer; files outside it hold what is not to be read."""
    copied = shutil.copytree(good["llama"], tmp_path / "model")
    write_tokenizer(copied)
    (tmp_path / "outside").mkdir()
    for name in ("secret.txt", "tokenizer.1.0.json"):
        (tmp_path / "outside" / name).write_text(json.dumps({SECRET: 0}))
    # Whoever is asked whether code may run, says yes.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return copied


def edit(directory: Path, **fields: Any) -> None:
    file = directory / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def link(name: str, target: str = "../outside/secret.txt", **fields: Any) -> Any:
    """A link in place of a file; the tokenizer is then another one, without tokenizer.json."""

    def make(directory: Path) -> None:
        if fields:
            (directory / "tokenizer.json").unlink()
            edit(directory, **fields)
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        file.symlink_to(Path("..") / target if file.parent != directory else target)

    return make


def code(config: str) -> Callable[[Path], None]:
    """A configuration that asks for a class of the directory's own."""

    def make(directory: Path) -> None:
        text = f"open({str(directory / 'RAN')!r}, 'w')\nclass Evil: pass\n"
        (directory / "evil.py").write_text(text)
        file = directory / config
        fields = {
            "tokenizer_class": "Evil",
            "auto_map": {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"},
        }
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return make


def pipe(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return make


def sparse(name: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        with open(directory / name, "ab") as file:
            file.truncate(1 << 32)

    return make


def folder_outside(directory: Path) -> None:
    (directory / "additional_chat_templates").symlink_to("../outside")


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "code": (code(CONFIG), CONFIG, "auto_map: expected no code"),
    "code of the config": (code("config.json"), "config.json", "auto_map: expected no code"),
    "vocab.txt": (link("vocab.txt", tokenizer_class="BertTokenizer"), "vocab.txt", "is a link to"),
    "vocab.json": (
        link("vocab.json", tokenizer_class="GPT2Tokenizer"), "vocab.json", "is a link to",
    ),
    "merges.txt": (link("merges.txt"), "merges.txt", "is a link to"),
    "tokenizer.model": (
        link("tokenizer.model", tokenizer_class="LlamaTokenizer"), "tokenizer.model", "is a link",
    ),
    "a template": (
        link("additional_chat_templates/x.jinja"), "additional_chat_templates/x.jinja", "is a link",
    ),
    "all templates": (folder_outside, "additional_chat_templates", "is a link to"),
    "a versioned file": (
        link("tokenizer.1.0.json", "../outside/tokenizer.1.0.json"), "tokenizer.1.0.json", "is a",
    ),
    "versioned files": (
        lambda d: edit(d, fast_tokenizer_files=["../outside/tokenizer.1.0.json"]), CONFIG,
        "fast_tokenizer_files: expected no other file",
    ),
    "a GGUF file": (
        lambda d: edit(d, gguf_file=str(d.parent / "outside" / "secret.txt")), CONFIG,
        "gguf_file: expected no other file",
    ),
    "a link to a device": (link("vocab.txt", "/dev/zero"), "vocab.txt", "is a link to '/dev/zero'"),
    "a pipe": (pipe("vocab.txt"), "vocab.txt", "expected a regular file"),
    "a pipe for its template": (
        pipe("chat_template.jinja"), "chat_template.jinja", "expected a regular file",
    ),
    **{
        f"4 GiB of {name}": (sparse(name), name, "expected at most 67108864 bytes, got 4294967296")
        for name in (
            "tokenizer.json", CONFIG, "vocab.txt", "merges.txt", "tokenizer.model",
            "chat_template.jinja", "special_tokens_map.json",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_tokenizers_that_reach_out(name, directory: Path, watch):
    make, file, match = FAULTS[name]
    load_tokenizer(str(directory))
    make(directory)
    watch.refused(lambda path: load_tokenizer(str(path)), directory, directory / file, match)
    assert not (directory / "RAN").exists()


@pytest.mark.parametrize("name", [name for name in FAULTS if "link" in name or "pipe" in name])
def test_models_beside_them_are_refused_as_well(name, directory: Path, watch):
    make, file, match = FAULTS[name]
    make(directory)
    watch.refused(LoraLlama.from_pretrained, directory, directory / file, match)


def test_the_code_of_a_hub_is_not_run_either(monkeypatch):
    """What is asked of transformers, for whatever is no local directory."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        loading.AutoTokenizer, "from_pretrained", lambda path, **options: asked.update(options)
    )
    load_tokenizer("owner/name")
    assert asked == {"trust_remote_code": False}


def test_a_model_s_own_code_cannot_be_asked_for(directory: Path):
    with pytest.raises(ValueError, match="trust_remote_code: expected no code"):
        LoraLlama.from_pretrained(directory, trust_remote_code=True)


def test_the_cache_of_a_hub_is_read(directory: Path, tmp_path: Path):
    """Its snapshots are links into a directory beside them."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "1", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert load_tokenizer(str(snapshot)).get_vocab() == {"<unk>": 0, "a": 1, "b": 2}
    LoraLlama.from_pretrained(snapshot)


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("", "gguf_file: expected the name of a file, got ''"),
        ("../outside/secret.txt", "secret.txt: expected a file in the checkpoint's directory"),
        ("/etc/passwd", "/etc/passwd: expected a file in the checkpoint's directory"),
    ],
)
def test_a_gguf_file_elsewhere(file, match, directory: Path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=match):
        LoraLlama.from_pretrained(directory, gguf_file=file)
