"""A LoRA adapter on disk: PEFT's two files, read and written without PEFT.

    adapter_config.json            LoraConfig.to_dict()
    adapter_model.safetensors      base_model.model.<module>.lora_A.weight   [r, in]
                                   base_model.model.<module>.lora_B.weight   [out, r]
                                   and what the config asks for beside them (`adapter_state.py`)

Nothing else is read, nothing is executed, and no file outside the adapter's directory is opened.
What cannot be right is an error that names the file and the keys; no tensor is skipped.

A save replaces both files or neither, whenever the process or the machine stops. Each step is on
disk before the next begins:

    1. adapter_model.safetensors.new is written       both .new there, or only that of the
    2. adapter_config.json.new is written             tensors: the save did not happen
    3. it replaces adapter_model.safetensors          only adapter_config.json.new there: the
    4. it replaces adapter_config.json                save happened, and that is the config

Step 3 decides. Reading changes nothing on disk and takes the config that belongs to the tensors;
the next save first finishes, or clears away, an interrupted one.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from lora_kernels.config import LoraConfig, validate_adapter_name
from lora_kernels.field_checks import listed
from lora_kernels.name_patterns import Budget
from lora_kernels.safetensors_header import outlines, read_header
from lora_kernels.strict_json import parse_object

EMBEDDING_NAMES = ("embed_tokens", "lm_head")

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"

_KEY_PREFIX = "base_model.model."
_MARKS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_CONFIG_BYTES = 1 << 20
_MAX_FAULTS = 1000
# Each is looked for in every key.
_MAX_MODULES_TO_SAVE = 256


def adapter_directory(root: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where PEFT keeps an adapter below `root`: "default" in root itself, others in their name.

    Raises:
        TypeError, ValueError: `adapter_name` is not a valid name.
    """
    validate_adapter_name(adapter_name)
    return Path(root) if adapter_name == "default" else Path(root) / adapter_name


def save_adapter(
    directory: str | os.PathLike[str], config: LoraConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes an adapter that `load_adapter` and PEFT read, all of it or nothing.

    Args:
        directory: created if missing; an adapter in it is replaced.
        config: the adapter's config.
        tensors: "<module>.lora_A.weight" [r, in] and "<module>.lora_B.weight" [out, r], float16,
            bfloat16, float32 or float64 on any device, and the others that `adapter_state.py`
            names; written contiguous, in their own dtype.

    Raises:
        ValueError: the tensors are not an adapter of this config, as in `load_adapter`.
        OSError: the directory cannot be written; an adapter that was there is unchanged.
    """
    directory = Path(directory)
    _check_tensors(f"adapter for {directory}", config, tensors)
    _check_finite(f"adapter for {directory}", tensors)
    # A copy also where none is needed: safetensors refuses tensors that share memory.
    on_cpu = {
        f"{_KEY_PREFIX}{key}": tensor.detach().to(
            "cpu", copy=True, memory_format=torch.contiguous_format
        )
        for key, tensor in tensors.items()
    }
    # Not json's own sort_keys, which would reorder the patterns, where the first match counts.
    config_text = json.dumps(config.to_dict(), indent=2, allow_nan=False)

    new_config, new_tensors = directory / f"{CONFIG_NAME}.new", directory / f"{TENSORS_NAME}.new"
    directory.mkdir(parents=True, exist_ok=True)
    _settle_interrupted_save(directory)
    try:
        _write(new_tensors, serialize(on_cpu, metadata={"format": "pt"}))
        _write(new_config, config_text.encode())
        os.replace(new_tensors, directory / TENSORS_NAME)
    except Exception:
        with contextlib.suppress(OSError):
            _discard_new_files(directory)
        raise
    _sync_directory(directory)
    os.replace(new_config, directory / CONFIG_NAME)
    _sync_directory(directory)


def load_adapter(
    directory: str | os.PathLike[str],
    check: Callable[[LoraConfig, Mapping[str, torch.Tensor]], None] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Reads an adapter that `save_adapter` or PEFT wrote.

    Both files are bounded (`safetensors_header.py`, 1 MiB of config), and their keys and shapes
    are checked before any data are read.

    Args:
        check: a further check, which is called before the data are read, with the config and the
            tensors on the meta device.

    Returns:
        The config, and CPU tensors "<module>.lora_A.weight" [r, in], "<module>.lora_B.weight" [out,
        r] and what else is there, in the dtypes of the file.

    Raises:
        FileNotFoundError: the directory or one of its two files is missing.
        ValueError: a file is not a regular file inside the directory; the config is not JSON, not
            LoRA, or not supported; the tensors are corrupt, not finite, or not exactly an A and B
            of the config's rank for every module with what the config asks for. The message names
            the file and keys (the first thousand of them). Whatever `check` raises.
    """
    config, _, tensors_path = _checked(Path(directory), check)
    tensors = _read_tensors(tensors_path)
    _check_finite(str(tensors_path), tensors)
    return config, tensors


def read_adapter_outline(
    directory: str | os.PathLike[str],
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """What `load_adapter` knows before it reads data: the config, and tensors without memory.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`, for all but the values.
    """
    return _checked(Path(directory))[:2]


def _checked(
    directory: Path,
    check: Callable[[LoraConfig, Mapping[str, torch.Tensor]], None] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor], Path]:
    """The config, the tensors on the meta device and their file, all that needs no data checked."""
    if not directory.is_dir():
        fault = "is not a directory" if directory.exists() else "is missing"
        raise FileNotFoundError(f"adapter directory {str(directory)!r} {fault}")
    config_path = _config_path(directory)
    if not os.path.lexists(directory / TENSORS_NAME):
        message = f"{str(directory / TENSORS_NAME)!r} is missing"
        if os.path.lexists(directory / "adapter_model.bin"):
            message += (
                "; adapter_model.bin is a pickle, and pickles can run code and are never loaded: "
                "load it with PEFT where you trust it, and save_pretrained(safe_serialization=True)"
            )
        raise FileNotFoundError(message)
    tensors_path = _checked_path(directory, TENSORS_NAME)
    config = _read_config(config_path)
    found = _read_outlines(tensors_path)
    _check_tensors(str(tensors_path), config, found)
    if check is not None:
        check(config, found)
    return config, found, tensors_path


def _checked_path(directory: Path, name: str) -> Path:
    """The file's path, links followed, if it is a regular file inside `directory`."""
    path = directory / name
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{str(path)!r} is missing")
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(directory)):
        raise ValueError(
            f"{str(path)!r} is a link to {str(target)!r}, outside the adapter's directory; "
            "copy the files there (for a model hub's cache: download to a local directory)"
        )
    if not target.is_file():
        raise ValueError(f"{str(path)!r} is not a regular file")
    return target


