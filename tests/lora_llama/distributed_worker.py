"""What two processes compute, measured against one: `test_distributed.py` launches and judges it.

    torchrun --nproc-per-node 2 distributed_worker.py DIRECTORY [DTYPE CASE ...]

Each process trains on its share of a batch of unequal lengths. The same model in one process, on
the whole batch, is what it is measured against; every process computes that too. What process N has
measured, by case, is then in DIRECTORY/report-N.json, and the adapters that the cases have saved
are beside it.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from lora_kernels import adapters, layers, peft_linear
from lora_kernels.adapter_files import load_adapter
from lora_kernels.adapter_state import copy_adapter
from lora_kernels.sharding import is_sharded, reshard
from lora_kernels.testing import compare
from lora_llama import LoraLlama, capture_lora_weights, verify_gradients

Report = dict[str, Any]
STEPS = 3
LENGTHS = (11, 3, 9, 2)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": PROJECTIONS}


def llama_config(**changes: Any) -> LlamaConfig:
    """Two layers; 97 rows of the embedding are an uneven share for two processes."""
    options: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**{**options, **changes})


def lora_llama(config: LlamaConfig | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = LoraLlama(config or llama_config(), lora=lk.LoraConfig(**{**OPTIONS, **options}))
    return with_b(model)


def peft_model() -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config())
    adapted = peft.get_peft_model(base, peft.LoraConfig(**OPTIONS, task_type="CAUSAL_LM"))
    return with_b(lk.accelerate(adapted))


MODELS: dict[str, Callable[[], nn.Module]] = {"lora_llama": lora_llama, "peft": peft_model}


def with_b(model: nn.Module) -> nn.Module:
    """While B is zero A has no gradient to compare."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_A." not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def batch(rows: slice) -> dict[str, Tensor]:
    """Rows of right-padded sequences; all of every sequence is trained on."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 97, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    labels = ids.masked_fill(~mask, -100)
    tensors = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}
    return {name: tensor[rows] for name, tensor in tensors.items()}


def share() -> slice:
    """This process's rows: half of them, of two processes."""
    rows, rank = len(LENGTHS) // dist.get_world_size(), dist.get_rank()
    return slice(rows * rank, rows * (rank + 1))


