"""The machine of a run: what it is, and the two rates that bound every figure measured on it.

    floor = max(FLOPs / matmul rate, bytes / copy bandwidth)

Both rates are measured in the run itself, so that the share of the floor that is reached compares
figures of one machine in one state.
"""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "pytest-benchmark")

# Square sizes: large enough for a library's best, small enough for seconds at most.
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
# What a sample's inputs exceed together. A CPU's is its second level: the third is shared with
# whatever else the machine does.
CPU_CACHE_BYTES = 32 << 20


def bench_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and the commit of this run, as JSON."""
    content: dict[str, Any] = {
        "name": device_name(device),
        "device": device.type,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S%z"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        content["gpu"] = {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            or "unknown",
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return content


def ceilings(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, Any]:
    """{"matmul": FLOP/s by dtype, "copy": bytes/s read and written}, each the best of five."""
    size = MATMUL_SIZE[device.type]
    matmul = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds = best_of_five(partial(torch.mm, a, b), device)
        matmul[name_of(dtype)] = 2 * size**3 / seconds
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / best_of_five(lambda: target.copy_(source), device)
    return {"matmul": matmul, "copy": copy}


def best_of_five(work: Callable[[], Any], device: torch.device) -> float:
    """The least seconds of five runs after one to warm up."""
    samples = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    return min(samples[1:])


def native_16bit(rates: dict[str, Any]) -> bool:
    """Whether bfloat16 products are the hardware's own: no slower than float32's, as measured."""
    return rates["matmul"]["bfloat16"] >= rates["matmul"]["float32"]


def cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return CPU_CACHE_BYTES


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def cpu_name() -> str:
    """The processor's model and number of cores."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        model = found[1] if found else model
    return f"{model} {os.cpu_count()} cores"


def result_stem(machine: dict[str, Any]) -> str:
    """The name of a run's files: <gpu or cpu name>-<date>-<commit>."""
    name = re.sub(r"\((?:R|TM|C)\)", "", machine["name"])
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{slug}-{machine['date']}-{machine['commit']}"


def commit() -> str:
    """The commit's short hash, with "-dirty" where tracked files differ from it."""
    hash_ = output_of("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if not hash_:
        return "unknown"
    changed = output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{hash_}-dirty" if changed else hash_


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
