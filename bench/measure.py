"""Measures one case: builds the peers, checks them, times those without a fault side by side.

The record of a case is JSON:

    id, op, model, part, tokens, dtype, direction, graph, plan
    floor    flops, bytes and seconds of the least work (`shapes.py`), and what bounds it
    peers    by name: seconds {median, q1, q3, count}, tokens_per_s, floor_share, over_base and
             over_ours (its time over the first peer's and over ours, round by round), peak_bytes,
             error_ratio, gradient_norms, loss; or fault
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

import lora_kernels as lk
from bench.check import Checked, StepReference, check_op, check_step
from bench.harness import Call, Spread, graphed_variants, interleave, paired_ratio, timed_variants
from bench.machine import cache_bytes, name_of
from bench.models import StepPeer, build_base, build_peer, draw_adapters, draw_tokens, step_peers
from bench.ops import build_op, op_peers, op_plan
from bench.shapes import OpCase, StepCase, Work, floor_seconds, op_work, step_work

MAX_INPUT_SETS = 16
MIN_ROUNDS = 3
WIDER = {"bfloat16": torch.float32, "float16": torch.float32, "float32": torch.float64}


@dataclass
class Measurement:
    """A case's record, and of each peer its samples, its fault, or why it could not be timed."""

    record: dict[str, Any]
    samples: dict[str, list[float]]
    faults: dict[str, str]
    refused: dict[str, str]


