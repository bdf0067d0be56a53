"""A Llama whose attention and MLP are built from LoRA layers: read it from top to bottom.

    hidden_states [B, T, hidden]    q [B, H, T, D]    k, v [B, H_kv, T, D]    labels [B, T]

Every projection (q, k, v, o, gate, up, down) is a `LoraLinear`, which without an adapter is a plain
linear layer; q, k, v and gate, up are each one grouped operation; RMSNorm (with the residual add),
RoPE, SwiGLU and the loss over a frozen head are operations of `lora_kernels` too. Names of modules
and weights are transformers' (models/llama/modeling_llama.py), so checkpoints and PEFT adapters fit
unchanged. Attention, masks, caches, rotary tables and generation are transformers' own.
"""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from lora_kernels import adapters as model_adapters
from lora_kernels import (
    apply_rotary_pos_emb,
    inject_lora,
    linear_cross_entropy,
    rms_norm,
    swiglu,
)
from lora_kernels.config import LoraConfig
from lora_kernels.layers import (
    LoraLinear,
    active_adapters,
    grouped_projection,
    lora_layers,
)
from lora_kernels.mixed_batch import MixedBatch, mixed_batch
from lora_kernels.sharding import (
    call_as,
    is_exactly,
    is_first_process,
    is_sharded,
    is_sharded_module,
    refuse_sharded,
)
from lora_kernels.targets import match_modules_to_save, match_target_modules
from lora_kernels.weighted_adapters import add_weighted_adapter
from lora_llama import loading

# Positions whose logits a head that is not frozen makes at a time where no gradient is wanted.
_SCORED_AT_ONCE = 128