def loss_of(model: nn.Module, rows: slice, processes: int) -> Tensor:
    """A process's share of the mean over the tokens of all: gradients are averaged afterwards."""
    # The first token of a sequence is nobody's label.
    count = sum(length - 1 for length in LENGTHS)
    return model(**batch(rows), num_items_in_batch=count).loss * processes


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        plain_name(name): full(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        plain_name(name): full(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def plain_name(name: str) -> str:
    return name.removeprefix("module.")


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest |difference| of any tensor over its own largest value; all must be there."""
    assert found.keys() == expected.keys() and expected, found.keys() ^ expected.keys()
    return max(
        ((found[name] - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
    )


def ranks_equal(model: nn.Module, gradients: dict[str, Tensor]) -> bool:
    """Whether all processes have the same bits in what each has of its own.

    That is what the model computes of the same rows, and every tensor that is not sharded. (What is
    gathered of shards is the same everywhere, whatever they are.)
    """
    own = {
        name: tensor.detach()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    own = {name: tensor for name, tensor in own.items() if not isinstance(tensor, DTensor)}
    if isinstance(model, DistributedDataParallel):
        own |= {f"{name}.grad": gradient for name, gradient in gradients.items()}
    inputs = batch(slice(None))
    with torch.no_grad():
        own["logits"] = model.eval()(inputs["input_ids"], inputs["attention_mask"]).logits
    model.train()
    reshard(model)
    return equal_on_all_ranks(own)


def equal_on_all_ranks(tensors: dict[str, Tensor]) -> bool:
    """Whether every process has the same bits."""
    for tensor in tensors.values():
        copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, tensor.contiguous())
        if not all(torch.equal(copies[0], other) for other in copies[1:]):
            return False
    return True


def train(model: nn.Module, rows: slice, processes: int) -> tuple[dict[str, Tensor], list[float]]:
    """The gradients of the first step, and the losses (this process's shares) of all."""
    # Not Adam, whose first steps are the signs of gradients, however small these are.
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    gradients, losses = {}, []
    for step in range(STEPS):
        loss = loss_of(model, rows, processes)
        loss.backward()
        if step == 0:
            gradients = {name: g.clone() for name, g in named_gradients(model).items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return gradients, losses


def against_one_process(parallel: nn.Module, single: nn.Module) -> Report:
    """Trains both: the one on this process's share of the batch, the other on all of it."""
    gradients, losses = train(parallel, share(), dist.get_world_size())
    expected_gradients, expected_losses = train(single, slice(None), 1)
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    weights = named_weights(parallel)
    return {
        "gradients": len(gradients),
        "gradient_error": worst_error(gradients, expected_gradients),
        "loss_error": (mean - torch.tensor(expected_losses)).abs().max().item(),
        "weight_error": worst_error(weights, named_weights(single)),
        "ranks_equal": ranks_equal(parallel, gradients),
    }


def shard(model: nn.Module, own_head: bool = False, **options: Any) -> nn.Module:
    """FSDP2: a unit for each block, and one for the rest, or as accelerate cuts the rest up."""
    causal = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    for block in causal.model.layers:
        fully_shard(block, **options)
    if own_head:
        fully_shard(causal.model.embed_tokens, **options)
        fully_shard(
            [causal.model.norm, causal.lm_head], **{**options, "reshard_after_forward": False}
        )
    return fully_shard(model, **options)


def base_share(model: nn.Module) -> float:
    """The bytes of the frozen weights that this process holds, over those of all."""
    held, total = 0, 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            held += local.numel() * local.element_size()
            total += parameter.numel() * parameter.element_size()
    return held / total


def file_tensors(directory: Path) -> dict[str, Tensor]:
    return load_adapter(directory)[1]


def raised(action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def ddp(kind: str, output: Path) -> Report:
    single = MODELS[kind]()
    return against_one_process(DistributedDataParallel(copy.deepcopy(single)), single)


def fsdp(kind: str, output: Path, **options: Any) -> Report:
    """LoraLlama, or an accelerated PEFT model, and the adapter that it saves after training."""
    single = MODELS[kind]()
    sharded = shard(copy.deepcopy(single), **options)
    report = {"base_share": base_share(sharded), **against_one_process(sharded, single)}
    report["fused_calls"] = [fused_calls(model) for model in (sharded, single)]
    mine, reference = output / f"rank-{dist.get_rank()}", output / "single"
    if kind == "peft":
        state = get_model_state_dict(
            sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if dist.get_rank() == 0:
            sharded.save_pretrained(mine, state_dict=state)
    else:
        sharded.save_pretrained(mine)
    report["written"] = mine.exists()
    if dist.get_rank() == 0:
        single.save_pretrained(reference)
        report["file_error"] = worst_error(file_tensors(mine), file_tensors(reference))
    return report


def faults(output: Path) -> Report:
    """What makes processes differ: a gradient that is not averaged, a scale of one of them."""

    def trained(model: nn.Module, spoil: Callable[[], None] = lambda: None) -> bool:
        gradients, _ = train(model, share(), dist.get_world_size())
        spoil()
        return ranks_equal(model, gradients)

    # A parameter that is left out is nobody's to average.
    model = DistributedDataParallel(lora_llama())
    with model.no_sync():
        report = {"ddp, nothing averaged": trained(model)}
    model = lora_llama()
    alone = {model.model.layers[0].mlp.up_proj.lora_B["default"]}
    report["fsdp, one weight left out"] = trained(shard(model, ignored_params=alone))
    sharded = shard(lora_llama())

    def spoil() -> None:
        if dist.get_rank() == 1:
            sharded.model.layers[0].mlp.up_proj.scaling["default"] *= 1.01

    report["fsdp, another scale in one process"] = trained(sharded, spoil)
    return report


def fused_calls(model: nn.Module) -> list[int]:
    """How often a forward pass calls the operations, on weights that are plain tensors."""
    calls = [0, 0]

    def counted(index: int, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            weights = args[:1] if isinstance(args[0], Tensor) else [p[0] for p in args[0]]
            calls[index] += all(type(weight) is nn.Parameter for weight in weights)
            return operation(x, *args, **kwargs)

        return call

    names = ("lora_linear", "lora_linear_grouped")
    originals = {
        (module, name): getattr(module, name) for module in (layers, peft_linear) for name in names
    }
    for (module, name), operation in originals.items():
        setattr(module, name, counted(names.index(name), operation))
    try:
        loss_of(model, share(), 1)
    finally:
        for (module, name), operation in originals.items():
            setattr(module, name, operation)
    return calls


def accelerated_late(output: Path) -> Report:
    """`accelerate` on a PEFT model that is sharded already, and `restore`."""
    single = lk.restore(MODELS["peft"]())
    sharded = shard(copy.deepcopy(single), own_head=True)
    report: Report = {"gradient_errors": [], "fused_calls": []}
    for change in (lk.accelerate, lk.restore):
        gradients = []
        for model in (sharded, single):
            loss_of(change(model), slice(None), 1).backward()
            gradients.append({name: g.clone() for name, g in named_gradients(model).items()})
            model.zero_grad()
        report["gradient_errors"].append(worst_error(*gradients))
        report["fused_calls"].append(fused_calls(sharded))
    report["status"] = str(lk.status(lk.accelerate(sharded)))
    return report


def kernels(output: Path) -> Report:
    """The Triton kernels themselves, interpreted in float64, on weights that FSDP2 has gathered."""
    config = llama_config(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    single = lora_llama(config, target_modules=["q_proj", "v_proj", "down_proj"]).double()
    sharded = shard(copy.deepcopy(single), own_head=True)
    with lk.implementation("triton"):
        loss_of(sharded, share(), dist.get_world_size()).backward()
    loss_of(single, slice(None), 1).backward()
    return {"gradient_error": worst_error(named_gradients(sharded), named_gradients(single))}


def checkpointed(output: Path) -> Report:
    """Activations recomputed in the backward pass, with dropout: the same masks again."""
    torch.manual_seed(3)
    model = lora_llama(lora_dropout=0.3)
    plain, replayed = shard(copy.deepcopy(model)), shard(model)
    # transformers 5.17 has the old name alone.
    new_name = hasattr(replayed, "activation_checkpointing_enable")
    enable = f"{'activation' if new_name else 'gradient'}_checkpointing_enable"
    getattr(replayed, enable)({"use_reentrant": False})
    found = []
    for sharded in (plain, replayed):
        torch.manual_seed(4 + dist.get_rank())
        loss_of(sharded, share(), dist.get_world_size()).backward()
        found.append(named_gradients(sharded))
    return {
        "bitwise": all(torch.equal(found[0][name], g) for name, g in found[1].items()),
        "gradients": len(found[1]),
    }


def mixed_precision(output: Path) -> Report:
    """bfloat16 in the blocks, float32 adapters and gradients: errors against float64."""
    exact = lora_llama().double()
    loss_of(exact, slice(None), 1).backward()
    oracle = named_gradients(exact)
    plain = lora_llama().bfloat16()
    with lk.implementation("reference"):
        loss_of(plain, slice(None), 1).backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = shard(lora_llama(), mp_policy=policy)
    loss_of(sharded, share(), dist.get_world_size()).backward()
    found, low = named_gradients(sharded), named_gradients(plain)
    return {
        "dtypes": sorted({str(gradient.dtype) for gradient in found.values()}),
        "ratios": {name: compare(found[name], low[name], g).ratio for name, g in oracle.items()},
    }


def low_precision_base(output: Path) -> Report:
    """A bfloat16 base with float32 adapters, without a policy: the same numbers as in one process.

    Each process computes the same rows, so that there is nothing to round differently.
    """
    single = LoraLlama(llama_config()).bfloat16()
    single.add_adapter("default", lk.LoraConfig(**OPTIONS))
    with_b(single)
    sharded = shard(copy.deepcopy(single))
    for model in (single, sharded):
        loss_of(model, slice(None), 1).backward()
    found, expected = named_gradients(sharded), named_gradients(single)
    return {
        "dtypes": sorted({str(parameter.dtype) for parameter in sharded.parameters()}),
        "gradient_error": worst_error(found, expected),
    }


def every_part(output: Path) -> Report:
    """DoRA, trained biases and a trained head: gradients, weights, and the file that they make."""
    config = llama_config(attention_bias=True, mlp_bias=True)
    single = lora_llama(config, use_dora=True, bias="all", modules_to_save=["lm_head"])
    sharded = shard(copy.deepcopy(single))
    report = against_one_process(sharded, single)
    sharded.save_pretrained(output / "every-part")
    if dist.get_rank() == 0:
        single.save_pretrained(output / "every-part-single")
        saved = [file_tensors(output / f"every-part{end}") for end in ("", "-single")]
        report["file_error"] = worst_error(*saved)
        report["kinds"] = sorted({key.rpartition(".")[2] for key in saved[0]})
    ids = batch(slice(None))["input_ids"][:1, :8]
    with torch.no_grad():
        # Without a backward pass the root's weights, as the trained head's, stay whole.
        sharded.eval()(input_ids=ids)
    state = sharded.get_adapter_state_dict()
    copy_adapter(sharded, "default", {key: value * 0.5 for key, value in state.items()})
    with torch.no_grad():
        sharded(input_ids=ids)
    copied = sharded.get_adapter_state_dict()
    report["copied"] = all(torch.equal(copied[key], value * 0.5) for key, value in state.items())
    head = full(sharded.lm_head.modules_to_save["default"].weight.detach())
    report["head_bitwise"] = torch.equal(head, state["lm_head.weight"] * 0.5)
    return report


def adapter_functions(output: Path) -> Report:
    """What LoraLlama offers for its adapters, on a sharded model."""
    torch.manual_seed(0)
    configs = {name: lk.LoraConfig(**OPTIONS) for name in ("default", "other")}
    single = with_b(LoraLlama(llama_config(), lora=configs))
    single.set_adapter("other")
    with_b(single).set_adapter("default")
    sharded = shard(copy.deepcopy(single))
    ids = batch(slice(None))["input_ids"][:1, :8]
    single.eval(), sharded.eval()

    def logits(model: nn.Module) -> Tensor:
        # Without a backward pass the root's parameters stay whole: plain tensors.
        with torch.no_grad():
            return model(input_ids=ids).logits

    def difference(action: Callable[[nn.Module], None]) -> float:
        for model in (single, sharded):
            action(model)
        return (logits(sharded) - logits(single)).abs().max().item()

    report: Report = {"base": difference(lambda model: None)}
    weights = {
        name: full(p.detach()).clone() for name, p in sharded.named_parameters()
    }  # fmt: skip
    before = logits(sharded)
    report["merged"] = difference(lambda model: model.merge_adapter())
    report["merging_changed"] = (logits(sharded) - before).abs().max().item()
    report["merged_moved"] = not torch.equal(
        full(sharded.model.layers[0].mlp.up_proj.weight.detach()),
        weights["model.layers.0.mlp.up_proj.weight"],
    )
    report["unmerged"] = difference(lambda model: model.unmerge_adapter())
    report["unmerged_bitwise"] = all(
        torch.equal(full(p.detach()), weights[name]) for name, p in sharded.named_parameters()
    )
    report["disabled"] = difference(lambda model: model.disable_adapters())
    report["enabled"] = difference(lambda model: model.enable_adapters())
    report["switched"] = difference(lambda model: model.set_adapter("other"))

    for model in (single.train(), sharded.train()):
        loss_of(model, slice(None), 1).backward()
    gradients = named_gradients(sharded)
    report["switched_gradients"] = worst_error(gradients, named_gradients(single))
    report["switched_names"] = all(name.endswith(".other") for name in gradients)
    rows = verify_gradients(sharded)
    report["verified"] = [row.adapter for row in rows] == ["other"] * 14
    norms = [(row.lora_a, row.lora_b) for row in verify_gradients(single)]
    report["norms_error"] = max(
        abs(a - b) / b
        for row, pair in zip(rows, norms, strict=True)
        for a, b in zip((row.lora_a, row.lora_b), pair, strict=True)
    )
    captured, expected = capture_lora_weights(sharded), capture_lora_weights(single)
    report["captured"] = captured.keys() == expected.keys() and all(
        torch.equal(captured[name], value) for name, value in expected.items()
    )

    state = sharded.get_adapter_state_dict("default")
    whole = single.get_adapter_state_dict("default")
    report["state_bitwise"] = state.keys() == whole.keys() and all(
        torch.equal(state[key], value) and not isinstance(state[key], DTensor)
        for key, value in whole.items()
    )
    logits(sharded.eval())
    copy_adapter(sharded, "other", {key: value * 0.5 for key, value in state.items()})
    copied = sharded.get_adapter_state_dict("other")
    report["copied"] = all(torch.equal(copied[key], value * 0.5) for key, value in whole.items())
    adapters.save_adapters(sharded, output / f"all-of-{dist.get_rank()}")
    report["saved"] = (output / f"all-of-{dist.get_rank()}").exists()
    report["refused"] = {
        "add_adapter": raised(lambda: sharded.add_adapter("new", lk.LoraConfig(**OPTIONS))),
        "load_adapter": raised(lambda: sharded.load_adapter(output / "all-of-0", "new")),
        "add_weighted_adapter": raised(
            lambda: sharded.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new")
        ),
        "delete_adapter": raised(lambda: sharded.delete_adapter("other")),
        "merge_and_unload": raised(sharded.merge_and_unload),
    }
    report["still"] = sorted(sharded.lora_configs)
    return report


def whole_model(output: Path) -> Report:
    """A LoraLlama without adapters is saved as the checkpoint that it is in one process."""
    torch.manual_seed(0)
    single = LoraLlama(llama_config())
    sharded = shard(copy.deepcopy(single))
    mine = output / f"base-of-{dist.get_rank()}"
    sharded.save_pretrained(mine)
    report = {"written": mine.exists(), "sharded": is_sharded(sharded)}
    if dist.get_rank() == 0:
        loaded = LoraLlama.from_pretrained(mine).state_dict()
        report["bitwise"] = loaded.keys() == single.state_dict().keys() and all(
            torch.equal(loaded[key], value) for key, value in single.state_dict().items()
        )
    return report


def head_adapter(output: Path) -> Report:
    """An adapter of the root's own unit, whose weights an evaluation leaves whole."""
    model = shard(lora_llama(target_modules=["q_proj", "lm_head"]))
    ids = batch(slice(None))["input_ids"]

    def evaluated() -> Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    def kept() -> dict[str, Tensor]:
        """The weights of the head and of q once all is sharded again; copies."""
        model.reshard()
        names = ("lora_A.default", "lora_B.default", "lm_head.weight")
        return {
            name: full(parameter.detach()).clone()
            for name, parameter in model.named_parameters()
            if name.endswith(names)
        }

    before, logits = kept(), evaluated()
    report: Report = {"plain": type(model.lm_head.weight) is nn.Parameter}
    state = model.get_adapter_state_dict()
    evaluated()
    copy_adapter(model, "default", {key: value * 0.5 for key, value in state.items()})
    halves = kept()
    # PEFT's file has the weight of a targeted head too.
    report["copied"] = len(halves) == 7 and all(
        torch.equal(halves[name], value / 2) for name, value in before.items()
    )
    copy_adapter(model, "default", state)
    evaluated()
    model.merge_adapter()
    report["merged"] = not torch.equal(kept()["lm_head.weight"], before["lm_head.weight"])
    report["merged_error"] = (evaluated() - logits).abs().max().item()
    model.unmerge_adapter()
    report["unmerged"] = all(torch.equal(kept()[name], value) for name, value in before.items())
    return report


def logits_free(output: Path) -> Report:
    """A head that is a unit, or part of one, computes the loss without logits as any frozen one."""
    whole, hooked = lora_llama(), shard(lora_llama(), own_head=True)
    alone = lora_llama()
    fully_shard(alone.lm_head)
    report: Report = {"logits": [], "errors": []}
    loss_of(whole, slice(None), 1).backward()
    expected = named_gradients(whole)
    for model in (shard(alone), shard(lora_llama(), own_head=True)):
        for _ in range(2):
            model.zero_grad()
            outputs = model(**batch(slice(None)))
            outputs.loss.backward()
            report["logits"].append(outputs.logits is not None)
            report["errors"].append(worst_error(named_gradients(model), expected))
    seen = []
    hooked.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    loss_of(hooked, slice(None), 1)
    report["hook_sees"] = [list(shape) for shape in seen]
    return report


def cases() -> Iterator[tuple[str, Callable[[Path], Report]]]:
    for kind in MODELS:
        yield f"ddp {kind}", lambda output, kind=kind: ddp(kind, output)
        yield f"fsdp {kind}", lambda output, kind=kind: fsdp(kind, output)
        yield f"fsdp own head {kind}", lambda output, kind=kind: fsdp(kind, output, own_head=True)
    for case in (
        accelerated_late, kernels, checkpointed, mixed_precision, low_precision_base, every_part,
        adapter_functions, head_adapter, whole_model, logits_free, faults,
    ):  # fmt: skip
        yield case.__name__, case


def main(directory: Path, dtype: str = "float32", *wanted: str) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    report = {}
    for name, case in cases():
        if wanted and name not in wanted:
            continue
        output = directory / name.replace(" ", "-")
        report[name] = case(output)
    (directory / f"report-{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