def measure_op(
    case: OpCase,
    device: torch.device,
    rates: Mapping[str, Any],
    seconds: float,
    deadline: float = math.inf,
) -> Measurement:
    """One operation, forward or forward and backward, by every peer (times as `interleave`'s)."""
    peers = op_peers(case, device)
    first = build_op(case, device, 0, peers)
    checked = check_op(first, case.training)
    # The sets of inputs exceed the cache together; a call finds none of its own there.
    sets = min(MAX_INPUT_SETS, -(-2 * cache_bytes(device) // first.bytes))
    ops = [first, *(build_op(case, device, seed, peers) for seed in range(1, sets))]

    def call_of(peer: str) -> Call:
        def call(index: int) -> None:
            with torch.set_grad_enabled(case.training):
                ops[index % sets].peers[peer].run(case.backward)

        return call

    def refresh(peer: str) -> None:
        for op in ops:
            op.peers[peer].refresh()

    sound = [peer for peer in peers if checked[peer].fault is None]
    calls = {peer: call_of(peer) for peer in sound}
    peaks = {peer: peak_bytes(partial(calls[peer], 0), device) for peer in sound}
    work = [op_work(case)]
    record = {
        "op": case.op,
        "part": case.part,
        "direction": case.direction,
        "plan": op_plan(case, device),
    }
    return _measured(
        case, record, work, calls, checked, peaks, device, rates, seconds, deadline, sets, refresh
    )


def measure_step(
    case: StepCase,
    device: torch.device,
    rates: Mapping[str, Any],
    seconds: float,
    deadline: float = math.inf,
) -> Measurement:
    """One whole training step by every peer (times as `interleave`'s)."""
    names = step_peers(case, device)
    base = build_base(case, device)
    ids = draw_tokens(case, base.config.vocab_size, device)
    adapters = draw_adapters(base, case.r)
    wider = copy.deepcopy(base).to(WIDER[case.dtype])
    reference = StepReference.of(build_peer("peft", wider, adapters, ids, case.inner))
    del wider
    peers: dict[str, StepPeer] = {}
    checked: dict[str, Checked] = {}
    peaks: dict[str, int | None] = {}
    for name in names:
        peer = build_peer(name, base, adapters, ids, case.inner)
        checked[name] = check_step(name, peer, reference, case.dtype)
        peer.release()
        if checked[name].fault is None:
            peers[name] = peer
            peaks[name] = peak_bytes(peer.step, device)
            peer.release()
    if device.type == "cuda":
        # The weights are in memory once for all peers; each is charged with them and its adapter.
        for name in peers:
            peaks[name] = (peaks[name] or 0) + own_bytes(peers[name])
    plan = str(lk.status(peers["ours"].model, case.tokens)) if "ours" in peers else ""
    record = {"op": "step", "part": "step", "direction": "forward+backward", "plan": plan}
    calls = {name: _step_call(peer) for name, peer in peers.items()}
    work = step_work(case)
    measured = _measured(
        case, record, work, calls, checked, peaks, device, rates, seconds, deadline
    )
    measured.record["layers"] = case.layers
    measured.record["weights"] = "bundled" if case.bundled else "random"
    return measured


def _measured(
    case: OpCase | StepCase,
    record: dict[str, Any],
    work: list[Work],
    calls: Mapping[str, Call],
    checked: Mapping[str, Checked],
    peaks: Mapping[str, int | None],
    device: torch.device,
    rates: Mapping[str, Any],
    seconds: float,
    deadline: float,
    sets: int = 1,
    refresh: Callable[[str], None] = lambda peer: None,
) -> Measurement:
    faults = {name: verdict.fault for name, verdict in checked.items() if verdict.fault}
    refused: dict[str, str] = {}
    if case.graph:
        variants, refused = graphed_variants(calls, sets)
        # A peer that no graph takes is not measured; for ours it is a fault.
        faults |= {"ours": f"no CUDA graph: {refused.pop('ours')}"} if "ours" in refused else {}
    else:
        # The check was a whole step's warm-up; an operation's covered the first set of inputs.
        warmup = 0 if isinstance(case, StepCase) else sets
        variants = timed_variants(calls, device, sets, warmup)

    def refreshed(name: str) -> Callable[[int], float]:
        def timed(turn: int) -> float:
            refresh(name)
            return variants[name](turn)

        return timed

    timed = {name: refreshed(name) for name in variants}
    samples = interleave(timed, seconds, MIN_ROUNDS, deadline=deadline)
    floor = floor_seconds(work, rates["matmul"][case.dtype], rates["copy"])
    flops, moved = sum(w.flops for w in work), sum(w.bytes for w in work)
    record = {
        "id": case.id,
        "model": case.shape.name,
        "tokens": case.tokens,
        "dtype": case.dtype,
        "r": case.r,
        "graph": case.graph,
        **record,
        "floor": {
            "flops": flops,
            "bytes": moved,
            "seconds": floor,
            "bound": "FLOPs"
            if flops / rates["matmul"][case.dtype] > moved / rates["copy"]
            else "bytes",
        },
        "peers": {},
    }
    base = next(iter(checked))
    for name, verdict in checked.items():
        entry: dict[str, Any] = verdict.as_json()
        if name in faults or name in refused:
            entry["fault"] = faults.get(name) or f"no CUDA graph: {refused[name]}"
        elif name in samples:
            spread = Spread.of(samples[name])
            entry["seconds"] = asdict(spread)
            entry["tokens_per_s"] = case.tokens / spread.median
            entry["floor_share"] = floor / spread.median
            entry["peak_bytes"] = peaks[name]
            for key, other in (("over_base", base), ("over_ours", "ours")):
                if other in samples:
                    entry[key] = asdict(paired_ratio(samples[name], samples[other]))
        record["peers"][name] = entry
    return Measurement(record, samples, faults, refused)


def _step_call(peer: StepPeer) -> Call:
    return lambda index: peer.step()


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """Device memory that work takes beyond what is allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def own_bytes(peer: StepPeer) -> int:
    """The bytes of a peer's parameters, weights included."""
    return sum({id(p): p.nbytes for p in peer.model.parameters()}.values())


def needed_op_seconds(case: OpCase, rates: Mapping[str, Any], peers: int, seconds: float) -> float:
    """A guess at what an operation takes on a CPU, where a call reaches about half of its floor.

    The check is one call of each peer, two of ours, plain torch's and one in float64; the warm-up
    is at least one call each, and there are at least MIN_ROUNDS rounds.
    """
    call = op_work(case).seconds(rates["matmul"][case.dtype], rates["copy"]) / 0.5
    return call * (2 * peers + 4) + max(seconds, call * peers * MIN_ROUNDS)


def needed_step_seconds(
    case: StepCase, rates: Mapping[str, Any], peers: int, seconds: float
) -> float:
    """A guess at what a step case takes on a CPU, where a step reaches about 60 % of its floor.

    The check is one step of each peer, two of ours, and the reference in the next wider dtype.
    """
    work = step_work(case)

    def step(dtype: str) -> float:
        return floor_seconds(work, rates["matmul"][dtype], rates["copy"]) / 0.6

    wider = name_of(WIDER[case.dtype])
    reference = step(wider) if wider in rates["matmul"] else 2 * step(case.dtype)
    rounds = max(seconds, step(case.dtype) * peers * MIN_ROUNDS)
    return reference + step(case.dtype) * (peers + 1) + rounds
