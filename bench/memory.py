"""Peak memory of a training step by sequence length, one peer a process on a CPU.

    python -m bench.memory PEER CASE [LENGTH ...]      prints {"length": bytes} as JSON

On a CPU it is the process's largest resident set (VmHWM) over a step at each length, reset
before it (Linux: 5 written to /proc/self/clear_refs), less what the process had before it built
the model: weights, adapter, activations and gradients, without Python and torch. glibc is told to
give every larger block back at once, so that the figure is the step's own and no earlier step's
leavings. On a GPU it is the allocator's peak, measured in place.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT, bench_device
from bench.measure import own_bytes, peak_bytes
from bench.models import build_base, build_peer, draw_adapters, draw_tokens
from bench.shapes import LlamaShape, StepCase

# Peers whose curves are drawn.
MEMORY_PEERS = ("frozen", "peft", "addmm", "ours")
TIMEOUT_SECONDS = 240
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_by_length(
    case: StepCase, lengths: Iterable[int], device: torch.device, peers: Iterable[str]
) -> list[dict[str, Any]]:
    """[{"peer", "model", "dtype", "tokens", "peak_bytes"} or with "fault"], for all peers.

    A CPU measures the peers in processes of one thread, as many at once as there are cores: memory
    does not depend on who else computes.
    """
    lengths = list(lengths)
    names = list(peers)
    if device.type == "cuda":
        measured = [_cuda_peaks(name, case, lengths, device) for name in names]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            measured = list(pool.map(lambda name: _process_peaks(name, case, lengths), names))
    return [
        {"peer": name, "model": case.shape.name, "dtype": case.dtype, **entry}
        for name, entries in zip(names, measured, strict=True)
        for entry in entries
    ]


def _process_peaks(name: str, case: StepCase, lengths: list[int]) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", "bench.memory", name, json.dumps(asdict(case))]
    try:
        done = subprocess.run(
            [*command, *map(str, lengths)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return [{"fault": f"took more than {TIMEOUT_SECONDS} s"}]
    if done.returncode:
        return [{"fault": (done.stderr.strip().splitlines() or ["no message"])[-1]}]
    peaks = json.loads(done.stdout.splitlines()[-1])
    return [{"tokens": int(length), "peak_bytes": peak} for length, peak in peaks.items()]


def _cuda_peaks(
    name: str, case: StepCase, lengths: list[int], device: torch.device
) -> list[dict[str, Any]]:
    base = build_base(case, device)
    adapters = draw_adapters(base, case.r)
    entries: list[dict[str, Any]] = []
    for length in lengths:
        ids = draw_tokens(replace(case, length=length), base.config.vocab_size, device)
        peer = build_peer(name, base, adapters, ids)
        peer.step()
        peer.release()
        peak = peak_bytes(peer.step, device)
        entries.append({"tokens": case.batch * length, "peak_bytes": (peak or 0) + own_bytes(peer)})
    return entries


def resident_peak() -> int:
    """The largest resident set since the last reset, in bytes."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS}: no VmHWM")
    return int(found[1]) * 1024


def reset_resident_peak() -> None:
    """OSError: the system has no such thing, or does not allow it."""
    CLEAR_REFS.write_text("5")


def main() -> None:
    name, content, *lengths = sys.argv[1:]
    fields = json.loads(content)
    case = StepCase(**{**fields, "shape": LlamaShape(**fields["shape"])})
    device = bench_device()
    # Code is no step's memory, whichever peer needs it.
    for module in ("peft", "lora_llama"):
        importlib.import_module(module)
    # A first product makes the library set up its threads and buffers, which are no step's.
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    reset_resident_peak()
    before = resident_peak()
    base = build_base(case, device)
    adapters = draw_adapters(base, case.r)
    peaks = {}
    for length in map(int, lengths):
        ids = draw_tokens(replace(case, length=length), base.config.vocab_size, device)
        peer = build_peer(name, base, adapters, ids)
        reset_resident_peak()
        peer.step()
        peaks[case.batch * length] = resident_peak() - before
        del peer
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