class LoraRMSNorm(LlamaRMSNorm):
    """transformers' RMSNorm by `rms_norm`, which can add the residual stream first."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        """Returns the normalised sum, and with a residual the sum too, both [..., H]."""
        if residual is not None and residual.dtype != hidden_states.dtype:
            # Under autocast a sublayer's output is narrower than the residual stream.
            total = hidden_states + residual
            return rms_norm(total, self.weight, self.variance_epsilon), total
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, residual)


class LoraAttention(nn.Module):
    """Multi-head attention with grouped-query heads, fused RoPE and adapters on q, k, v and o."""

    projection_groups: ClassVar = (("q_proj", "k_proj", "v_proj"),)

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        bias = config.attention_bias
        self.q_proj = LoraLinear(config.hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = LoraLinear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = LoraLinear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = LoraLinear(heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch_and_length = hidden_states.shape[:-1]
        q, k, v = (
            projected.view(*batch_and_length, -1, self.head_dim).transpose(1, 2)
            for projected in grouped_projection(
                hidden_states, (self.q_proj, self.k_proj, self.v_proj)
            )
        )
        cos, sin = position_embeddings
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*batch_and_length, -1)), weights


class LoraMLP(nn.Module):
    """down(act(gate(x)) * up(x)) with adapters on all three."""

    projection_groups: ClassVar = (("gate_proj", "up_proj"),)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = LoraLinear(hidden, inner, bias=bias)
        self.up_proj = LoraLinear(hidden, inner, bias=bias)
        self.down_proj = LoraLinear(inner, hidden, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.is_swiglu = config.hidden_act in ("silu", "swish")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = grouped_projection(x, (self.gate_proj, self.up_proj))
        return self.down_proj(swiglu(gate, up) if self.is_swiglu else self.act_fn(gate) * up)


class LoraTransformerBlock(GradientCheckpointingLayer):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LoraAttention(config, layer_idx)
        self.mlp = LoraMLP(config)
        self.input_layernorm = LoraRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LoraRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        mixed: MixedBatch | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if position_embeddings is None:
            raise ValueError("position_embeddings: expected (cos, sin), got None")
        # An argument, so that a replay in the backward pass has the same rows.
        with nullcontext() if mixed is None else mixed.applied(self):
            attended, _ = self.self_attn(
                self.input_layernorm(hidden_states),
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            normalised, hidden_states = self.post_attention_layernorm(
                attended, residual=hidden_states
            )
            return hidden_states + self.mlp(normalised)


class LoraLlamaModel(LlamaModel):
    """Embedding, blocks and final norm. Positions, causal masks and caches are `LlamaModel`'s."""

    _no_split_modules: ClassVar = ["LoraTransformerBlock"]
    _can_record_outputs: ClassVar = {
        "hidden_states": LoraTransformerBlock,
        "attentions": LoraAttention,
    }

    def __init__(self, config: LlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            LoraTransformerBlock(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LoraRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class LoraLlamaForCausalLM(LlamaForCausalLM):
    """A causal language model on `LoraLlamaModel`, with named adapters; works with `generate`.

    The forward pass, the loss over every unmasked position and generation are LlamaForCausalLM's;
    in training mode, over a frozen head, the loss comes without logits (`linear_cross_entropy`).

    Args:
        config: transformers' Llama configuration.
        lora: an adapter, then called "default", or adapters by name, of which the first is active;
            without one the model is a plain Llama.
    """

    _no_split_modules: ClassVar = ["LoraTransformerBlock"]
    _can_record_outputs: ClassVar = LoraLlamaModel._can_record_outputs

    def __init__(
        self,
        config: LlamaConfig,
        lora: LoraConfig | Mapping[str, LoraConfig] | None = None,
    ) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LoraLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lora_configs: dict[str, LoraConfig] = {}
        self.post_init()
        # After the weights, which some adapters begin with.
        adapters = {"default": lora} if isinstance(lora, LoraConfig) else lora or {}
        for name, adapter in adapters.items():
            inject_lora(self, adapter, name)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        lora: LoraConfig | Mapping[str, LoraConfig] | None = None,
        adapter_name: str = "default",
        gguf_file: str | None = None,
        **kwargs: Any,
    ) -> "LoraLlamaForCausalLM":
        """Loads a Llama checkpoint (safetensors, sharded or not, or GGUF), or an adapter with it.

        Args:
            pretrained_model_name_or_path: a directory or hub id of a Llama, or a directory of
                PEFT's two adapter files, whose base model is then loaded first.
            lora: a new adapter to create, or several by name.
            adapter_name: the one new adapter's name, or the loaded adapter's.
            gguf_file: a GGUF file in the directory; it is dequantised to `dtype`, and the model can
                then be trained and saved like any other.
            kwargs: transformers' `from_pretrained` options (`dtype`, `device_map`,
                `attn_implementation`, ...).

        Raises:
            ValueError: the checkpoint is no Llama's, weights are missing from it (all named), or
                a layer with an adapter is offloaded or quantised.
            OSError: there is no such model, or it has no safetensors file.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if loading.is_adapter_directory(path):
            if lora is not None:
                raise ValueError(f"lora: {path} holds an adapter already; leave lora=None")
            base = loading.base_model_of(path)
            model = cls.from_pretrained(base, *args, gguf_file=gguf_file, **kwargs)
            model.load_adapter(path, adapter_name)
            return model
        content = loading.read_llama_config(path, gguf_file, **kwargs)
        # transformers keeps an argument called adapter_name for itself, so the name goes with lora.
        adapters = {adapter_name: lora} if isinstance(lora, LoraConfig) else lora or {}
        if adapters and (kwargs.get("quantization_config") or content.get("quantization_config")):
            raise ValueError(f"{path}: expected plain weights below an adapter, got quantised ones")
        if adapters:
            # On a model without memory, so that what fits no module is known before the weights.
            fields = {name: kwargs[name] for name in content if name in kwargs and name != "dtype"}
            with torch.device("meta"):
                outline = cls(LlamaConfig(**{**content, **fields}))
            for adapter in adapters.values():
                match_target_modules(outline, adapter)
                match_modules_to_save(outline, adapter)
        if gguf_file is not None:
            model = loading.from_gguf(cls, path, gguf_file, LlamaConfig(**content), **kwargs)
        else:
            try:
                model, info = super().from_pretrained(
                    path, *args, use_safetensors=True, output_loading_info=True, **kwargs
                )
            except ImportError as error:
                raise ImportError(f"{path}: cannot be loaded: {loading.one_line(error)}") from error
            loading.check_complete(path, info)
        for name, adapter in adapters.items():
            for part in (
                *match_target_modules(model, adapter), *match_modules_to_save(model, adapter)
            ):  # fmt: skip
                if any(weight.is_meta for weight in model.get_submodule(part).parameters()):
                    raise ValueError(f"device_map: {part} has an adapter and must not be offloaded")
            model.add_adapter(name, adapter)
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        adapter_names: Sequence[str] | None = None,
        loss_per_row: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As LlamaForCausalLM's, but that a training step's output has no logits and no cache.

        Args:
            input_ids: [B, T], or inputs_embeds [B, T, hidden] in their place.
            labels: [B, T] like input_ids, -100 where nothing is to be learned; position t is scored
                against labels[t + 1]. `shift_labels` [B, T] in kwargs is aligned already, and
                `num_items_in_batch` is what the summed loss is divided by.
            use_cache: None is False in training mode and with labels, else the config's. (With a
                cache transformers does not see that position_ids restart: packed sequences would
                attend to one another.)
            adapter_names: for each of the B rows the adapter that it uses, or "__base__"
                (`lora_kernels/mixed_batch.py`, with the errors). Training reaches those that
                `set_adapter([...])` has made trainable.
            loss_per_row: the loss is [B], the sum over each row's scored positions, and there are
                no logits; for evaluation, it keeps those of a few positions at a time.

        Returns:
            loss (with labels), past_key_values, and logits [B, T, vocabulary]: None in training
            mode with labels where the head is frozen. `model.eval()` has them always, but with
            loss_per_row.
        """
        if use_cache is None and (self.training or labels is not None):
            use_cache = False
        if adapter_names is not None:
            rows = input_ids if inputs_embeds is None else inputs_embeds
            batch = mixed_batch(self, adapter_names, None if rows is None else rows.shape[0])
            with batch.applied(self):
                return LoraLlamaForCausalLM.forward(
                    self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
                    labels, use_cache, logits_to_keep, None, loss_per_row, mixed=batch, **kwargs,
                )  # fmt: skip
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            **kwargs,
        }
        shifted = kwargs.get("shift_labels")
        without_logits = self.training and logits_to_keep == 0 and self._has_frozen_head()
        if labels is None or not (loss_per_row or without_logits):
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **arguments)
        outputs = self.model(**arguments)

        def head_loss(hidden_states: Tensor) -> Tensor:
            targets = (labels if shifted is None else shifted).to(hidden_states.device)
            if loss_per_row:
                if shifted is None:
                    hidden_states, targets = hidden_states[:, :-1], targets[:, 1:]
                rows = zip(hidden_states, targets, strict=True)
                return torch.stack([self._summed_loss(*row) for row in rows])
            return linear_cross_entropy(
                hidden_states,
                self.lm_head.weight,
                targets,
                num_items=kwargs.get("num_items_in_batch"),
                shift=shifted is None,
            )

        loss = call_as(self.lm_head, head_loss, outputs.last_hidden_state)
        return CausalLMOutputWithPast(
            loss=loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
        """As GenerationMixin's; a row's copies (beams, returned sequences) have its adapter."""
        input_ids, arguments = super()._expand_inputs_for_generation(
            expand_size=expand_size, **kwargs
        )
        names = arguments.get("adapter_names")
        if expand_size > 1 and isinstance(names, list | tuple):
            arguments["adapter_names"] = [name for name in names for _ in range(expand_size)]
        return input_ids, arguments

    def _summed_loss(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of hidden_states [T, hidden], without all of the logits."""
        head = self.lm_head
        if self._has_frozen_head():
            return linear_cross_entropy(
                hidden_states, head.weight, targets, num_items=1, shift=False
            )
        total = hidden_states.new_zeros((), dtype=torch.float32)
        for part, labels in zip(
            hidden_states.split(_SCORED_AT_ONCE), targets.split(_SCORED_AT_ONCE), strict=True
        ):
            # Within `call_as` a sharded head's own forward is this very function.
            logits = type(head).forward(head, part) if is_sharded_module(head) else head(part)
            total += F.cross_entropy(logits.float(), labels, reduction="sum")
        return total

    def _has_frozen_head(self) -> bool:
        """Whether the loss is one operation on the head's weight: nothing in it trains or hooks."""
        head = self.lm_head
        return (
            is_exactly(head, nn.Linear)
            and not head.weight.requires_grad
            and head.bias is None
            and self.loss_function is ForCausalLMLoss
        )

    def add_adapter(self, adapter_name: str, config: LoraConfig) -> None:
        """Creates an adapter; the first one becomes active (see `inject_lora` for the errors)."""
        inject_lora(self, config, adapter_name)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Makes one adapter, or the sum of several, active and trainable. ValueError: unknown."""
        model_adapters.set_adapter(self, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. ValueError: unknown, or merged."""
        model_adapters.delete_adapter(self, adapter_name)

    def load_adapter(
        self,
        directory: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> None:
        """Adds an adapter from PEFT's two files (see `load_adapter_into` for the errors)."""
        model_adapters.load_adapter_into(self, directory, adapter_name, is_trainable)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> None:
        """Adds the weighted sum of adapters under a new name, inactive (`weighted_adapters.py`)."""
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **options)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While it is open, the model is its base alone."""
        with model_adapters.disable_adapter(self):
            yield

    def enable_adapters(self) -> None:
        """Switches the active adapters on again after `disable_adapters`."""
        model_adapters.enable_adapters(self, True)

    def disable_adapters(self) -> None:
        """Switches all adapters off until `enable_adapters`."""
        model_adapters.enable_adapters(self, False)

    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return active_adapters(self)

    def active_adapter(self) -> str:
        """The name of the first active adapter. ValueError: none is active."""
        names = active_adapters(self)
        if not names:
            raise ValueError("active_adapter: no adapter is active")
        return names[0]

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: Any = None
    ) -> dict[str, Tensor]:
        """The adapter's tensors by PEFT's keys (`adapter_state.py`), not copied."""
        return model_adapters.adapter_state_dict(self, adapter_name or self.active_adapter())

    def enable_peft_hotswap(self, *args: Any, **kwargs: Any) -> None:
        """Not supported. ValueError: always; load under a new name and `set_adapter` instead."""
        raise ValueError("enable_peft_hotswap: LoraLlama has named adapters; use set_adapter")

    def merge_adapter(self, names: str | Sequence[str] | None = None) -> None:
        """Merges the active adapters into the weights. ValueError: NaN or Inf, or merged already"""
        model_adapters.merge_adapter(self, names)

    def unmerge_adapter(self) -> None:
        """Restores the weights as they were before `merge_adapter`, bit by bit."""
        model_adapters.unmerge_adapter(self)

    def merge_and_unload(self) -> LlamaForCausalLM:
        """Merges the active adapters and returns transformers' own Llama over the same weights.

        This model is used up: its layers' weights now belong to the returned one.

        Raises:
            ValueError: a merged weight has NaN or Inf, an adapter has a bias on B where a layer has
                none, or the model is sharded; the model is then unchanged.
        """
        refuse_sharded(
            self, "no plain Llama can be made of", "save_pretrained and `lora-llama merge` make one"
        )
        if not any(layer.merged_adapters for _, layer in lora_layers(self)):
            self.merge_adapter()
        state = model_adapters.base_state_dict(self)
        head, embedding = state["lm_head.weight"], state["model.embed_tokens.weight"]
        config = copy.deepcopy(self.config)
        if config.tie_word_embeddings and head is not embedding:
            # A copy of one of them has been trained.
            config.tie_word_embeddings = False
        with torch.device("meta"):
            plain = LlamaForCausalLM(config)
        plain.load_state_dict(state, assign=True)
        plain.model.rotary_emb = self.model.rotary_emb
        plain.generation_config = self.generation_config
        return plain.train(self.training)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the adapters in PEFT's two files each; without adapters, the whole checkpoint.

        Args:
            is_main_process: whether this process writes; True by default. A model that
                `fully_shard` has sharded is gathered, so that all processes call this, and rank 0
                alone writes by default.

        Raises:
            OSError: the files cannot be written; an older adapter there is then intact.
        """
        if not self.lora_configs:
            if is_main_process is None:
                is_main_process = is_first_process() or not is_sharded(self)
            if state_dict is None and is_sharded(self):
                state_dict = _gathered_state(self)
                if not is_main_process:
                    return
            super().save_pretrained(
                save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
            )
            # transformers writes this class's name, which no other tool knows.
            self.config.architectures = ["LlamaForCausalLM"]
            if is_main_process:
                self.config.save_pretrained(save_directory)
            return
        for config in self.lora_configs.values():
            if config.base_model_name_or_path is None:
                config.base_model_name_or_path = self.config._name_or_path or None
        model_adapters.save_adapters(self, save_directory, is_main_process=is_main_process)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of parameters that require gradients, and of all."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Prints the two numbers and their ratio, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )


def _gathered_state(model: nn.Module) -> dict[str, Any]:
    """A sharded model's state on the CPU of rank 0; empty in the other processes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


LoraLlama = LoraLlamaForCausalLM
