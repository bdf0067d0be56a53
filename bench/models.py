"""Whole models as every peer builds them, over the same weights and with the same adapters.

    frozen          transformers' Llama without an adapter; the embeddings require a gradient, so
                    that dX flows through every layer
    peft            PEFT over that Llama, adapters in float32 (its default)
    peft_autocast   the same under torch.autocast, as Trainer's bf16=True runs it
    peft_bf16       PEFT with adapters in the base's 16-bit dtype
    accelerated     the model of `peft` after lora_kernels' `accelerate`
    addmm           that Llama with an addmm_ autograd Function in every projection (`addmm.py`)
    addmm_liger     the same with Liger-Kernel's RoPE, RMSNorm, SwiGLU and loss
    ours            LoraLlama

A step is forward, transformers' mean loss over the shifted tokens, and backward, without a cache
and without an optimizer, for all peers alike. Base weights are one set in memory. Adapters have
values of bfloat16, so that all peers have the same ones, and B is not zero.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import lora_kernels as lk
from bench.addmm import AddmmLinear
from bench.machine import dtype_of
from bench.ops import liger_available
from bench.shapes import GROUPS, StepCase

SCALING = 2.0
PROJECTIONS = [path for group in GROUPS.values() for path in group]
TARGET_MODULES = [path.rpartition(".")[2] for path in PROJECTIONS]
# Small enough for the model to stay near its base, as a trained adapter does.
B_SCALE = 0.02


class StepPeer:
    """One peer's model and its training step.

    Attributes:
        trained: what gets gradients: the adapter's parameters by layer and projection,
            "0.self_attn.q_proj.lora_A"; where dX flows through all blocks, "inputs_embeds".
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[], Tensor], trained: dict[str, Tensor]
    ) -> None:
        self.model = model
        self.trained = trained
        self._loss = loss

    def step(self) -> Tensor:
        """Forward and backward; the gradients are new ones. Returns the loss."""
        for tensor in self.trained.values():
            tensor.grad = None
        loss = self._loss()
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: tensor.grad for name, tensor in self.trained.items()}

    def release(self) -> None:
        """Frees the gradients."""
        for tensor in self.trained.values():
            tensor.grad = None


def step_peers(case: StepCase, device: torch.device) -> list[str]:
    """The names of a case's peers. The first is what the others are compared with."""
    sixteen_bit = ["peft_autocast", "peft_bf16"] if dtype_of(case.dtype).itemsize == 2 else []
    liger = ["addmm_liger"] if liger_available(device) else []
    names = ["frozen", "peft", *sixteen_bit, "accelerated", "addmm", *liger, "ours"]
    return [name for name in names if not case.only or name in case.only]


def build_base(case: StepCase, device: torch.device) -> LlamaForCausalLM:
    """The frozen Llama in the case's dtype: the bundled checkpoint, or random weights."""
    dtype = dtype_of(case.dtype)
    if case.bundled:
        from lora_llama.loading import bundled_model

        model = LlamaForCausalLM.from_pretrained(bundled_model(), dtype=dtype).to(device)
    else:
        shape = case.shape
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=case.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=case.vocabulary,
            max_position_embeddings=max(case.length, 128),
            tie_word_embeddings=shape.tied,
        )
        torch.manual_seed(0)
        with device:
            model = LlamaForCausalLM(config)
        # The values of bfloat16, for the checks in a wider dtype too.
        model = model.to(torch.bfloat16).to(dtype)
    return model.requires_grad_(False).train()


