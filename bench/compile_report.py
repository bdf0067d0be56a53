"""Compiles every kernel configuration for GPUs that need not be present, and reports what came out.

    python -m bench.compile_report [--arch sm_89 gfx942] [--filter TEXT] [--quiet] [--json [FILE]]

Per kernel: registers per thread, spills, shared memory against the architecture's limit per block,
the blocks that fit one multiprocessor, and matrix instructions by kind. The exit code is 1 if a
kernel does not compile, spills or keeps a stack, exceeds a limit, or has a `tl.dot` of 16-bit or
tf32 operands without a matrix instruction. Triton's interpreter accepts code that the compiler
refuses, so this is a test too. What is compiled once stays in Triton's own cache.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_kernels.lora_linear.tables import SHARED_BYTES


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks of a multiprocessor (AMD: compute unit) share.

    Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD,
    "CDNA 3" and "CDNA 4 Instruction Set Architecture" and the occupancy model of LLVM's AMDGPU
    back end.

    Attributes:
        warp_size: threads of a warp (wavefront).
        registers: of one of the four partitions (SIMDs), times threads.
        warps, blocks: resident at most.
        shared: bytes for all blocks.
        reserved: bytes of `shared` that the system takes per block.
    """

    warp_size: int
    registers: int
    warps: int
    blocks: int
    shared: int
    reserved: int

    def resident_blocks(self, registers: int, shared: int, num_warps: int) -> int:
        """How many blocks fit at a time."""
        # Registers are handed out to whole warps, in units of 8 a thread.
        per_warp = max(-(-registers // 8), 1) * 8 * self.warp_size
        return min(
            self.blocks,
            self.warps // num_warps,
            4 * (self.registers // per_warp) // num_warps,
            self.shared // (shared + self.reserved) if shared + self.reserved else self.blocks,
        )


def _cuda(warps: int, blocks: int, shared: int) -> Multiprocessor:
    return Multiprocessor(32, 16_384, warps, blocks, shared * 1024, 1024)


MULTIPROCESSORS = {
    "sm_80": _cuda(64, 32, 164),
    "sm_86": _cuda(48, 16, 100),
    "sm_89": _cuda(48, 24, 100),
    "sm_90": _cuda(64, 32, 228),
    "sm_100": _cuda(64, 32, 228),
    "sm_120": _cuda(48, 24, 100),
    "gfx942": Multiprocessor(64, 512 * 64, 32, 32, SHARED_BYTES["gfx942"], 0),
    "gfx950": Multiprocessor(64, 512 * 64, 32, 32, SHARED_BYTES["gfx950"], 0),
}
# Its kernels are those of sm_89, to the tile.
LIKE_ANOTHER = ("sm_86",)
# Columns of the tensor memory of sm_100, which accumulators live in.
TENSOR_MEMORY = 512

CUDA_MATRIX = {"wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}
OPERATIONS = (
    "lora_linear.compile_cases", "lora_linear_mixed.compile_cases", "rope.triton_kernel",
    "rms_norm.triton_kernel", "swiglu.triton_kernel", "linear_cross_entropy.triton_kernel",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What one kernel compiled to, or the error.

    Attributes:
        spills: loads and stores of local memory in the machine code; AMD: vector registers spilled.
        scalar_spills: AMD's spilled scalar registers. They go to lanes of vector registers, not to
            memory, and are no fault.
        stack: bytes per thread of local memory.
        blocks: resident on one multiprocessor at a time.
        matrix: matrix instructions by kind.
    """

    arch: str
    name: str
    error: str | None = None
    registers: int = 0
    spills: int = 0
    scalar_spills: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    blocks: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    needs_matrix: bool = False

    @property
    def faults(self) -> list[str]:
        if self.error:
            return [self.error]
        faults = []
        if self.spills or self.stack:
            faults.append(f"{self.spills} spills, a stack of {self.stack} bytes")
        if self.shared > SHARED_BYTES[self.arch]:
            faults.append(f"shared memory {self.shared} > {SHARED_BYTES[self.arch]}")
        elif not self.blocks:
            faults.append("no block fits a multiprocessor")
        if self.tensor_memory > TENSOR_MEMORY:
            faults.append(f"tensor memory {self.tensor_memory} > {TENSOR_MEMORY} columns")
        if self.needs_matrix and not self.matrix:
            faults.append("no matrix instruction")
        return faults


@cache
def all_cases(arch: str) -> list:
    """The compile cases of every operation, for one architecture."""
    cases = []
    for name in OPERATIONS:
        module = import_module(f"lora_kernels.{name}")
        of_arch = (arch,) if name.startswith("lora_linear") else ()
        cases += module.compile_cases(*of_arch)
    return cases


def compile_indexed(arch: str, index: int) -> Result:
    """Compiles the index-th case of `arch`; cases hold functions, so only their index travels."""
    return compile_case(arch, all_cases(arch)[index])


def compile_case(arch: str, case: Any) -> Result:
    """Compiles a `CompileCase` for `arch` and reads off what came out."""
    import triton
    from triton.backends.compiler import GPUTarget

    machine = MULTIPROCESSORS[arch]
    of_cuda = arch.startswith("sm_")
    name = int(arch.removeprefix("sm_")) if of_cuda else arch
    target = GPUTarget("cuda" if of_cuda else "hip", name, machine.warp_size)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        kernel = triton.compile(case.source(), target=target, options=options)
    except Exception as error:
        return Result(arch, case.name, f"{type(error).__name__}: {str(error).strip()[:500]}")
    found = (_of_cuda if of_cuda else _of_amd)(kernel)
    return Result(
        arch,
        case.name,
        **found,
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        blocks=machine.resident_blocks(found["registers"], kernel.metadata.shared, case.num_warps),
        needs_matrix=needs_matrix(kernel.asm["ttir"]),
    )


def needs_matrix(ttir: str) -> bool:
    """Whether a dot has operands that matrix instructions take: 16 bits wide, or tf32."""
    dots = (line for line in ttir.splitlines() if "tt.dot " in line)
    return any(re.search(r"xb?f16>|inputPrecision = tf32", line) for line in dots)


def _of_cuda(kernel: Any) -> dict[str, Any]:
    """Registers, spills, stack and matrix instructions."""
    usage = cuobjdump("-res-usage", kernel.asm["cubin"])
    stack = _number(r"STACK:(\d+)", usage)
    # Spilling takes a stack frame. Only then is the slow disassembly worth its time.
    machine_code = cuobjdump("-sass", kernel.asm["cubin"]) if stack else ""
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", machine_code)),
        "stack": stack,
        "matrix": _counts(CUDA_MATRIX, kernel.asm["ptx"]),
    }


def _of_amd(kernel: Any) -> dict[str, Any]:
    """The same, from the metadata in the assembly."""
    assembly = kernel.asm["amdgcn"]
    keys = {
        "registers": "vgpr_count", "spills": "vgpr_spill_count",
        "scalar_spills": "sgpr_spill_count", "stack": "private_segment_fixed_size",
    }  # fmt: skip
    values = {name: _number(rf"\.{key}:\s+(\d+)", assembly) for name, key in keys.items()}
    return {**values, "matrix": _counts({"mfma": r"\bv_mfma_"}, assembly)}


def _counts(patterns: dict[str, str], text: str) -> dict[str, int]:
    found = {kind: len(re.findall(pattern, text)) for kind, pattern in patterns.items()}
    return {kind: count for kind, count in found.items() if count}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in what a compiler tool printed"
    return int(found[1])


def cuobjdump(option: str, cubin: bytes) -> str:
    """What the bundled cuobjdump prints of a compiled kernel."""
    import triton.backends.nvidia as nvidia

    tool = str(Path(nvidia.__path__[0]) / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def line(result: Result) -> str:
    """A result as it is printed."""
    if result.error:
        return f"{result.arch:6} {result.name:64} FAULT: {result.error}"
    matrix = ", ".join(f"{count} {kind}" for kind, count in result.matrix.items()) or "no matrix"
    return (
        f"{result.arch:6} {result.name:64} {result.registers:3} registers {result.spills:3} spills "
        f"{result.shared:6} B shared {result.blocks:2} blocks {matrix:12} "
        f"{'FAULT: ' + '; '.join(result.faults) if result.faults else 'ok'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    archs = [arch for arch in MULTIPROCESSORS if arch not in LIKE_ANOTHER]
    parser.add_argument("--arch", nargs="+", choices=list(MULTIPROCESSORS), default=archs)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write the results as JSON, to FILE or in place of the lines",
    )  # fmt: skip
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
        results = list(pool.map(compile_indexed, *zip(*jobs, strict=True))) if jobs else []
    content = json.dumps([asdict(result) for result in results], indent=1)
    faulty = sum(bool(result.faults) for result in results)
    if arguments.json == "-":
        print(content)
        return 1 if faulty or not results else 0
    for result in results:
        if result.faults or not arguments.quiet:
            print(line(result))
    print(f"{len(results)} kernels compiled for {', '.join(arguments.arch)}: {faulty} faulty")
    if arguments.json:
        Path(arguments.json).write_text(content)
    return 1 if faulty or not results else 0


if __name__ == "__main__":
    sys.exit(main())
