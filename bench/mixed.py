"""What rows under different adapters cost: a mixed batch against one adapter for all its rows.

    python -m bench.mixed [--sizes full|tiny] [--seconds SECONDS] [--json FILE]

    one     `lora_linear`, one adapter over all the rows: what the mixed batch is compared with
    peft    PEFT's loop over the adapters of a batch (it has no gradients for whole models; its
            layers have them)
    loop    `lora_linear` once for each adapter, over its rows, and the outputs put together
    ours    `lora_linear_mixed`, its rows sorted beforehand, as a model does it once for its layers

    x[B, T, K]    weight[N, K]    lora_a[R, K], lora_b[N, R] of 2 to 64 adapters    M = B T rows

A GPU measures 8B projections of 8192 rows, a CPU small ones of 512. Peers whose results are wrong
have no figures. Times are interleaved (`harness.py`) and ratios are medians of the rounds' own.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels as lk
from bench.check import check_op
from bench.harness import Call, Spread, interleave, paired_ratio, timed_variants
from bench.machine import bench_device, cache_bytes, ceilings, describe, dtype_of, native_16bit
from bench.op_recipes import SCALING
from bench.peer import Inputs, Op, Peer, Recipe, functional
from bench.shapes import LLAMA_8B, SMOLLM2, TINY, LlamaShape
from lora_kernels.lora_linear_mixed import reference

TARGET = 1.10
PEERS = ("one", "peft", "loop", "ours")
MAX_INPUT_SETS = 8
# The fewest rows of a batch, so that 2 adapters have several each.
MIN_BATCH = 8


@dataclass(frozen=True)
class MixedCase:
    """One projection under `adapters` adapters, forward and backward or forward alone."""

    shape: LlamaShape
    part: str
    tokens: int
    adapters: int
    dtype: str
    backward: bool
    r: int = 16

    @property
    def batch(self) -> int:
        return max(self.adapters, MIN_BATCH)

    @property
    def names(self) -> list[str]:
        """The adapter of each row of the batch; neighbours differ."""
        return [f"a{row % self.adapters}" for row in range(self.batch)]

    @property
    def id(self) -> str:
        direction = "forward+backward" if self.backward else "forward"
        return "-".join(
            (self.shape.name, self.part, str(self.tokens), self.dtype, direction,
             f"{self.adapters} adapters")
        )  # fmt: skip


def mixed_cases(device: torch.device, dtype: str, sizes: str = "full") -> list[MixedCase]:
    counts, shape, tokens = (2, 8, 32, 64), LLAMA_8B, 8192
    if sizes == "tiny":
        counts, shape, tokens = (3,), TINY, 48
    elif device.type == "cpu":
        shape, tokens = SMOLLM2, 512
    return [
        MixedCase(shape, part, tokens, count, dtype, backward)
        for part in ("o", "down")
        for backward in (False, True)
        for count in counts
    ]


def build(case: MixedCase, device: torch.device, seed: int) -> Op:
    """Draws a case's inputs and builds its peers on them."""
    generator = torch.Generator(device).manual_seed(seed)
    k, (n,) = case.shape.projections(case.part)

    def draw(*shape: int, scale: float = 1.0, dtype: str = case.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * scale
        return drawn.to(dtype_of(dtype))

    count, length = case.adapters, case.tokens // case.batch
    inputs = {"x": draw(case.batch, length, k), "weight": draw(n, k, scale=k**-0.5)}
    for a in range(count):
        # Adapters have values of bfloat16, so that all peers have the same ones.
        inputs[f"lora_a{a}"] = draw(case.r, k, scale=k**-0.5, dtype="bfloat16").float()
        inputs[f"lora_b{a}"] = draw(n, case.r, scale=case.r**-0.5, dtype="bfloat16").float()
    numbers = torch.tensor([int(name[1:]) for name in case.names], device=device)
    ids = numbers[:, None].expand(case.batch, length)
    rows = lk.MixedRows.of(ids, count)
    of_adapter = [(numbers == a).nonzero()[:, 0] for a in range(count)]
    together = torch.cat(of_adapter).argsort()

    def factors(t: Inputs) -> tuple[list[Tensor], list[Tensor]]:
        return tuple([t[f"lora_{ab}{a}"] for a in range(count)] for ab in "ab")  # type: ignore

    def specification(t: Inputs) -> tuple[Tensor, ...]:
        scalings = [SCALING] * count
        return (reference.lora_linear_mixed(t["x"], t["weight"], *factors(t), scalings, ids),)

    def ours(t: Inputs) -> tuple[Tensor, ...]:
        return (lk.lora_linear_mixed(t["x"], t["weight"], *factors(t), [SCALING] * count, rows),)

    def loop(t: Inputs) -> tuple[Tensor, ...]:
        parts = [
            lk.lora_linear(t["x"][mine], t["weight"], lora_a, lora_b, SCALING)
            for mine, lora_a, lora_b in zip(of_adapter, *factors(t), strict=True)
        ]
        return (torch.cat(parts)[together],)

    def one(t: Inputs) -> tuple[Tensor, ...]:
        return (lk.lora_linear(t["x"], t["weight"], t["lora_a0"], t["lora_b0"], SCALING),)

    trained = ["x"] + [f"lora_{ab}{a}" for a in range(count) for ab in "ab"]
    builders = {
        "one": functional(one, ["x", "lora_a0", "lora_b0"]),
        "peft": lambda t: _peft_peer(t, case),
        "loop": functional(loop, trained),
        "ours": functional(ours, trained),
    }
    recipe = Recipe(
        inputs,
        trained,
        specification,
        plain=lambda t: specification({name: x.to(t["x"].dtype) for name, x in t.items()}),
        builders=builders,
    )
    dys = (draw(case.batch, length, n),)
    op = Op(recipe, dys, {name: builder(inputs) for name, builder in builders.items()})
    for peer in op.peers.values():
        peer.dys = dys
    return op


def _peft_peer(inputs: Inputs, case: MixedCase) -> Peer:
    from peft import LoraConfig, get_peft_model

    container = nn.Module()
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(inputs["weight"], requires_grad=False)
    linear.out_features, linear.in_features = linear.weight.shape
    container.add_module("projection", linear)
    config = LoraConfig(r=case.r, lora_alpha=round(case.r * SCALING), target_modules=["projection"])
    model = get_peft_model(container, config, "a0")
    for a in range(1, case.adapters):
        model.add_adapter(f"a{a}", config)
    layer: Any = container.projection
    x = inputs["x"].detach().requires_grad_()
    trained = {"x": x}
    with torch.no_grad():
        for a in range(case.adapters):
            for ab, adapters in (("a", layer.lora_A), ("b", layer.lora_B)):
                weight = adapters[f"a{a}"].weight.requires_grad_()
                weight.copy_(inputs[f"lora_{ab}{a}"])
                trained[f"lora_{ab}{a}"] = weight
    names = case.names
    return Peer(lambda: (layer(x, adapter_names=names),), trained)


def measure(
    case: MixedCase, device: torch.device, seconds: float, deadline: float = math.inf
) -> dict[str, Any]:
    """A case's record: of each peer seconds, the ratio to one adapter, or its fault."""
    first = build(case, device, 0)
    # One adapter is another function; everything else is checked against the specification.
    alone = first.peers.pop("one")
    checked = check_op(first)
    first.peers["one"] = alone
    sets = min(MAX_INPUT_SETS, -(-2 * cache_bytes(device) // first.bytes))
    ops = [first, *(build(case, device, seed) for seed in range(1, sets))]

    def call_of(peer: str) -> Call:
        return lambda index: ops[index % sets].peers[peer].run(case.backward)

    faults = {name: verdict.fault for name, verdict in checked.items() if verdict.fault}
    calls = {name: call_of(name) for name in PEERS if name not in faults}
    samples = interleave(timed_variants(calls, device, sets, sets), seconds, deadline=deadline)
    record: dict[str, Any] = {"id": case.id, "adapters": case.adapters, "peers": {}}
    for name in PEERS:
        entry: dict[str, Any] = {} if name == "one" else checked[name].as_json()
        if name in faults:
            entry["fault"] = faults[name]
        else:
            entry["seconds"] = asdict(Spread.of(samples[name]))
            entry["over_one"] = asdict(paired_ratio(samples[name], samples["one"]))
        record["peers"][name] = entry
    return record


def lines(records: list[dict[str, Any]]) -> list[str]:
    """A markdown table of the records, and the target's verdict."""
    table = [
        "| | one adapter | ours over one | loop over one | PEFT over one |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in records:
        peers = record["peers"]
        milliseconds = peers["one"]["seconds"]["median"] * 1e3
        cells = [_cell(peers[name]) for name in ("ours", "loop", "peft")]
        table.append(f"| {record['id']} | {milliseconds:.3g} ms | {' | '.join(cells)} |")
    ratios = [
        record["peers"]["ours"]["over_one"]["median"]
        for record in records
        if "over_one" in record["peers"]["ours"]
    ]
    if len(ratios) < len(records):
        verdict = "not measured: a fault"
    else:
        verdict = f"{'met' if max(ratios) <= TARGET else 'missed'}, the worst is {max(ratios):.2f}"
    return [*table, "", f"Target, ours over one adapter <= {TARGET:.2f}: {verdict}"]


def _cell(peer: dict[str, Any]) -> str:
    if "fault" in peer:
        return str(peer["fault"])
    ratio = peer["over_one"]
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} .. {ratio['q3']:.2f})"


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=("full", "tiny"), default="full")
    parser.add_argument("--seconds", type=float, default=1.0, help="timed seconds of a case")
    parser.add_argument("--json", type=Path, help="also write the records there")
    options = parser.parse_args(arguments)
    device = bench_device()
    machine = describe(device)
    rates = ceilings(device, [dtype_of("float32"), dtype_of("bfloat16")])
    dtype = "bfloat16" if device.type == "cuda" or native_16bit(rates) else "float32"
    small = "" if device.type == "cuda" else " (no GPU: small sizes)"
    show(f"{machine['name']}, {machine['threads']} threads, load {machine['load_before']}{small}")
    records = [
        measure(case, device, options.seconds) for case in mixed_cases(device, dtype, options.sizes)
    ]
    for line in lines(records):
        show(line)
    if options.json is not None:
        content = {"machine": machine, "mixed": records}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if any("fault" in peer for r in records for peer in r["peers"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
