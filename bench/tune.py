"""Writes the tables of tiles: timed on the GPU at hand, or untimed by compiling the candidates.

    python -m bench.tune [--minutes 20] [--restart]       times, on a GPU
    python -m bench.tune --arch sm_90 [gfx942 ...]        compiles only, anywhere

Untimed, an entry is for each kernel the first of the candidates (`tune_candidates.py`) that
compiles without a fault, and its method is left to the plan's rule. Timed, the shapes of
SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B get entries of their own: of each kernel the fastest
configuration whose result is right, and the method with the least time in all. Samples are CUDA
graphs of calls on inputs that together exceed the L2 cache, in rounds that interleave the variants
(`harness.py`). What is timed is kept in build/, and a run that was cut off goes on from there.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.harness import Call, graphed_variants, interleave
from bench.machine import ROOT, cache_bytes, commit, installed
from bench.shapes import GROUPS, LLAMA_1B, LLAMA_8B, SMOLLM2
from bench.tune_candidates import PARTS, RATES, Fitting, adapted, fitting, untimed_table
from bench.tune_problem import Bucket, Checker, Tensors, run
from lora_kernels.lora_linear.compile_cases import Config
from lora_kernels.lora_linear.op import architecture
from lora_kernels.lora_linear.plan import DECODE_MAX_ROWS
from lora_kernels.lora_linear.tables import (
    FOLDER,
    DecodeConfig,
    Entry,
    PassConfig,
    Table,
    rank_class,
    write_table,
)

TIMED_ROWS = (2048, 8192, 512, 16, 1)
TIMED_RANKS = (16, 64)
MAX_INPUT_SETS = 16
SAMPLE_SECONDS = 0.3
Timer = Callable[[Mapping[str, Call], int], dict[str, float]]
Launch = Callable[[str, Config | None, Tensors], list[torch.Tensor]]


def buckets() -> list[Bucket]:
    """The shapes to time, those first that matter most in training."""
    shapes = [
        model.projections(group) for model in (LLAMA_8B, LLAMA_1B, SMOLLM2) for group in GROUPS
    ]
    return [Bucket(m, tuple(n), k, r) for m, r, (k, n) in product(TIMED_ROWS, TIMED_RANKS, shapes)]


def gpu_timer(calls: Mapping[str, Call], inputs: int) -> dict[str, float]:
    """Seconds of one call by name; without those that no CUDA graph can hold."""
    variants, _ = graphed_variants(calls, inputs)
    samples = interleave(variants, SAMPLE_SECONDS)
    return {name: median(of_variant) for name, of_variant in samples.items()}


@dataclass
class Tuner:
    """Times buckets until the deadline, and keeps what was timed in a file.

    Attributes:
        times: by bucket, by part, by configuration (as JSON): seconds.
        faults: what was left out, and why.
    """

    found: Fitting
    device: torch.device
    state: Path
    header: dict[str, str]
    timer: Timer = gpu_timer
    launch: Launch = run
    dtype: torch.dtype = torch.bfloat16
    processors: int = 1
    times: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def resume(self) -> None:
        """Takes over what an earlier run timed on the same GPU with the same software."""
        if self.state.is_file():
            content = json.loads(self.state.read_text())
            if content["header"] == self.header:
                self.times = content["times"]

    def save(self) -> None:
        self.state.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.state.with_suffix(".tmp")
        temporary.write_text(json.dumps({"header": self.header, "times": self.times}))
        os.replace(temporary, self.state)

    def tune(
        self, wanted: list[Bucket], deadline: float, clock: Callable[[], float] = time.monotonic
    ) -> list[Entry]:
        """The entries of the buckets timed so far; none is begun after the deadline."""
        for bucket in wanted:
            if bucket.key not in self.times:
                if clock() >= deadline:
                    break
                try:
                    self.times[bucket.key] = self.timed(bucket)
                except RuntimeError as error:
                    # Too little memory for this shape, say; the next may fit.
                    self.faults.append(f"{bucket.key}: {str(error).partition(chr(10))[0]}")
                    continue
                self.save()
                print(f"{bucket.key}: {self.entry(bucket).method}", flush=True)
        return [self.entry(bucket) for bucket in wanted if bucket.key in self.times]

    def timed(self, bucket: Bucket) -> dict[str, dict[str, float]]:
        checker = Checker(bucket, self.dtype, self.device)
        first = Tensors.draw(bucket, self.dtype, self.device)
        count = 1
        if self.device.type == "cuda":
            count = min(MAX_INPUT_SETS, -(-2 * cache_bytes(self.device) // first.bytes))
        sets = [first, *(Tensors.draw(bucket, self.dtype, self.device, i) for i in range(1, count))]
        times = {
            part: self.timer({"": self.call_of(part, None, sets)}, count)
            for part in ("library_forward", "library_backward")
        }
        n = sum(bucket.n)
        for part in PARTS:
            if part == "decode" and bucket.m > DECODE_MAX_ROWS:
                continue
            tiles = [
                adapted(part, config, bucket.m, n, bucket.k, bucket.r, self.processors)
                for config in self.found[part, bucket.r]
            ]
            times[part] = self.timed_part(bucket, part, tiles, checker, sets)
            if times[part]:
                best = config_of(part, min(times[part], key=times[part].__getitem__))
                others = [config for config in refined(part, best, bucket) if config != best]
                times[part] |= self.timed_part(bucket, part, others, checker, sets)
        return times

    def timed_part(
        self,
        bucket: Bucket,
        part: str,
        configs: list[Config],
        checker: Checker,
        sets: list[Tensors],
    ) -> dict[str, float]:
        calls: dict[str, Call] = {}
        for config in configs:
            if fault := checker.fault(part, config, self.launch):
                self.faults.append(f"{bucket.key}: {part} {config}: {fault}")
            else:
                calls[json.dumps(asdict(config))] = self.call_of(part, config, sets)
        return self.timer(calls, len(sets)) if calls else {}

    def call_of(self, part: str, config: Config | None, sets: list[Tensors]) -> Call:
        return lambda index: self.launch(part, config, sets[index % len(sets)])

    def entry(self, bucket: Bucket) -> Entry:
        """The fastest configuration of each kernel, and the method with the least time in all."""
        times = self.times[bucket.key]
        best = {part: min(times.get(part, {}).values(), default=math.inf) for part in PARTS}
        forward = {
            "one_pass": min(best["one_pass"], best["decode"]),
            "split": best["shrink"] + best["split"],
            "library": times["library_forward"].get("", math.inf),
        }
        if bucket.m > DECODE_MAX_ROWS:
            backward = best["dy_b"] + best["dx"] + best["d_a"]
            forward["one_pass"] += backward
            forward["split"] += backward
            forward["library"] += times["library_backward"].get("", math.inf)
        chosen = {
            part: config_of(part, min(of_part, key=of_part.__getitem__))
            for part in PARTS
            if (of_part := times.get(part))
        }
        for part in PARTS:
            if part not in chosen:
                config = self.found[part, bucket.r][0]
                chosen[part] = adapted(
                    part, config, bucket.m, sum(bucket.n), bucket.k, bucket.r, self.processors
                )
        method = min(forward, key=forward.__getitem__)
        if math.isinf(forward[method]):
            method = "auto"
        parts: dict[str, Any] = chosen
        return Entry(16, bucket.m, sum(bucket.n), bucket.k, bucket.r, method, **parts)


def config_of(part: str, text: str) -> Config:
    kinds = {field.name: field.type for field in Entry.__dataclass_fields__.values()}
    kind: Any = kinds[part]
    return kind(**json.loads(text))


def refined(part: str, best: Config, bucket: Bucket) -> list[Config]:
    """The best tiles with other numbers of chunks or splits."""
    if isinstance(best, DecodeConfig):
        steps = bucket.k // best.block_k
        return [replace(best, splits=splits) for splits in (1, 2, 4, 8, 16) if splits <= steps]
    if isinstance(best, PassConfig) and part != "shrink":
        return [replace(best, chunk=chunk) for chunk in (128, 256, 512, 1024)]
    return []


def timed_table(arch: str, rates: Mapping[str, float], measured: dict[str, str],
                timed: list[Entry], found: Fitting) -> Table:  # fmt: skip
    """The timed entries, and of the ranks and sizes that have none the untimed ones."""
    have = {rank_class(entry.r) for entry in timed}
    rest = [e for e in untimed_table(arch, found).entries if rank_class(e.r) not in have]
    return Table(
        arch, rates["flops"], rates["bytes_per_second"], int(rates["multiprocessors"]),
        measured=measured, entries=(*timed, *rest),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=list(RATES), help="compile only, for these")
    parser.add_argument("--minutes", type=float, default=20.0, help="no shape is begun later")
    parser.add_argument("--restart", action="store_true", help="time everything anew")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the tables are written")
    arguments = parser.parse_args()
    for arch in arguments.arch or ():
        write_table(untimed_table(arch, fitting(arch)), arguments.folder / f"{arch}.json")
        print(f"wrote {arguments.folder / f'{arch}.json'}, untimed", flush=True)
    if arguments.arch:
        return 0
    if not torch.cuda.is_available():
        print("no GPU: name the architectures to compile for with --arch")
        return 2
    return tune_here(arguments.minutes, arguments.restart, arguments.folder)


def tune_here(minutes: float, restart: bool, folder: Path) -> int:
    """Times on this GPU and writes its architecture's table."""
    from bench.machine import ceilings

    begin = time.monotonic()
    device = torch.device("cuda")
    arch, properties = architecture(device), torch.cuda.get_device_properties(device)
    if arch not in RATES:
        print(f"{arch}: no candidates; known are {', '.join(RATES)}")
        return 2
    header = {
        "gpu": properties.name, "torch": torch.__version__, "triton": installed("triton") or "",
        "commit": commit(),
    }  # fmt: skip
    found = fitting(arch)
    tuner = Tuner(
        found, device, ROOT / "build" / f"tune-{arch}.json", header,
        processors=properties.multi_processor_count,
    )  # fmt: skip
    if not restart:
        tuner.resume()
    wanted = buckets()
    entries = tuner.tune(wanted, begin + 60 * minutes)
    for fault in tuner.faults:
        print(f"left out: {fault}")
    if not entries:
        print("no shape was timed, so no table is written")
        return 1
    reached = ceilings(device, [torch.bfloat16])
    rates = {
        "flops": reached["matmul"]["bfloat16"],
        "bytes_per_second": reached["copy"],
        "multiprocessors": properties.multi_processor_count,
    }
    measured = header | {"date": time.strftime("%Y-%m-%d")}
    write_table(timed_table(arch, rates, measured, entries, found), folder / f"{arch}.json")
    print(f"wrote {folder / f'{arch}.json'}: {len(entries)} of {len(wanted)} shapes timed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
