"""Exactness of a whole LoraLlama: accumulation, checkpointing, packing, compilation, dtypes.

    loss of B sequences of unequal lengths = Σ over scored tokens / num_items

is the same number, with the same gradients, however sequences are batched, packed or recomputed.
"""

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from lora_kernels.testing import MAX_RATIO, compare
from lora_llama import LoraLlama, capture_lora_weights, verify_gradients
from lora_llama.gradients import unchanged_weights

VOCABULARY = 61
LENGTHS = (3, 31, 2, 17, 8, 23, 5, 12)
# The same float32 sums in another order, through two layers and back.
FLOAT32 = 1e-6


@pytest.fixture
def llama():
    """llama(dropout, ...): a tiny LoraLlama in training mode, every adapter away from zero."""

    def make(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **changes) -> LoraLlama:
        settings = {
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 256, "initializer_range": 0.15,
            "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
        torch.manual_seed(0)
        model = LoraLlama(LlamaConfig(**{**settings, **changes})).to(dtype)
        model.add_adapter(
            "default", lk.LoraConfig(r=5, target_modules="all-linear", lora_dropout=dropout)
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        return model.train()

    return make


def sequence(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, VOCABULARY, (1, length), generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def step(model: nn.Module, **inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the adapters' gradients of one pass, from one state of the random generator."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of the relative errors, as norms."""
    assert actual.keys() == expected.keys() and len(expected) == 28
    return max(
        ((actual[name] - value).norm() / value.norm()).item() for name, value in expected.items()
    )


def padded(sequences: list[Tensor]) -> dict[str, Tensor]:
    longest = max(ids.shape[1] for ids in sequences)
    pad = [nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids in sequences]
    ids = torch.cat(pad)
    mask = torch.arange(longest) < torch.tensor([[ids.shape[1]] for ids in sequences])
    return {"input_ids": ids, "attention_mask": mask.long(),
            "labels": ids.masked_fill(~mask, -100)}  # fmt: skip


def test_eight_sequences_at_once_equal_one_at_a_time(llama, figure):
    model = llama()
    sequences = [sequence(length) for length in LENGTHS]
    items = torch.tensor(sum(length - 1 for length in LENGTHS))
    loss, expected = step(model, **padded(sequences), num_items_in_batch=items)
    model.zero_grad()
    losses = [model(ids, labels=ids, num_items_in_batch=items).loss for ids in sequences]
    for part in losses:
        part.backward()
    gap = abs(sum(part.item() for part in losses) - loss.item()) / loss.item()
    error = largest_error(gradients(model), expected)
    figure(19, "loss, 1 x 8 against 8 x 1, relative", gap, FLOAT32)
    figure(19, "gradients, 1 x 8 against 8 x 1, relative", error, FLOAT32)
    assert gap <= FLOAT32 and error <= FLOAT32
    # The control: the mean of each sequence's own mean is another gradient.
    model.zero_grad()
    for ids in sequences:
        (model(ids, labels=ids).loss / len(sequences)).backward()
    assert largest_error(gradients(model), expected) > 0.01


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
def test_packed_sequences_have_the_gradients_of_separate_ones(attention, llama, figure):
    model = llama(attn_implementation=attention)
    sequences = [sequence(length) for length in LENGTHS]
    items = torch.tensor(sum(length - 1 for length in LENGTHS))
    loss, expected = step(model, **padded(sequences), num_items_in_batch=items)
    labels = torch.cat([nn.functional.pad(ids[:, 1:], (1, 0), value=-100) for ids in sequences], 1)
    packed = {
        "input_ids": torch.cat(sequences, 1),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "labels": labels,
        "num_items_in_batch": items,
    }
    together, actual = step(model, **packed)
    gap = abs(together.item() - loss.item()) / loss.item()
    error = largest_error(actual, expected)
    figure(19, "loss, packed against separate, relative", gap, FLOAT32)
    figure(19, "gradients, packed against separate, relative", error, FLOAT32)
    assert gap <= FLOAT32 and error <= FLOAT32
    # The control: without restarting positions the sequences see one another.
    _, mixed = step(model, **{**packed, "position_ids": None})
    assert largest_error(mixed, expected) > 0.01


@pytest.mark.kernel
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_of_the_kernels_keeps_every_bit(reentrant, llama, figure, device):
    """With dropout: the mask of the second forward pass is the first one's."""
    model = llama(dropout=0.3, num_hidden_layers=1).to(device)
    ids = sequence(5).to(device)
    with lk.implementation("triton"):
        _, expected = step(model, input_ids=ids, labels=ids)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        _, actual = step(model, input_ids=ids, labels=ids)
    assert len(expected) == 14
    different = sum(not torch.equal(actual[name], value) for name, value in expected.items())
    figure(18, "gradients that checkpointing changes", different, 0.0)
    assert not different


@pytest.mark.parametrize("reentrant", (None, False, True))
def test_one_step_trains_every_adapter(reentrant, llama, figure):
    model = llama(dropout=0.1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = capture_lora_weights(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, input_ids=sequence(19), labels=sequence(19))
    verify_gradients(model)
    optimizer.step()
    trained = [
        name for name, parameter in model.named_parameters()
        if "lora_B" in name and parameter.detach().any(dim=1).all()
    ]  # fmt: skip
    figure(18, "B matrices trained by one step, of 14", len(trained), combine="min")
    assert len(trained) == 14
    assert all("lora_A" in name for name in unchanged_weights(before, capture_lora_weights(model)))


def test_backward_twice_changes_nothing(llama, figure):
    """Gradients of a second backward pass over one graph; parameters and all that was saved."""
    model = llama(dropout=0.2)
    ids = sequence(21)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    saved: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    assert len(saved) > 50
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    second = torch.autograd.grad(loss, trained)
    changed = sum(not torch.equal(*pair) for pair in saved)
    changed += sum(not torch.equal(before[n], p) for n, p in model.named_parameters())
    changed += sum(not torch.equal(*pair) for pair in zip(first, second, strict=True))
    figure(14, "tensors of a model that a backward pass changes", changed, 0.0)
    assert not changed


AUTOCAST = (None, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("adapters", ("float32", "the base's"))
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("base", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(base, autocast, adapters, llama, figure):
    """Of logits, loss, hidden states and every gradient, in training and evaluation."""
    model = llama(dtype=base, num_hidden_layers=1)
    if adapters == "the base's":
        model.to(base)
    ids = sequence(13)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    plain = LlamaForCausalLM(model.config).to(base)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(ids).logits
        loss, found = step(model, input_ids=ids, labels=ids)
        (d_embedded,) = torch.autograd.grad(
            model(inputs_embeds=embedded, labels=ids).loss, embedded
        )
        model.eval()
        evaluated = model(ids, labels=ids)
        states, expected_states = (
            [state.dtype for state in either(ids, output_hidden_states=True).hidden_states]
            for either in (model, plain)
        )
    assert states == expected_states and d_embedded.dtype == base
    assert logits.dtype == evaluated.logits.dtype == (autocast or base)
    assert loss.dtype == evaluated.loss.dtype == torch.float32
    expected = torch.float32 if adapters == "float32" else base
    assert len(found) == 14 and {gradient.dtype for gradient in found.values()} == {expected}
    assert all(gradient.isfinite().all() for gradient in found.values())
    figure(16, "combinations of base, autocast and adapters", 1, combine="sum")


@pytest.fixture
def block_results(llama):
    """block_results(compile, dtype): the results of a block, compiled, eager, and in float64.

    Over 127 and 193 tokens, forward and backward: for each length three dicts of tensors.
    """

    def make(compile_block, dtype: torch.dtype) -> list[tuple[dict[str, Tensor], ...]]:
        model = llama()
        block = model.model.layers[0].to(dtype)
        exact = copy.deepcopy(block).double()
        torch._dynamo.reset()
        counters.clear()
        compiled = compile_block(block)
        found = []
        for length in (127, 193):
            generator = torch.Generator().manual_seed(length)
            hidden, dy = (
                torch.randn(2, length, 32, generator=generator).to(dtype) for _ in range(2)
            )
            tables = model.model.rotary_emb(hidden, torch.arange(length)[None])

            def results(function, module, hidden=hidden, dy=dy, tables=tables):
                kind = next(module.parameters()).dtype
                module.zero_grad()
                x = hidden.detach().to(kind, copy=True).requires_grad_()
                y = function(x, position_embeddings=tuple(table.to(kind) for table in tables))
                y.backward(dy.to(kind))
                return {"y": y.detach(), "d_x": x.grad, **gradients(module)}

            found.append((results(compiled, block), results(block, block), results(exact, exact)))
            assert len(found[-1][0]) == 16
        return found

    return make


def worst_ratio(found: list[tuple[dict[str, Tensor], ...]]) -> float:
    """The compiled results' largest error over the eager ones', both against float64."""
    return max(
        compare(compiled[name], eager[name], oracle[name]).ratio
        for compiled, eager, oracle in found
        for name in oracle
    )


@pytest.mark.slow
def test_a_block_compiles_to_one_graph_of_any_length(block_results, figure):
    """No graph break, one graph, eager's accuracy."""
    counter = CompileCounterWithBackend("aot_eager")
    found = block_results(
        lambda block: torch.compile(block, backend=counter, fullgraph=True, dynamic=True),
        torch.float32,
    )
    breaks = sum(counters["graph_break"].values())
    figure(17, "graph breaks of a block", breaks, 0.0)
    # The call around the block is a graph without operations.
    graphs = [
        graph for graph in counter.graphs
        if any(node.op == "call_function" for node in graph.graph.nodes)
    ]  # fmt: skip
    figure(17, "graphs of a block for lengths 127 and 193", len(graphs), 1.0)
    ratio = worst_ratio(found)
    figure(17, "compiled over eager error, aot_eager, float32", ratio, MAX_RATIO)
    assert len(graphs) == 1 and not breaks and ratio <= MAX_RATIO


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_a_compiled_block_by_inductor(dtype, block_results, figure):
    found = block_results(lambda block: torch.compile(block, fullgraph=True, dynamic=True), dtype)
    ratio = worst_ratio(found)
    short = str(dtype).removeprefix("torch.")
    figure(17, f"compiled over eager error, inductor, {short}", ratio, MAX_RATIO)
    assert ratio <= MAX_RATIO