def _config_path(directory: Path) -> Path:
    """The config that belongs to the tensors, also after a save that stopped half-way."""
    if not _committed_config_is_new(directory):
        return _checked_path(directory, CONFIG_NAME)
    config = _checked_path(directory, f"{CONFIG_NAME}.new")
    tensors = directory / TENSORS_NAME
    if tensors.exists() and tensors.stat().st_mtime_ns > config.stat().st_mtime_ns:
        # Our tensors are older than the config that follows them: another program wrote these.
        raise ValueError(
            f"{str(tensors)!r} is newer than {config.name}, which an interrupted save left: "
            f"keep either that or {CONFIG_NAME}, whichever belongs to the tensors"
        )
    return config


def _committed_config_is_new(directory: Path) -> bool:
    return os.path.lexists(directory / f"{CONFIG_NAME}.new") and not os.path.lexists(
        directory / f"{TENSORS_NAME}.new"
    )


def _settle_interrupted_save(directory: Path) -> None:
    if _committed_config_is_new(directory):
        os.replace(directory / f"{CONFIG_NAME}.new", directory / CONFIG_NAME)
        _sync_directory(directory)
    else:
        _discard_new_files(directory)


def _discard_new_files(directory: Path) -> None:
    # The config first, and on disk: alone it would count as that of a finished save.
    (directory / f"{CONFIG_NAME}.new").unlink(missing_ok=True)
    _sync_directory(directory)
    (directory / f"{TENSORS_NAME}.new").unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    try:
        # "x" creates: a link that someone put at this name is not followed.
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(directory)) from error
    finally:
        os.close(descriptor)