def draw_tokens(case: StepCase, vocabulary: int, device: torch.device) -> Tensor:
    """Random token ids [batch, length]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocabulary, (case.batch, case.length), generator=generator).to(device)


def draw_adapters(base: LlamaForCausalLM, r: int) -> dict[str, Tensor]:
    """A and B of every projection, "0.self_attn.q_proj.lora_A" [R, K], float32."""
    generator = torch.Generator().manual_seed(2)
    adapters = {}
    for index, layer in enumerate(base.model.layers):
        for path in PROJECTIONS:
            n, k = layer.get_submodule(path).weight.shape
            for name, shape, scale in (
                ("lora_A", (r, k), k**-0.5),
                ("lora_B", (n, r), B_SCALE),
            ):
                drawn = torch.randn(shape, generator=generator) * scale
                adapters[f"{index}.{path}.{name}"] = drawn.bfloat16().float()
    return adapters


def build_peer(
    name: str,
    base: LlamaForCausalLM,
    adapters: dict[str, Tensor],
    ids: Tensor,
    inner: bool = False,
) -> StepPeer:
    """One peer over the base's own weights. The adapters are copied into it.

    Args:
        inner: the blocks stand for inner ones of a larger model, so that dX flows through all of
            them for every peer. In a whole model the first block's inputs need no gradient.
    """
    r = next(iter(adapters.values())).shape[0]
    embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()
    through = {"inputs_embeds": embeddings}
    if name == "frozen":
        return StepPeer(
            base,
            lambda: base(inputs_embeds=embeddings, labels=ids, use_cache=False).loss,
            through,
        )
    context: Callable[[], Any] = nullcontext
    if name == "ours":
        model = _lora_llama(base, r)
    elif name == "accelerated":
        model = lk.accelerate(_peft(base, r, autocast_adapter_dtype=True))
    elif name.startswith("peft"):
        model = _peft(base, r, autocast_adapter_dtype=name != "peft_bf16")
        if name == "peft_autocast":
            context = lambda: torch.autocast(ids.device.type, base.dtype)  # noqa: E731
    else:
        model = _addmm(base, adapters)
        if name == "addmm_liger":
            context = _use_liger(model)
    trained: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters():
        found = re.search(r"layers\.(\d+\..*?\.lora_[AB])\b", path)
        if found:
            trained[found[1]] = parameter
    with torch.no_grad():
        for key, value in adapters.items():
            trained[key].copy_(value)

    inputs = through if inner else {"input_ids": ids}

    def loss() -> Tensor:
        with context():
            return model(**inputs, labels=ids, use_cache=False).loss

    return StepPeer(model.train(), loss, {**trained, **(through if inner else {})})


def _shallow_copy(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """New modules over the same tensors."""
    tensors = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def _peft(base: LlamaForCausalLM, r: int, autocast_adapter_dtype: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r,
        lora_alpha=round(r * SCALING),
        target_modules=TARGET_MODULES,
        task_type="CAUSAL_LM",
    )
    model = _shallow_copy(base)
    return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)


def _lora_llama(base: LlamaForCausalLM, r: int) -> nn.Module:
    from lora_llama import LoraLlama

    with torch.device("meta"):
        model = LoraLlama(copy.deepcopy(base.config))
    model.load_state_dict(base.state_dict(), assign=True)
    # Its tables are in no state dict.
    model.model.rotary_emb = copy.deepcopy(base.model.rotary_emb)
    model.tie_weights()
    config = lk.LoraConfig(r=r, lora_alpha=round(r * SCALING), target_modules=TARGET_MODULES)
    model.add_adapter("default", config)
    return model


def _addmm(base: LlamaForCausalLM, adapters: dict[str, Tensor]) -> LlamaForCausalLM:
    model = _shallow_copy(base)
    for index, layer in enumerate(model.model.layers):
        for path in PROJECTIONS:
            linear = layer.get_submodule(path)
            lora_a, lora_b = (
                adapters[f"{index}.{path}.{name}"].to(linear.weight.device, copy=True)
                for name in ("lora_A", "lora_B")
            )
            replacement = AddmmLinear(linear.weight, lora_a, lora_b, SCALING)
            layer.set_submodule(path, replacement)
    return model


def _use_liger(model: LlamaForCausalLM) -> Callable[[], Any]:
    """Gives one model Liger's kernels; returns the context that its forward pass runs in.

    Liger replaces names in transformers' module, for every model in the process. They are put
    back, so that the other peers stay what they are.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    with _restored(modeling_llama):
        apply_liger_kernel_to_llama(model=model)

    @contextmanager
    def forward() -> Iterator[None]:
        with _restored(modeling_llama):
            modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
            yield

    return forward


@contextmanager
def _restored(module: ModuleType) -> Iterator[None]:
    names = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(names)
