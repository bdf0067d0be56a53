"""How a new adapter's A and B begin: PEFT's `init_lora_weights` (`tuners/lora/layer.py`).

    weight[N, K]   lora_a[R, K]   lora_b[N, R]   s = scaling

    True          A Kaiming-uniform(√5), B zero       False        both Kaiming-uniform(√5)
    "gaussian"    A normal of deviation 1/R, B zero   "orthogonal" s B A ≠ 0, from one orthogonal
                                                                   R x R matrix (R even)
    "pissa"       weight = U S Vᵀ:  A = √(S_r/s) V_rᵀ,  B = U_r √(S_r/s)        (arXiv:2404.02948)
    "pissa_niter_N"  the same of a randomised SVD with N iterations
    "olora"       weight = Q R:     A = R_r,  B = Q_r                           (arXiv:2406.01775)

PiSSA and OLoRA take what the adapter then holds out of the base, weight - s B A, so that the layer
computes at first what it computed before. The base stays so: disabled or deleted, such an adapter
leaves the residual. A file holds A and B alone, and whoever loads it takes the same part out of the
same base again; the randomised SVD therefore draws from a seed of its own, so that what it takes
out is the same. Like PEFT, A and B are rounded to the weight's dtype once.
"""

import math

import torch
from torch import Tensor, nn

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Beyond them A or B, rounded to 16 bits, would not hold what the base loses.
_SCALINGS = (1e-4, 1e4)


def changes_weight(mode: bool | str) -> bool:
    """Whether an initialisation takes the adapter's part out of the base weight."""
    return isinstance(mode, str) and (mode.startswith("pissa") or mode.lower() == "olora")


def check_initialisation(
    mode: bool | str, weight: Tensor, rank: int, scaling: float, name: str
) -> None:
    """Checks what `initialise` needs of a layer, before anything is changed.

    Args:
        weight: [N, K], the layer's.
        scaling: the factor s.
        name: what an error calls the layer.

    Raises:
        ValueError: the rank is too large for PiSSA or OLoRA, or odd for "orthogonal"; or PiSSA or
            OLoRA would leave NaN or infinity in A, B or the weight, as with a scaling of zero.
        TypeError: PiSSA or OLoRA of a weight that is not of 16 or 32 bits (PEFT's limit).
    """
    if changes_weight(mode):
        assert isinstance(mode, str)
        shape = tuple(weight.shape)
        if weight.dtype not in _DTYPES:
            raise TypeError(
                f"init_lora_weights: {mode!r} expects a weight of 16 or 32 bits, got "
                f"{weight.dtype} ({name})"
            )
        if weight.is_meta:
            raise ValueError(f"init_lora_weights: {mode!r} expects weights, {name} has no memory")
        if rank > min(shape):
            raise ValueError(
                f"r: {mode!r} expects at most {min(shape)} for weight {shape}, got {rank} ({name})"
            )
        _check_residual(mode, weight, scaling, name)
    elif mode == "orthogonal" and rank % 2:
        raise ValueError(f"r: 'orthogonal' expects an even rank, got {rank} ({name})")


def _check_residual(mode: str, weight: Tensor, scaling: float, name: str) -> None:
    """Checks that what the base loses can be written in the weight's dtype, by bounds on it.

    No singular value is above the weight's norm, and no element of Q_r R_r or of the residual above
    (1 + s) times the norm of its column.
    """
    least, most = _SCALINGS
    if not least <= scaling <= most:
        raise ValueError(
            f"lora_alpha: {mode!r} expects a scaling from {least} to {most}, got {scaling} ({name})"
        )
    norm = torch.linalg.vector_norm(weight, dtype=torch.float32).item()
    column = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).max().item()
    if not max(math.sqrt(norm / least), (1 + scaling) * column) <= torch.finfo(weight.dtype).max:
        raise ValueError(
            f"init_lora_weights: {mode!r} expects a finite weight that is not too large for "
            f"{weight.dtype}, got one of norm {norm} with scaling {scaling} ({name})"
        )


def initialise(
    mode: bool | str, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor | None:
    """Fills A and B in place.

    Args:
        weight: [N, K], float16, bfloat16 or float32 for PiSSA and OLoRA; it is not changed.

    Returns:
        What the base weight [N, K] is to be, in its dtype; None where it stays.
    """
    with torch.no_grad():
        if changes_weight(mode):
            assert isinstance(mode, str)
            whole = weight.float()
            a, b = _leading_part(mode, whole, lora_a.shape[0], scaling)
            lora_a.copy_(a.to(weight.dtype))
            lora_b.copy_(b.to(weight.dtype))
            return (whole - scaling * b @ a).to(weight.dtype)
        if mode == "orthogonal":
            _orthogonal(weight.dtype, lora_a, lora_b)
            return None
        if isinstance(mode, str):
            nn.init.normal_(lora_a, std=1 / lora_a.shape[0])
        else:
            nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        if mode is False:
            nn.init.kaiming_uniform_(lora_b, a=math.sqrt(5))
        else:
            nn.init.zeros_(lora_b)
    return None


def initialise_bias(mode: bool | str, bias: Tensor, rank: int) -> None:
    """Fills the bias on B [N] in place: zero, or random where A and B both are."""
    with torch.no_grad():
        if mode is False:
            nn.init.uniform_(bias, -(rank**-0.5), rank**-0.5)
        else:
            nn.init.zeros_(bias)


def _leading_part(mode: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A[R, K] and B[N, R] out of weight[N, K], float32."""
    if mode.lower() == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if mode == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        iterations = int(mode.removeprefix("pissa_niter_"))
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            torch.random.default_generator.manual_seed(0)
            if weight.is_cuda:
                with torch.cuda.device(weight.device):
                    torch.cuda.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight, rank, niter=iterations)
        vh = v.t()
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root


def _orthogonal(dtype: torch.dtype, lora_a: Tensor, lora_b: Tensor) -> None:
    """The rows of one orthogonal matrix, the odd ones for A and the even ones for B.

    Drawn on the CPU, as PEFT draws them, so that one seed gives one adapter on every device.
    """
    rank = lora_a.shape[0]
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    a = torch.randn(lora_a.shape[1], rank // 2).mm(q[0::2]).t() / 10.0
    b = torch.randn(rank // 2, lora_b.shape[0]).t().mm(q[1::2]) / 10.0
    lora_a.copy_(a.to(dtype))
    lora_b.copy_(b.to(dtype))
