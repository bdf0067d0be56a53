"""The peers compute the same thing; one that does not, or has no gradient, has no figures."""

import copy
import importlib
from types import ModuleType

import pytest
import torch

from bench import measure
from bench.cases import emulated_step
from bench.check import StepReference, check_op, check_step, gradient_fault
from bench.machine import dtype_of
from bench.models import (
    _restored,
    build_base,
    build_peer,
    draw_adapters,
    draw_tokens,
    step_peers,
)
from bench.ops import build_op, op_peers, op_plan
from bench.peer import writing
from bench.shapes import (
    ELEMENTWISE,
    GROUPS,
    LLAMA_8B,
    TINY,
    OpCase,
    StepCase,
)
from lora_kernels.lora_linear.plan import plan

CPU = torch.device("cpu")
RATES = {"matmul": {"float32": 1e12, "bfloat16": 1e12}, "copy": 1e11}
STEP = StepCase(TINY, 2, 2, 24, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("part", [*GROUPS, *ELEMENTWISE, "head"])
def test_peers_of_an_operation_agree(part, dtype):
    case = OpCase(TINY, part, 40, dtype)
    peers = op_peers(case, CPU)
    checked = check_op(build_op(case, CPU, 0, peers))
    assert list(checked) == peers
    for name, verdict in checked.items():
        assert verdict.fault is None, f"{name}: {verdict.fault}"
        assert all(norm > 0 for norm in verdict.gradient_norms.values())
    first, ours = checked[peers[0]], checked["ours"]
    assert first.gradient_norms.keys() <= ours.gradient_norms.keys()
    if part in GROUPS:
        assert set(ours.gradient_norms) == {
            "d_x",
            *(f"d_lora_{ab}{i}" for ab in "ab" for i in range(len(GROUPS[part]))),
        }


def test_projections_have_every_peer():
    assert op_peers(OpCase(TINY, "o", 8, "float32"), CPU) == ["frozen", "peft", "addmm", "ours"]
    in_16_bits = op_peers(OpCase(TINY, "o", 8, "bfloat16"), CPU)
    assert in_16_bits == ["frozen", "peft", "peft_bf16", "addmm", "ours"]
    assert op_plan(OpCase(TINY, "o", 8, "float32"), CPU).startswith("eager (")


def test_the_plan_of_a_group_is_one(monkeypatch):
    """On a GPU the plan is asked for all projections that one operation computes."""
    monkeypatch.setattr("bench.ops.resolve", lambda impl, device, dtype: "triton")
    op = importlib.import_module("lora_kernels.lora_linear.op")
    monkeypatch.setattr(op, "architecture", lambda device: "sm_90")
    cuda = torch.device("cuda")
    case = OpCase(LLAMA_8B, "qkv", 8192, "bfloat16")
    expected = plan(8192, (4096, 1024, 1024), 4096, (16, 16, 16), torch.bfloat16, "sm_90")
    assert op_plan(case, cuda) == str(expected)
    assert op_plan(OpCase(LLAMA_8B, "swiglu", 8192, "bfloat16"), cuda) == "triton"


def test_peft_has_the_adapter_dtype_that_its_name_says():
    op = build_op(OpCase(TINY, "o", 8, "bfloat16"), CPU, 0, ["peft", "peft_bf16"])
    dtypes = {name: peer.trained["lora_a0"].dtype for name, peer in op.peers.items()}
    assert dtypes == {"peft": torch.float32, "peft_bf16": torch.bfloat16}


@pytest.mark.parametrize(
    ("mutate", "fault"),
    [
        (lambda t: t["lora_b0"].zero_(), "d_lora_a0: gradient is zero"),
        (lambda t: t["lora_b0"].mul_(1.001), "wrong: "),
        (lambda t: t["x"].mul_(1.001), "wrong: "),
        (lambda t: t["lora_a0"].fill_(float("nan")), "NaN or Inf"),
    ],
)
@pytest.mark.parametrize("name", ["addmm", "peft"])
def test_a_peer_that_is_wrong_is_found(name, mutate, fault):
    """The oracle is of other inputs than the peer, whose own tensors are changed."""
    op = build_op(OpCase(TINY, "o", 40, "float32"), CPU, 0, ["frozen", name])
    peer = op.peers[name]
    with torch.no_grad():
        x = peer.trained["x"]
        x.set_(x.clone())
        mutate(peer.trained)
    checked = check_op(op)
    assert checked["frozen"].fault is None
    assert fault in checked[name].fault


def test_a_peer_that_raises_has_a_fault():
    op = build_op(OpCase(TINY, "swiglu", 8, "float32"), CPU, 0, ["transformers", "ours"])

    def fails():
        raise RuntimeError("no kernel\nfor this")

    op.peers["ours"].forward = fails
    assert check_op(op)["ours"].fault == "RuntimeError: no kernel"


def test_ours_must_give_the_same_bits_twice():
    op = build_op(OpCase(TINY, "swiglu", 8, "float32"), CPU, 0, ["ours"])
    peer = op.peers["ours"]
    forward, calls = peer.forward, []

    def drifts():
        (y,) = forward()
        calls.append(1)
        # The last bit of the smallest element, every other time.
        return (y + y.detach().abs().min() * torch.finfo(y.dtype).eps * (len(calls) % 2),)

    peer.forward = drifts
    assert check_op(op)["ours"].fault == "not deterministic: two calls gave different bits"


def test_missing_and_zero_gradients_are_named():
    one, zero = torch.ones(2), torch.zeros(2)
    assert gradient_fault({"a": one}) is None
    assert gradient_fault({"a": one, "b": zero}) == "b: gradient is zero"
    assert gradient_fault({"a": None}) == "a: no gradient"
    assert gradient_fault({}) == "no gradients at all"
    assert gradient_fault({str(i): zero for i in range(9)}).endswith("and 6 more")


def test_a_case_with_zero_gradients_gives_no_time(monkeypatch):
    """The measurement of a peer whose gradients are zero is a fault, not a figure."""
    honest = measure.build_op

    def without_adapter(*arguments):
        op = honest(*arguments)
        with torch.no_grad():
            op.peers["addmm"].trained["lora_b0"].zero_()
        return op

    monkeypatch.setattr(measure, "build_op", without_adapter)
    measured = measure.measure_op(OpCase(TINY, "o", 16, "float32"), CPU, RATES, 0.0)
    assert measured.faults == {"addmm": "d_lora_a0: gradient is zero"}
    assert set(measured.samples) == {"frozen", "peft", "ours"}
    addmm, ours = measured.record["peers"]["addmm"], measured.record["peers"]["ours"]
    assert addmm["fault"] == "d_lora_a0: gradient is zero"
    assert "seconds" not in addmm
    assert ours["seconds"]["count"] == 3
    assert ours["over_base"]["median"] > 0
    assert ours["over_ours"]["median"] == 1
    assert ours["tokens_per_s"] == pytest.approx(16 / ours["seconds"]["median"])
    assert ours["floor_share"] == pytest.approx(
        measured.record["floor"]["seconds"] / ours["seconds"]["median"]
    )


@pytest.fixture(scope="module")
def step_setting():
    """By dtype: the base, adapters, tokens, and PEFT's step in the next wider dtype."""
    settings = {}
    for dtype in ("float32", "bfloat16"):
        base = build_base(StepCase(TINY, 2, 2, 24, dtype), CPU)
        ids = draw_tokens(STEP, base.config.vocab_size, CPU)
        adapters = draw_adapters(base, STEP.r)
        wider = copy.deepcopy(base).to(measure.WIDER[dtype])
        settings[dtype] = (
            base,
            adapters,
            ids,
            StepReference.of(build_peer("peft", wider, adapters, ids)),
        )
    return settings


def checked_step(step_setting, name, dtype="float32", mutate=None):
    base, adapters, ids, reference = step_setting[dtype]
    peft = check_step("peft", build_peer("peft", base, adapters, ids), reference, dtype)
    assert peft.fault is None
    peer = build_peer(name, base, adapters, ids)
    if mutate is not None:
        with torch.no_grad():
            mutate(peer)
    return check_step(name, peer, reference, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for dtype in ("float32", "bfloat16")
        for name in step_peers(StepCase(TINY, 2, 2, 24, dtype), torch.device("meta"))
    ],
)
def test_peers_of_a_step_agree(step_setting, name, dtype):
    base, _, _, reference = step_setting[dtype]
    before = {key: value.clone() for key, value in base.state_dict().items()}
    checked = checked_step(step_setting, name, dtype)
    assert checked.fault is None, checked.fault
    assert checked.gradient_norms["least"] > 0
    # With B at 0.02 the adapters change the loss, so a model without them is not taken for one.
    if name == "frozen":
        assert abs(checked.loss - reference.loss) / reference.loss > 1e-3
    for key, value in base.state_dict().items():
        assert torch.equal(value, before[key]), f"{name} changed the shared weight {key}"


