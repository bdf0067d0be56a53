"""One operation of one size: its peers, what lora_kernels plans for it, its inputs drawn."""

import importlib.util

import torch
from torch import Tensor

from bench.machine import dtype_of
from bench.op_recipes import RECIPES
from bench.peer import Op
from bench.shapes import GROUPS, OpCase
from lora_kernels.dispatch import resolve, why_not_triton
from lora_kernels.lora_linear.op import plan_for


def liger_available(device: torch.device) -> bool:
    """Liger's kernels need a GPU."""
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def op_peers(case: OpCase, device: torch.device) -> list[str]:
    """The names of a case's peers. The first is what the others are compared with."""
    if case.part in GROUPS:
        sixteen_bit = ["peft_bf16"] if dtype_of(case.dtype).itemsize == 2 else []
        return ["frozen", "peft", *sixteen_bit, "addmm", "ours"]
    return ["transformers", *(["liger"] if liger_available(device) else []), "ours"]


def op_plan(case: OpCase, device: torch.device) -> str:
    """What lora_kernels runs for a case, and why."""
    dtype = dtype_of(case.dtype)
    if resolve("auto", device, dtype) != "triton":
        return f"eager ({why_not_triton(device, dtype) or 'the interpreter runs only by name'})"
    if case.part not in GROUPS:
        return "triton"
    k, outputs = case.shape.projections(case.part)
    ranks = (case.r,) * len(outputs)
    return str(plan_for(case.tokens, tuple(outputs), k, ranks, dtype, device))


def build_op(case: OpCase, device: torch.device, seed: int, peers: list[str]) -> Op:
    """Draws a case's inputs and builds its peers on them."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: str = case.dtype) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device) * scale
        return drawn.to(dtype_of(dtype))

    recipe = RECIPES[case.part](case, draw)
    with torch.no_grad():
        outputs = recipe.plain(recipe.inputs)
    # A loss is a scalar; what reaches it in training is 1.
    dys = tuple(draw(*y.shape) if y.dim() else torch.ones_like(y) for y in outputs)
    op = Op(recipe, dys, {})
    for name in peers:
        peer = recipe.builders[name](recipe.inputs)
        peer.dys = dys
        if name == "liger":
            peer.dys = tuple(dy.clone() for dy in dys)
            peer.restore += list(zip(peer.dys, dys, strict=True))
        op.peers[name] = peer
    return op
