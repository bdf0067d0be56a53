"""The packages as they are shipped: what they import, what they never contain, what a wheel has."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"lora_kernels": ROOT / "lora_kernels", "lora_llama": ROOT / "model" / "lora_llama"}
# What each package may import where it is imported itself. Everything else is imported where it
# is used, so that the package works without it.
AT_IMPORT = {
    "lora_kernels": {"lora_kernels", "torch", "safetensors"},
    "lora_llama": {"lora_llama", "lora_kernels", "torch", "transformers", "safetensors"},
}


def python_files(package: str) -> list[Path]:
    files = sorted(SOURCES[package].rglob("*.py"))
    assert len(files) > 5
    return files


ALL_FILES = [path for package in SOURCES for path in python_files(package)]


def imported(tree: ast.AST, everywhere: bool) -> set[str]:
    """The top-level names that a module imports, inside functions too or not.

    Imports under `if TYPE_CHECKING` do not run.
    """
    names: set[str] = set()
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add((node.module or "").split(".")[0])
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if everywhere or not (is_function or for_types):
            pending.extend(ast.iter_child_nodes(node))
    return names - set(sys.stdlib_module_names)


def run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints, in which triton is not told to interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# Imports.


@pytest.mark.parametrize("path", python_files("lora_kernels"), ids=lambda path: path.stem)
def test_lora_kernels_imports_torch_alone(path: Path):
    tree = ast.parse(path.read_text())
    allowed = set(AT_IMPORT["lora_kernels"])
    if path.name.startswith("triton_") or path.name == "compile_cases.py":
        allowed.add("triton")
    assert imported(tree, everywhere=False) <= allowed
    assert "lora_llama" not in imported(tree, everywhere=True)
    # transformers is for whoever has it: a model, a PEFT model.
    if path.name != "peft.py":
        assert not {"peft", "transformers"} & imported(tree, everywhere=True)


@pytest.mark.parametrize("path", python_files("lora_llama"), ids=lambda path: path.stem)
def test_lora_llama_imports_its_core_dependencies_alone(path: Path):
    names = imported(ast.parse(path.read_text()), everywhere=False)
    extras = {
        "training.py": {"accelerate"},
        "cli.py": {"jsonargparse", "yaml"},
        # transformers needs both.
        "samples.py": {"tqdm"},
        "training_state.py": {"numpy"},
    }
    assert names <= AT_IMPORT["lora_llama"] | extras.get(path.name, set())


def test_importing_lora_kernels_imports_nothing_heavy():
    loaded = run(
        "import sys, torch\nbefore = set(sys.modules)\nimport lora_kernels\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    ).split()
    assert "lora_kernels" in loaded
    assert not {"triton", "transformers", "peft", "accelerate"} & set(loaded)
    loaded = run("import sys, lora_kernels\nprint(*sys.modules)").split()
    heavy = ("triton", "torch._dynamo", "torch._inductor", "transformers", "peft")
    assert not [name for name in loaded if name.startswith(heavy)]


def test_importing_takes_less_than_a_fifth_of_a_second_beyond_torch():
    code = (
        "import time, torch\nstart = time.perf_counter()\nimport lora_kernels\n"
        "print(time.perf_counter() - start)"
    )
    seconds = sorted(float(run(code)) for _ in range(3))
    assert seconds[1] < 0.2, seconds


def test_without_triton_everything_runs_on_the_cpu():
    output = run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "import lora_kernels as lk\n"
        "layer = lk.LoraLinear.from_linear(torch.nn.Linear(8, 4), lk.LoraConfig(r=2))\n"
        "layer(torch.ones(3, 8)).sum().backward()\n"
        "assert layer.lora_B['default'].grad.any()\n"
        "q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4)\n"
        "table = torch.ones(1, 3, 4)\n"
        "assert lk.apply_rotary_pos_emb(q, k, table, table)[0].shape == q.shape\n"
        "print(lk.status(layer)[0].reason)\n"
        "try:\n"
        "    with lk.implementation('triton'):\n"
        "        layer(torch.ones(3, 8))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    assert output.splitlines() == [
        "triton is not installed",
        "impl='triton' cannot run here: triton is not installed",
    ]


def test_the_public_names_are_all_there():
    import lora_kernels
    import lora_llama

    for package in (lora_kernels, lora_llama):
        for name in package.__all__:
            assert getattr(package, name) is not None
        assert list(package.__all__) == sorted(package.__all__)
    assert lora_llama.LoraLlama is lora_llama.LoraLlamaForCausalLM


# What the sources never contain.


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_source_loads_a_pickle_or_evaluates_text(path: Path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {f"{origin}{alias.name}" for alias in node.names}
    forbidden = re.compile(
        r"(eval|exec|compile|__import__)|torch\.(load|save)|(np|numpy)\.load"
        r"|(c?pickle|_pickle|dill|cloudpickle|joblib|marshal|shelve)(\..*)?"
    )
    assert not [name for name in names if forbidden.fullmatch(name)]


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_source_says_what_it_is_for(path: Path):
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{path} has no docstring"


# The wheel.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that the build leaves nothing in the tree."""
    pytest.importorskip("build")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("lora_kernels", "model"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile):
    names = wheel.namelist()
    top_level = {name.split("/")[0] for name in names}
    (information,) = (name for name in top_level if name.endswith(".dist-info"))
    assert top_level == {"lora_kernels", "lora_llama", information}
    assert information.startswith("lora_kernels-")
    expected = {
        path.relative_to(root.parent).as_posix()
        for root in SOURCES.values()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(information)} == expected


def test_the_wheel_names_its_licence_its_command_and_its_dependencies(wheel: zipfile.ZipFile):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    text = wheel.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    required = {
        re.split(r"[<>=;\s]", line.removeprefix("Requires-Dist: "))[0]
        for line in text.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert required == {"torch", "triton", "transformers", "safetensors"}
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
    assert "lora-llama = lora_llama.cli:main" in wheel.read(entry_points).decode()


def test_the_wheel_imports_by_itself(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    where = run(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import lora_kernels, lora_llama\n"
        "print(lora_kernels.__file__, lora_llama.__file__)",
        str(tmp_path),
    )
    assert where.count(str(tmp_path)) == 2