@pytest.mark.parametrize("name", ["addmm", "ours"])
@pytest.mark.parametrize(
    ("mutate", "fault"),
    [
        (lambda p: p.trained["1.mlp.down_proj.lora_B"].mul_(1.1), "wrong: "),
        (lambda p: p.trained["0.self_attn.k_proj.lora_B"].zero_(), "gradient is zero"),
        (lambda p: p.trained["0.self_attn.q_proj.lora_A"].requires_grad_(False), "no gradient"),
        (lambda p: p.trained["0.mlp.up_proj.lora_A"].fill_(float("inf")), "NaN or Inf"),
    ],
)
def test_a_step_that_is_wrong_is_found(step_setting, name, mutate, fault):
    assert fault in checked_step(step_setting, name, mutate=mutate).fault


def test_a_peer_with_other_adapters_than_the_reference_is_refused(step_setting):
    reference = step_setting["float32"][3]
    with pytest.raises(ValueError, match="gradients: expected the reference's"):
        reference.error({"0.self_attn.q_proj.lora_A": torch.ones(1)})


def test_base_weights_are_in_memory_once(step_setting):
    base, adapters, ids, _ = step_setting["float32"]
    expected = base.model.layers[1].mlp.up_proj.weight.data_ptr()
    for name in ("peft", "addmm", "ours"):
        model = build_peer(name, base, adapters, ids).model
        shared = [p.data_ptr() for n, p in model.named_parameters() if "1.mlp.up_proj" in n]
        assert expected in shared, name