def _read_config(path: Path) -> LoraConfig:
    with open(path, "rb") as file:
        content = file.read(_MAX_CONFIG_BYTES + 1)
    try:
        if len(content) > _MAX_CONFIG_BYTES:
            raise ValueError(f"expected at most {_MAX_CONFIG_BYTES} bytes, got more")
        parsed = parse_object(content)
        if "peft_type" not in parsed:
            raise ValueError("peft_type: expected 'LORA', got no such key")
        saved = parsed.get("modules_to_save")
        if isinstance(saved, list) and len(saved) > _MAX_MODULES_TO_SAVE:
            raise ValueError(
                f"modules_to_save: expected at most {_MAX_MODULES_TO_SAVE} names, got {len(saved)}"
            )
        return LoraConfig.from_dict(parsed)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def _read_outlines(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that the header promises, without their data."""
    try:
        found = outlines(read_header(path))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a valid safetensors file: {error}") from error
    unexpected = [key for key in found if not key.startswith(_KEY_PREFIX)]
    if unexpected:
        raise ValueError(
            f"{str(path)!r}: expected keys {_KEY_PREFIX}<name>, got {listed(unexpected)}"
        )
    return {key.removeprefix(_KEY_PREFIX): tensor for key, tensor in found.items()}


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned, because what safetensors returns is a view of the file and changes with it.
            return {
                key.removeprefix(_KEY_PREFIX): file.get_tensor(key).clone() for key in file.keys()
            }
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a valid safetensors file: {error}") from error


def _check_tensors(source: str, config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    modules = dict.fromkeys(
        key.removesuffix(mark) for key in tensors for mark in _MARKS if key.endswith(mark)
    )
    expected = {
        f"{module}{mark}": module
        for module in modules
        for mark, wanted in zip(
            _MARKS, (True, True, config.lora_bias, config.use_dora), strict=True
        )
        if wanted
    }
    unexpected = [key for key in tensors if key not in expected and not _belongs(key, config)]
    if unexpected:
        raise ValueError(
            f"{source}: expected keys <module>.lora_A.weight and .lora_B.weight, and others where "
            f"the config has bias, lora_bias, use_dora or modules_to_save, got {listed(unexpected)}"
        )
    if not modules:
        raise ValueError(f"{source}: expected LoRA tensors, got none")
    try:
        budget = Budget()
        ranks = {module: config.rank_for(module, budget) for module in modules}
        for module in modules:
            config.alpha_for(module, budget)
    except ValueError as error:
        raise ValueError(f"{source}: rank_pattern, alpha_pattern: {error}") from error
    faults = []
    for key, module in expected.items():
        if key not in tensors:
            beside = next(f"{module}{mark}" for mark in _MARKS if f"{module}{mark}" in tensors)
            faults.append(f"{beside}: expected {key} beside it, got none")
    for key, tensor in tensors.items():
        floating = tensor.dtype in _DTYPES
        if key in expected and (fault := _shape_fault(key, expected[key], ranks, tensors)):
            faults.append(f"{key}: {fault}")
        elif not floating and (key in expected or tensor.is_floating_point()):
            faults.append(f"{key}: expected a float of 16, 32 or 64 bits, got {tensor.dtype}")
    _raise_all(source, faults)


def _check_finite(source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    faults = [
        f"{key}: expected finite values, got NaN or infinity"
        for key, tensor in tensors.items()
        if tensor.dtype in _DTYPES and not torch.isfinite(tensor).all()
    ]
    _raise_all(source, faults)


def _raise_all(source: str, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        raise ValueError(f"{source}: {'; '.join(faults[:_MAX_FAULTS])}{more}")


def _shape_fault(
    key: str, module: str, ranks: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> str | None:
    """What is wrong with the shape of one of a layer's own tensors."""
    shape = list(tensors[key].shape)
    is_a = key.endswith(".lora_A.weight")
    if not is_a and not key.endswith(".lora_B.weight"):
        lora_b = tensors.get(f"{module}.lora_B.weight")
        if lora_b is not None and lora_b.dim() == 2 and shape != [lora_b.shape[0]]:
            return f"expected shape {[lora_b.shape[0]]}, got {shape}"
        return None
    if len(shape) != 2 or 0 in shape:
        return f"expected a non-empty matrix, got shape {shape}"
    rank, expected = shape[0 if is_a else 1], ranks[module]
    return None if rank == expected else f"expected rank {expected}, got {rank} ({shape})"


def _belongs(key: str, config: LoraConfig) -> bool:
    """Whether the config asks for a tensor that is not a layer's own; a model decides for sure."""
    module, _, name = key.rpartition(".")
    if config.bias != "none" and name == "bias":
        return True
    if module.removesuffix(".base_layer") != module and name in ("weight", "bias"):
        # PEFT adds the base weight of a targeted embedding or head.
        return module.removesuffix(".base_layer").rpartition(".")[2] in EMBEDDING_NAMES
    # Where a part of the key's path ends with an entry, the entry has a dot behind it.
    return any(f"{entry}." in key for entry in config.modules_to_save or ())
