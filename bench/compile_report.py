"""Compiles every kernel configuration for GPUs that need not be present, and reports what came out.

    python -m bench.compile_report [--arch sm_89 sm_90] [--json FILE] [--filter TEXT]

Per kernel: registers per thread, spills (local-memory loads and stores in the machine code), shared
memory against the architecture's limit per block, and matrix instructions. The exit code is 1 if a
kernel does not compile, spills, exceeds the shared memory or has a `tl.dot` without a matrix
instruction. Triton's interpreter accepts code that the compiler refuses, so this is a test too.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

# Shared memory per block, in bytes: CUDA C++ Programming Guide, compute capabilities.
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_120": 101_376}


@dataclass(frozen=True)
class Result:
    arch: str
    name: str
    error: str | None
    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix: int = 0
    needs_matrix: bool = False

    @property
    def faults(self) -> list[str]:
        if self.error:
            return [self.error]
        faults = []
        if self.spills:
            faults.append(f"{self.spills} spills")
        if self.shared > SHARED_LIMIT[self.arch]:
            faults.append(f"shared memory {self.shared} > {SHARED_LIMIT[self.arch]}")
        if self.needs_matrix and not self.matrix:
            faults.append("no matrix instruction")
        return faults


@cache
def all_cases(arch: str) -> list:
    """The compile cases of every operation, for one architecture."""
    from lora_kernels.lora_linear.compile_cases import compile_cases as lora_linear_cases
    from lora_kernels.rope.triton_kernel import compile_cases as rope_cases

    return [*lora_linear_cases(arch), *rope_cases()]


def compile_one(arch: str, index: int) -> Result:
    """Compiles the index-th case of `arch`; cases hold functions, so only their index travels."""
    import triton
    from triton.backends.compiler import GPUTarget

    case = all_cases(arch)[index]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        kernel = triton.compile(
            case.source(),
            target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
            options=options,
        )
    except Exception as error:
        return Result(arch, case.name, f"{type(error).__name__}: {str(error).strip()[:500]}")
    usage = cuobjdump("-res-usage", kernel.asm["cubin"])
    # Spilling takes a stack frame. Only then is the slow disassembly worth its time.
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    machine_code = cuobjdump("-sass", kernel.asm["cubin"]) if stack else ""
    return Result(
        arch,
        case.name,
        None,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", machine_code)),
        shared=kernel.metadata.shared,
        matrix=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", kernel.asm["ptx"])),
        needs_matrix="tt.dot" in kernel.asm["ttir"],
    )


def cuobjdump(option: str, cubin: bytes) -> str:
    """What the bundled cuobjdump prints of a compiled kernel."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--filter", default="", help="only kernels whose name contains this")
    parser.add_argument("--quiet", action="store_true", help="print the faulty kernels alone")
    arguments = parser.parse_args()
    # Interpreted kernels cannot be compiled.
    os.environ["TRITON_INTERPRET"] = "0"

    jobs = [
        (arch, index)
        for arch in arguments.arch
        for index, case in enumerate(all_cases(arch))
        if arguments.filter in case.name
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compile_one, *zip(*jobs, strict=True))) if jobs else []
    for result in results:
        if result.faults or not arguments.quiet:
            print(
                f"{result.arch:6} {result.name:60} {result.registers:4} registers "
                f"{result.spills:4} spills {result.shared:7} B shared {result.matrix:4} matrix "
                f"{'FAULT: ' + '; '.join(result.faults) if result.faults else 'ok'}"
            )
    faulty = sum(bool(result.faults) for result in results)
    print(f"{len(results)} kernels compiled for {', '.join(arguments.arch)}: {faulty} faulty")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 1 if faulty or not results else 0


if __name__ == "__main__":
    sys.exit(main())