def test_adapters_are_the_same_in_16_bits():
    adapters = draw_adapters(build_base(STEP, CPU), STEP.r)
    assert len(adapters) == 2 * 7 * 2
    for tensor in adapters.values():
        assert torch.equal(tensor, tensor.to(dtype_of("bfloat16")).float())
        assert tensor.any()


def test_a_module_is_restored_after_its_names_were_replaced():
    module = ModuleType("models")
    module.norm = "own"
    with pytest.raises(RuntimeError), _restored(module):
        module.norm = "another"
        raise RuntimeError
    assert module.norm == "own"


def test_a_wrong_loss_is_found_where_the_gradients_are_right(step_setting):
    base, adapters, ids, reference = step_setting["float32"]
    off = StepReference(reference.loss * 1.0001, reference.gradients, 1e-6)
    checked = check_step("addmm", build_peer("addmm", base, adapters, ids), off, "float32")
    assert checked.fault.startswith("wrong: loss")


def test_a_decode_case_is_checked_as_it_is_timed():
    """Without autograd another kernel may run: its outputs count, and there are no gradients."""
    case = OpCase(TINY, "o", 1, "float32", backward=False, training=False)
    op = build_op(case, CPU, 0, ["peft", "ours"])
    recorded = []
    forward = op.peers["ours"].forward

    def without_autograd():
        recorded.append(torch.is_grad_enabled())
        return tuple(1.01 * y for y in forward())

    op.peers["ours"].forward = without_autograd
    checked = check_op(op, training=False)
    assert recorded == [False]
    assert checked["peft"].as_json() == {"error_ratio": checked["peft"].error_ratio}
    assert checked["ours"].fault.startswith("wrong: y0")


