"""One operation as every peer computes it, on the same random inputs.

    frozen         the base alone: y = x weightᵀ, and dx = dy weight
    peft           PEFT's layers, adapters in float32 (its default, autocast_adapter_dtype)
    peft_bf16      PEFT's layers, adapters in the base's 16-bit dtype
    addmm          library GEMMs and addmm_ in one autograd Function a layer (`addmm.py`)
    transformers   transformers' own RoPE, RMSNorm, SwiGLU, head and loss
    liger          Liger-Kernel's, where it is installed and there is a GPU
    ours           lora_kernels, by its plan

    x[1, M, K]  weight[N, K]  lora_a[R, K]  lora_b[N, R]     q [1, H, M, D]  k [1, H_kv, M, D]
    cos, sin [1, M, D]     gate, up [1, M, I]     hidden [1, M, H]  labels [1, M]
    magnitude [N]          row_adapters [1, M], of three adapters or none

The specification is lora_kernels' reference, run in float64; "plain" is plain torch in the case's
own dtype. Adapters have values of bfloat16, so that all peers have the same ones.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_kernels as lk
from bench.addmm import AddmmLinear
from bench.peer import Function, Inputs, Peer, Recipe, functional, writing
from bench.shapes import GROUPS, OpCase
from lora_kernels.lora_linear import reference

SCALING = 2.0
EPS = 1e-5

Draw = Callable[..., Tensor]


def _projections(case: OpCase, draw: Draw) -> Recipe:
    k, outputs = case.shape.projections(case.part)
    inputs = {"x": draw(1, case.tokens, k)}
    for i, n in enumerate(outputs):
        inputs[f"weight{i}"] = draw(n, k, scale=k**-0.5)
        for name, shape, scale in (("lora_a", (case.r, k), k), ("lora_b", (n, case.r), case.r)):
            inputs[f"{name}{i}"] = draw(*shape, scale=scale**-0.5, dtype="bfloat16").float()
    groups = range(len(outputs))
    trained = ["x"] + [f"{name}{i}" for i in groups for name in ("lora_a", "lora_b")]

    def adapted(t: Inputs) -> tuple[Tensor, ...]:
        return tuple(
            reference.lora_linear(
                t["x"], t[f"weight{i}"], t[f"lora_a{i}"], t[f"lora_b{i}"], SCALING
            )
            for i in groups
        )

    def ours(t: Inputs) -> tuple[Tensor, ...]:
        arguments = [
            (t[f"weight{i}"], t[f"lora_a{i}"], t[f"lora_b{i}"], SCALING, None) for i in groups
        ]
        if len(arguments) == 1:
            return (lk.lora_linear(t["x"], *arguments[0]),)
        return lk.lora_linear_grouped(t["x"], arguments)

    def frozen(t: Inputs) -> tuple[Tensor, ...]:
        return tuple(F.linear(t["x"], t[f"weight{i}"]) for i in groups)

    return Recipe(
        inputs,
        trained,
        specification=adapted,
        plain=lambda t: adapted({n: x.to(t["x"].dtype) for n, x in t.items()}),
        builders={
            "frozen": functional(frozen, ["x"]),
            "peft": lambda t: _peft_peer(t, case, True),
            "peft_bf16": lambda t: _peft_peer(t, case, False),
            "addmm": lambda t: _addmm_peer(t, case),
            "ours": functional(ours, trained),
        },
    )


def _dora(case: OpCase, draw: Draw) -> Recipe:
    """The projection down with a magnitude."""
    projection = _projections(replace(case, part="down"), draw)
    norm = projection.inputs["weight0"].float().norm(dim=1)
    magnitude = norm * (1 + draw(norm.shape[0], scale=0.1, dtype="float32"))
    inputs = {**projection.inputs, "magnitude": magnitude.bfloat16().float()}

    def specification(t: Inputs) -> tuple[Tensor, ...]:
        arguments = (t["x"], t["weight0"], t["lora_a0"], t["lora_b0"], SCALING)
        return (reference.lora_linear(*arguments, magnitude=t["magnitude"]),)

    trained = [*projection.trained, "magnitude"]
    return Recipe(
        inputs,
        trained,
        specification,
        plain=lambda t: specification({n: x.to(t["x"].dtype) for n, x in t.items()}),
        builders={"ours": functional(call_dora, trained)},
    )


def call_dora(t: Inputs) -> tuple[Tensor, ...]:
    arguments = (t["x"], t["weight0"], t["lora_a0"], t["lora_b0"], SCALING)
    return (lk.lora_linear(*arguments, magnitude=t["magnitude"]),)


def _mixed(case: OpCase, draw: Draw) -> Recipe:
    """The projection down, each of its rows under one of three adapters or none."""
    k, (n,) = case.shape.projections("down")
    inputs = {"x": draw(1, case.tokens, k), "weight": draw(n, k, scale=k**-0.5)}
    for a, r in enumerate((case.r, max(1, case.r // 2), 2 * case.r)):
        inputs[f"lora_a{a}"] = draw(r, k, scale=k**-0.5, dtype="bfloat16").float()
        inputs[f"lora_b{a}"] = draw(n, r, scale=r**-0.5, dtype="bfloat16").float()
    noise = draw(1, case.tokens, dtype="float32")
    inputs["row_adapters"] = (noise.abs() * 1e6).long() % 4 - 1
    trained = ["x"] + [f"lora_{ab}{a}" for a in range(3) for ab in "ab"]

    def plain(t: Inputs) -> tuple[Tensor, ...]:
        return call_mixed(
            {name: x.to(t["x"].dtype) if x.is_floating_point() else x for name, x in t.items()},
            impl="reference",
        )

    return Recipe(
        inputs,
        trained,
        specification=lambda t: call_mixed(t, impl="reference"),
        plain=plain,
        builders={"ours": functional(call_mixed, trained)},
    )


def call_mixed(t: Inputs, impl: str = "auto") -> tuple[Tensor, ...]:
    lora_as, lora_bs = ([t[f"lora_{ab}{a}"] for a in range(3)] for ab in "ab")
    arguments = (t["x"], t["weight"], lora_as, lora_bs, [SCALING] * 3, t["row_adapters"])
    return (lk.lora_linear_mixed(*arguments, impl=impl),)


def _peft_peer(inputs: Inputs, case: OpCase, autocast_adapter_dtype: bool) -> Peer:
    from peft import LoraConfig, get_peft_model

    count = len(GROUPS[case.part])
    container = nn.Module()
    for i in range(count):
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = nn.Parameter(inputs[f"weight{i}"], requires_grad=False)
        linear.out_features, linear.in_features = linear.weight.shape
        container.add_module(f"projection{i}", linear)
    config = LoraConfig(
        r=case.r,
        lora_alpha=round(case.r * SCALING),
        target_modules=[f"projection{i}" for i in range(count)],
    )
    get_peft_model(container, config, autocast_adapter_dtype=autocast_adapter_dtype)
    layers = [getattr(container, f"projection{i}") for i in range(count)]
    x = inputs["x"].detach().requires_grad_()
    trained = {"x": x}
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for name, adapters in (("lora_a", layer.lora_A), ("lora_b", layer.lora_B)):
                trained[f"{name}{i}"] = adapters["default"].weight
                trained[f"{name}{i}"].copy_(inputs[f"{name}{i}"])
    return Peer(lambda: tuple(layer(x) for layer in layers), trained)


def _addmm_peer(inputs: Inputs, case: OpCase) -> Peer:
    x = inputs["x"].detach().requires_grad_()
    trained = {"x": x}
    layers = []
    for i in range(len(GROUPS[case.part])):
        lora_a, lora_b = (inputs[f"{name}{i}"].clone() for name in ("lora_a", "lora_b"))
        layer = AddmmLinear(inputs[f"weight{i}"], lora_a, lora_b, SCALING)
        trained |= {f"lora_a{i}": layer.lora_A, f"lora_b{i}": layer.lora_B}
        layers.append(layer)
    return Peer(lambda: tuple(layer(x) for layer in layers), trained)


def _rope(case: OpCase, draw: Draw) -> Recipe:
    from transformers.models.llama import modeling_llama

    shape, m = case.shape, case.tokens

    def angles(x: Tensor) -> Tensor:
        frequencies = 1e4 ** -torch.linspace(0, 1, shape.head_dim // 2, device=x.device)
        half = torch.arange(m, device=x.device)[:, None] * frequencies
        return torch.cat((half, half), dim=-1)[None]

    # As projections give them: heads inside tokens.
    q = draw(1, m, shape.heads, shape.head_dim).transpose(1, 2)
    k = draw(1, m, shape.kv_heads, shape.head_dim).transpose(1, 2)
    inputs = {"q": q, "k": k, "cos": angles(q).cos().to(q), "sin": angles(q).sin().to(q)}

    def transformers(t: Inputs) -> tuple[Tensor, ...]:
        return modeling_llama.apply_rotary_pos_emb(t["q"], t["k"], t["cos"], t["sin"])

    def liger(t: Inputs) -> tuple[Tensor, ...]:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        return liger_rotary_pos_emb(t["q"], t["k"], t["cos"], t["sin"])

    def ours(t: Inputs, impl: str = "auto") -> tuple[Tensor, ...]:
        return lk.apply_rotary_pos_emb(t["q"], t["k"], t["cos"], t["sin"], impl=impl)

    return _elementwise(inputs, ["q", "k"], transformers, liger, ours)


def _rms_norm(case: OpCase, draw: Draw) -> Recipe:
    return _norm(case, draw, residual=False)


def _rms_norm_residual(case: OpCase, draw: Draw) -> Recipe:
    return _norm(case, draw, residual=True)


def _norm(case: OpCase, draw: Draw, residual: bool) -> Recipe:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    hidden = case.shape.hidden
    inputs = {"x": draw(1, case.tokens, hidden), "weight": 1 + draw(hidden, scale=0.1)}
    if residual:
        inputs["residual"] = draw(1, case.tokens, hidden)
    norms: dict[torch.dtype, LlamaRMSNorm] = {}

    def transformers(t: Inputs) -> tuple[Tensor, ...]:
        dtype = t["weight"].dtype
        if dtype not in norms:
            norms[dtype] = LlamaRMSNorm(hidden, EPS)
            norms[dtype].weight = nn.Parameter(t["weight"], requires_grad=False)
        norm = norms[dtype]
        if not residual:
            return (norm(t["x"]),)
        total = t["x"] + t["residual"]
        return norm(total), total

    def liger(t: Inputs) -> tuple[Tensor, ...]:
        from liger_kernel.transformers import functional

        if not residual:
            return (functional.liger_rms_norm(t["x"], t["weight"], EPS),)
        return functional.liger_fused_add_rms_norm(t["x"], t["residual"], t["weight"], EPS)

    def ours(t: Inputs, impl: str = "auto") -> tuple[Tensor, ...]:
        if not residual:
            return (lk.rms_norm(t["x"], t["weight"], EPS, impl=impl),)
        return lk.rms_norm(t["x"], t["weight"], EPS, residual=t["residual"], impl=impl)

    trained = ["x", "residual"] if residual else ["x"]
    return _elementwise(inputs, trained, transformers, liger, ours)


def _swiglu(case: OpCase, draw: Draw) -> Recipe:
    from transformers.activations import ACT2FN

    silu = ACT2FN["silu"]
    inputs = {name: draw(1, case.tokens, case.shape.inner) for name in ("gate", "up")}

    def liger(t: Inputs) -> tuple[Tensor, ...]:
        from liger_kernel.transformers import functional

        return (functional.liger_swiglu(t["gate"], t["up"]),)

    return _elementwise(
        inputs,
        ["gate", "up"],
        lambda t: (silu(t["gate"]) * t["up"],),
        liger,
        lambda t, impl="auto": (lk.swiglu(t["gate"], t["up"], impl=impl),),
    )


def _head(case: OpCase, draw: Draw) -> Recipe:
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, vocabulary = case.shape.hidden, case.shape.vocabulary
    inputs = {
        "hidden": draw(1, case.tokens, hidden),
        "weight": draw(vocabulary, hidden, scale=hidden**-0.5),
    }
    noise = draw(1, case.tokens, dtype="float32")
    inputs["labels"] = (noise.abs() * 1e6).long() % vocabulary

    def transformers(t: Inputs) -> tuple[Tensor, ...]:
        logits = F.linear(t["hidden"], t["weight"])
        return (ForCausalLMLoss(logits, t["labels"], vocabulary),)

    def liger(t: Inputs) -> tuple[Tensor, ...]:
        from liger_kernel.transformers import functional

        shifted = F.pad(t["labels"], (0, 1), value=-100)[..., 1:].reshape(-1)
        rows = t["hidden"].view(-1, hidden)
        return (functional.liger_fused_linear_cross_entropy(rows, t["weight"], shifted),)

    def ours(t: Inputs, impl: str = "auto") -> tuple[Tensor, ...]:
        return (lk.linear_cross_entropy(t["hidden"], t["weight"], t["labels"], impl=impl),)

    return _elementwise(inputs, ["hidden"], transformers, liger, ours)


def _elementwise(
    inputs: dict[str, Tensor],
    trained: list[str],
    transformers: Function,
    liger: Function,
    ours: Callable[..., tuple[Tensor, ...]],
) -> Recipe:
    return Recipe(
        inputs,
        trained,
        specification=lambda t: ours(t, impl="reference"),
        plain=transformers,
        builders={
            "transformers": functional(transformers, trained),
            "liger": writing(liger, trained),
            "ours": functional(ours, trained),
        },
    )


RECIPES: dict[str, Callable[[OpCase, Draw], Recipe]] = {
    **dict.fromkeys(GROUPS, _projections),
    "rope": _rope,
    "rms_norm": _rms_norm,
    "rms_norm_residual": _rms_norm_residual,
    "swiglu": _swiglu,
    "head": _head,
    "dora": _dora,
    "mixed": _mixed,
}