def test_the_emulated_dtype_has_the_peers_of_its_targets():
    assert step_peers(emulated_step("bfloat16", "tiny"), CPU) == ["frozen", "peft", "ours"]


def test_in_inner_blocks_dx_flows_through_all_peers(step_setting):
    base, adapters, ids, _ = step_setting["float32"]
    assert StepCase(LLAMA_8B, 2, 1, 8, "float32").inner
    assert not STEP.inner
    exact = build_peer("peft", base, adapters, ids, inner=True)
    exact.step()
    for name in ("frozen", "accelerated", "addmm", "ours"):
        peer = build_peer(name, base, adapters, ids, inner=True)
        peer.step()
        gradient = peer.gradients()["inputs_embeds"]
        assert gradient.shape == (2, 24, 64)
        if name != "frozen":
            assert peer.gradients().keys() == exact.gradients().keys()
            expected = exact.gradients()["inputs_embeds"]
            assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5
    assert "inputs_embeds" not in build_peer("ours", base, adapters, ids).trained


def test_a_peer_that_writes_into_its_inputs_is_restored():
    """As Liger does: the gradient lands where the input was, in dy where it can."""
    inputs = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    original = inputs["x"].clone()

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return x.detach().copy_(dy.mul_(2))

    peer = writing(lambda t: (Doubled.apply(t["x"]),), ["x"])(inputs)
    dy = torch.ones(3, 4)
    peer.dys = (dy.clone(),)
    peer.restore.append((peer.dys[0], dy))
    for _ in range(2):
        results = peer.results()
        assert torch.equal(results["y0"], 2 * original)
        assert torch.equal(results["d_x"], torch.full((3, 4), 2.0))
    peer.run(True)
    assert not torch.equal(peer.trained["x"], original)
    peer.refresh()
    assert torch.equal(peer.trained["x"], original)
    assert torch.equal(inputs["x"], original)


@pytest.mark.parametrize("name", ["peft", "addmm"])
def test_a_wrong_gradient_is_found_where_the_loss_is_right(step_setting, name):
    base, adapters, ids, reference = step_setting["float32"]
    peer = build_peer(name, base, adapters, ids)
    if name == "peft":
        # The yardstick itself must not be wrong.
        wrong = {key: 2 * g for key, g in reference.gradients.items()}
        off = StepReference(reference.loss, wrong)
    else:
        off = StepReference(reference.loss, dict(reference.gradients), 1e-6)
        off.gradients["1.mlp.gate_proj.lora_A"] = 1.001 * off.gradients["1.mlp.gate_proj.lora_A"]
    fault = check_step(name, peer, off, "float32").fault
    assert fault.startswith("wrong: the gradients' error is ")


def test_peft_steps_have_the_dtypes_that_their_names_say(step_setting):
    base, adapters, ids, _ = step_setting["bfloat16"]
    found = {}
    for name in ("peft", "peft_autocast", "peft_bf16", "accelerated", "ours"):
        peer = build_peer(name, base, adapters, ids)
        autocast = []
        norm = next(m for n, m in peer.model.named_modules() if n.endswith("model.norm"))
        norm.register_forward_hook(
            lambda *_, a=autocast: a.append(torch.is_autocast_enabled("cpu"))
        )
        peer.step()
        found[name] = (peer.trained["0.mlp.up_proj.lora_A"].dtype, autocast)
    assert found == {
        "peft": (torch.float32, [False]),
        "peft_autocast": (torch.float32, [True]),
        "peft_bf16": (torch.bfloat16, [False]),
        "accelerated": (torch.float32, [False]),
        "ours": (torch.float32, [False]),
    }
