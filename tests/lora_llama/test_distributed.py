"""More than one process: DDP and FSDP2, in two gloo processes on a CPU, against one process.

The measurements of `distributed_worker.py` are judged here, and whole trainings are launched as a
user would launch them: with torchrun, and with accelerate and a configuration for FSDP2. What needs
several GPUs (NCCL, overlapping communication, memory of a device) is not tested.
"""

import fcntl
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch import Tensor

from lora_kernels.adapter_files import load_adapter
from lora_kernels.testing import MAX_RATIO
from lora_llama.options import FinetuneOptions
from lora_llama.trainer import LoraTrainer
from lora_llama.training import finetune

HERE = Path(__file__).parent
PROCESSES = 2
# Sums of float32 in another order; measured are 2.5e-7 at most.
SAME = 1e-6

README = (HERE.parents[1] / "README.md").read_text()


def of_readme(kind: str, part: str) -> list[str]:
    """The README's code blocks of a kind that have a part in them."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)
    return [block for block in blocks if part in block]


(FSDP2,) = of_readme("yaml", "distributed_type: FSDP")


def readme_commands(program: str) -> list[list[str]]:
    """The README's commands that launch `finetune` by a program, without the latter's options."""
    blocks = "".join(of_readme("bash", "finetune")).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if line.startswith(program)]
    return [shlex.split(line.partition(" finetune ")[0]) for line in lines]


def launch(*command: str | Path, others: Sequence[Sequence[str | Path]] = ()) -> str:
    """Runs processes to their end; returns what they have printed.

    Args:
        others: what is launched beside it, as on other machines.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "TRITON_INTERPRET": "1",
    }
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", *map(str, words)], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for words in (command, *others)
    ]  # fmt: skip
    try:
        printed = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    for machine, text in zip(machines, printed, strict=True):
        assert machine.returncode == 0, text[-6000:]
    return "".join(printed)


def torchrun(*command: str | Path, processes: int = PROCESSES) -> str:
    return launch(
        "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command
    )


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Fills a directory, once for all test processes; returns it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    @contextmanager
    def locked(name: str) -> Iterator[None]:
        with open(root / f"{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def run(name: str, fill: Callable[[Path], object]) -> Path:
        directory, marker = root / name, root / f"{name}.done"
        with locked(name):
            if not marker.exists():
                directory.mkdir(exist_ok=True)
                fill(directory)
                marker.touch()
        return directory

    return run


@pytest.fixture(scope="session")
def measured(once) -> list[dict[str, dict[str, Any]]]:
    """The worker's measurements: of each process, by case."""
    directory = once("worker", lambda path: torchrun(HERE / "distributed_worker.py", path))
    return [
        json.loads((directory / f"report-{rank}.json").read_text()) for rank in range(PROCESSES)
    ]


PARALLEL = [
    f"{how} {kind}" for how in ("ddp", "fsdp", "fsdp own head") for kind in ("lora_llama", "peft")
]


@pytest.mark.parametrize("case", [*PARALLEL, "every_part"])
def test_gradients_are_those_of_one_process_on_the_whole_batch(case, measured, figure):
    for report in measured:
        found = report[case]
        # A and B of seven projections of two layers; or magnitudes, biases and the head as well.
        assert found["gradients"] == (57 if case == "every_part" else 28)
        figure(20, "gradients of 2 processes against 1, relative", found["gradient_error"], SAME)
        assert found["gradient_error"] <= SAME
        assert found["loss_error"] <= SAME * 5
        assert found["weight_error"] <= SAME


@pytest.mark.parametrize("case", [*PARALLEL, "every_part"])
def test_ranks_agree_to_the_bit_after_several_steps(case, measured, figure):
    different = sum(not report[case]["ranks_equal"] for report in measured)
    figure(20, "processes that differ after several steps", different, 0.0, combine="sum")
    assert all(report[case]["ranks_equal"] for report in measured)


def test_ranks_that_differ_are_seen_to(measured):
    for report in measured:
        assert list(report["faults"].values()) == [False] * 3, report["faults"]


FSDP = [case for case in PARALLEL if case.startswith("fsdp")]


@pytest.mark.parametrize("case", FSDP)
def test_each_process_holds_half_of_the_frozen_base(case, measured):
    # 97 rows of the embedding and the head are 49 and 48.
    shares = [report[case]["base_share"] for report in measured]
    assert sum(shares) == pytest.approx(1) and shares[0] == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize("case", [*FSDP, "every_part"])
def test_the_adapter_is_saved_once_and_whole(case, measured):
    if case != "every_part":
        assert [report[case]["written"] for report in measured] == [True, False]
    else:
        assert measured[0][case]["kinds"] == ["bias", "lora_magnitude_vector", "weight"]
    assert measured[0][case]["file_error"] <= SAME


@pytest.mark.parametrize("case", FSDP)
def test_the_operations_see_plain_weights(case, measured):
    # o and down alone, q, k, v and gate, up together, in two layers; as without sharding.
    assert measured[0][case]["fused_calls"] == [[4, 4], [4, 4]]


@pytest.mark.kernel
def test_kernels_on_gathered_weights(measured):
    assert measured[0]["kernels"]["gradient_error"] <= 1e-12


def test_a_sharded_peft_model_can_be_accelerated_and_restored(measured):
    found = measured[0]["accelerated_late"]
    assert max(found["gradient_errors"]) <= SAME
    assert found["fused_calls"] == [[4, 4], [0, 0]]
    assert "sharded" in found["status"]


def test_activation_checkpointing_with_dropout_replays_the_same_masks(measured):
    for report in measured:
        assert report["checkpointed"] == {"bitwise": True, "gradients": 28}


def test_a_mixed_precision_policy(measured):
    found = measured[0]["mixed_precision"]
    assert found["dtypes"] == ["torch.float32"] and len(found["ratios"]) == 28
    assert max(found["ratios"].values()) <= MAX_RATIO


def test_a_16_bit_base_with_float32_adapters(measured):
    found = measured[0]["low_precision_base"]
    assert found == {"dtypes": ["torch.bfloat16", "torch.float32"], "gradient_error": 0.0}


def test_adapters_of_a_sharded_model_are_merged_switched_copied_and_read(measured):
    for rank, report in enumerate(measured):
        found = report["adapter_functions"]
        for action in ("base", "merged", "unmerged", "disabled", "enabled", "switched"):
            assert found[action] <= SAME, action
        assert 0 < found["merging_changed"] <= 1e-4 and found["merged_moved"]
        assert found["switched_gradients"] <= SAME and found["norms_error"] <= SAME
        for fact in (
            "unmerged_bitwise", "switched_names", "verified", "captured", "state_bitwise", "copied"
        ):  # fmt: skip
            assert found[fact], fact
        everything = report["every_part"]
        assert everything["copied"] and everything["head_bitwise"]
        # Rank 0 alone writes.
        assert found["saved"] == (rank == 0)


def test_what_cannot_be_done_with_a_sharded_model_says_what_can(measured):
    for report in measured:
        found = report["adapter_functions"]
        refused = found["refused"]
        for action in ("add_adapter", "load_adapter", "add_weighted_adapter"):
            assert refused[action].endswith("; add them before fully_shard")
        assert refused["delete_adapter"].endswith("; set_adapter switches it off")
        assert "`lora-llama merge`" in refused["merge_and_unload"]
        assert found["still"] == ["default", "other"]


def test_a_sharded_model_without_adapters_is_saved_as_a_checkpoint(measured):
    assert measured[0]["whole_model"] == {"written": True, "sharded": True, "bitwise": True}
    assert measured[1]["whole_model"] == {"written": False, "sharded": True}


def test_an_evaluation_before_it_does_not_lose_what_is_written(measured):
    for report in measured:
        found = dict(report["head_adapter"])
        assert 0 < found.pop("merged_error") <= 1e-4
        # Plain is what the case is about: the weights were not sharded at that time.
        assert found == {"plain": True, "copied": True, "merged": True, "unmerged": True}


def test_a_head_that_is_a_unit_of_its_own_needs_no_logits(measured):
    found = measured[0]["logits_free"]
    assert not any(found["logits"]) and len(found["logits"]) == 4
    assert max(found["errors"]) <= SAME
    # A hook of the user's gets them all the same.
    assert found["hook_sees"] == [[4, 11, 97]]


@pytest.mark.long
def test_four_processes_of_which_some_have_no_part_of_a_small_weight(tmp_path):
    """A has 3 rows; in float64, so that the order of a sum is no matter."""
    cases = [*PARALLEL, "every_part", "head_adapter"]
    torchrun(HERE / "distributed_worker.py", tmp_path, "float64", *cases, processes=4)
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(4)]
    for rank, report in enumerate(reports):
        assert sorted(report) == sorted(cases)
        for case in [*PARALLEL, "every_part"]:
            found = report[case]
            assert found["ranks_equal"]
            assert max(found["gradient_error"], found["weight_error"]) <= 1e-12
            if rank == 0 and not case.startswith("ddp"):
                assert found["file_error"] <= 1e-12
        assert report["head_adapter"]["copied"] and report["head_adapter"]["unmerged"]
    for case in FSDP:
        assert [report[case]["written"] for report in reports] == [True, False, False, False]
        assert sum(report[case]["base_share"] for report in reports) == pytest.approx(1)


# Whole trainings. A global batch is four rows: of one process, or two of each of two.


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process computes where the two do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def options(tiny_llama: Path, sums, write_rows) -> FinetuneOptions:
    """Six optimizer steps of four rows; a checkpoint after the third, and the last."""
    return FinetuneOptions(
        model=str(tiny_llama), data=write_rows(sums), dtype="float32", val_set_size=4, max_steps=6,
        save_steps=3, eval_steps=3, warmup_steps=0, learning_rate=1e-2, lora_r=4,
        per_device_train_batch_size=4,
    )  # fmt: skip


def arguments(options: FinetuneOptions, output: Path, **changes: Any) -> list[str]:
    """The command line of a process of two."""
    settings = asdict(options) | {
        "output_dir": str(output),
        "per_device_train_batch_size": options.per_device_train_batch_size // PROCESSES,
        **changes,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    return ["finetune", *(f"--{key}={json.dumps(v).strip(chr(34))}" for key, v in given.items())]


def replicated(options: FinetuneOptions, output: Path, **changes: Any) -> str:
    return torchrun("-m", "lora_llama.cli", *arguments(options, output, **changes))


def fsdp2_launcher(output: Path) -> list[str | Path]:
    """accelerate with the README's configuration, for two processes of one machine."""
    config = output.with_suffix(".yaml")
    config.write_text(FSDP2)
    processes = ["--num_processes", str(PROCESSES), "--main_process_port", "0"]
    return ["accelerate.commands.launch", "--config_file", config, *processes]


def sharded(options: FinetuneOptions, output: Path, **changes: Any) -> str:
    printed = launch(
        *fsdp2_launcher(output), HERE / "finetune_sharded.py",
        *arguments(options, output, **changes),
    )  # fmt: skip
    # The model, its two blocks, and the embedding, norm and head that accelerate takes together.
    assert SHARDED in printed
    return printed


SHARDED = "sharded: True, 6 units of ['DTensor']"


WAYS: dict[str, Callable[..., str]] = {"ddp": replicated, "fsdp2": sharded}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def assert_same_training(output: Path, expected: Path) -> None:
    """The same losses and adapter to 1e-5: Adam enlarges the differences of small gradients."""
    for kind in ("train_losses", "eval_losses"):
        found, wanted = metrics(output)[kind], metrics(expected)[kind]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        for (_, loss), (_, other) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(other, rel=1e-5)
    weights, others = adapter(output), adapter(expected)
    assert weights.keys() == others.keys()
    for key, weight in others.items():
        assert weights[key].shape == weight.shape
        assert (weights[key] - weight).norm() <= 1e-5 * weight.norm(), key


def adapter(output: Path) -> dict[str, Tensor]:
    return load_adapter(output)[1]


@pytest.fixture
def one_process(options, once) -> Path:
    """The output of the training in one process."""

    def fill(directory: Path) -> None:
        options.output_dir = str(directory / "output")
        finetune(options)

    return once("one-process", fill) / "output"


@pytest.fixture
def two_processes(way, options, once) -> tuple[Path, str]:
    """The output of the same training in two processes, and what they printed."""

    def fill(directory: Path) -> None:
        (directory / "printed.txt").write_text(WAYS[way](options, directory / "output"))

    directory = once(f"two-processes-{way}", fill)
    return directory / "output", (directory / "printed.txt").read_text()


def test_two_processes_train_as_one_does(two_processes, one_process):
    output, printed = two_processes
    assert_same_training(output, one_process)
    # One process alone prints and writes.
    assert printed.count("trainable params: ") == 1 and printed.count("6 steps, ") == 1
    names = {path.relative_to(output) for path in output.rglob("*")}
    expected = {path.relative_to(one_process) for path in one_process.rglob("*")}
    generators = {
        Path(f"checkpoint-{step}/rng_state_1{end}")
        for step in (3, 6)
        for end in (".json", ".safetensors")
    }
    assert names == expected | generators


def test_the_speed_is_that_of_all_processes():
    trainer = object.__new__(LoraTrainer)
    trainer.tokens_trained, trainer.seconds_trained = 10, 2.0
    trainer.args = SimpleNamespace(device="cpu")
    for processes, speed in ((1, 5.0), (2, 10.0)):
        trainer.accelerator = SimpleNamespace(
            num_processes=processes, reduce=lambda numbers, how, count=processes: numbers * count
        )
        assert trainer.tokens_per_second() == speed


def test_one_process_goes_on_from_two(two_processes, one_process, options, tmp_path):
    options.output_dir = str(tmp_path / "resumed")
    options.resume_from_checkpoint = str(two_processes[0] / "checkpoint-3")
    finetune(options)
    assert_same_training(tmp_path / "resumed", one_process)


@pytest.mark.long
def test_two_processes_go_on_from_one(way, one_process, options, tmp_path):
    checkpoint = str(one_process / "checkpoint-3")
    WAYS[way](options, tmp_path / "resumed", resume_from_checkpoint=checkpoint)
    assert_same_training(tmp_path / "resumed", one_process)


@pytest.mark.long
def test_two_processes_go_on_from_themselves_to_the_bit(way, options, tmp_path):
    """With dropout, so that each process has to have its own generator back."""
    changes = {"lora_dropout": 0.2, "gradient_accumulation_steps": 2, "max_steps": 4}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    WAYS[way](options, whole, **changes)
    checkpoint = str(whole / "checkpoint-3")
    WAYS[way](options, resumed, resume_from_checkpoint=checkpoint, **changes)
    assert metrics(resumed)["train_losses"] == metrics(whole)["train_losses"]
    found, wanted = adapter(resumed), adapter(whole)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.long
def test_checkpointed_activations_accumulation_and_packing(way, options, tmp_path):
    options.gradient_checkpointing = options.packing = True
    options.gradient_accumulation_steps, options.max_length = 2, 64
    options.max_steps, options.save_steps = 2, 0
    WAYS[way](options, tmp_path / "two")
    options.output_dir = str(tmp_path / "one")
    finetune(options)
    assert_same_training(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
def test_a_16_bit_base_is_trained_in_two_processes(way, options, tmp_path):
    """Every process rounds its own rows: the losses agree to bfloat16's precision."""
    options.dtype = "bfloat16"
    WAYS[way](options, tmp_path / "two")
    options.output_dir = str(tmp_path / "one")
    finetune(options)
    for (_, loss), (_, other) in zip(
        metrics(tmp_path / "two")["train_losses"], metrics(tmp_path / "one")["train_losses"],
        strict=True,
    ):  # fmt: skip
        assert loss == pytest.approx(other, rel=2**-8)
    assert {str(tensor.dtype) for tensor in adapter(tmp_path / "two").values()} == {"torch.float32"}


@pytest.mark.long
@pytest.mark.parametrize("first", WAYS)
def test_a_sharded_training_goes_on_replicated_and_back(first, options, one_process, tmp_path):
    (second,) = WAYS.keys() - {first}
    begun, resumed = tmp_path / "begun", tmp_path / "resumed"
    WAYS[first](options, begun)
    WAYS[second](options, resumed, resume_from_checkpoint=str(begun / "checkpoint-3"))
    assert_same_training(resumed, one_process)


@pytest.mark.long
def test_accelerate_replicates(options, one_process, tmp_path):
    launch(
        "accelerate.commands.launch", "--multi_gpu", f"--num_processes={PROCESSES}",
        "--main_process_port=0", "-m", "lora_llama.cli", *arguments(options, tmp_path / "two"),
    )  # fmt: skip
    assert_same_training(tmp_path / "two", one_process)
    assert (tmp_path / "two" / "checkpoint-3" / "rng_state_1.json").exists()


@pytest.mark.long
def test_a_peft_model_in_transformers_trainer_is_sharded_by_accelerate(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    script = str(HERE / "train_peft.py")
    subprocess.run([sys.executable, script, one], check=True, capture_output=True, timeout=300)
    layer = ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    printed = launch(*fsdp2_launcher(two), *layer, script, two, "sharded")
    assert all(f"process {rank}: sharded True, calls [4, 4]" in printed for rank in (0, 1))
    losses, expected = (json.loads((path / "losses.json").read_text()) for path in (two, one))
    assert len(losses) == 3 and losses == pytest.approx(expected, rel=1e-6)
    weights, others = adapter(two), adapter(one)
    assert weights.keys() == others.keys() and len(weights) == 28
    for key, weight in others.items():
        assert (weights[key] - weight).abs().max() <= SAME * weight.abs().max(), key


def test_accelerate_accepts_the_launch_commands_of_the_readme():
    one, two = readme_commands("accelerate")
    parser = launch_command_parser()
    for command, machines, processes in ((one, None, None), (two, 2, 16)):
        parsed = parser.parse_args(command[2:])
        assert (parsed.num_machines, parsed.num_processes) == (machines, processes)
        assert parsed.config_file == "fsdp2.yaml"
        assert parsed.module and parsed.training_script == "lora_llama.cli"


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_two_machines_train_by_the_launch_commands_of_the_readme(
    way, options, one_process, tmp_path
):
    """Two launchers of one process each, beside one another."""
    output, config = tmp_path / "two", tmp_path / "fsdp2.yaml"
    config.write_text(FSDP2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    here = {
        "host1": "127.0.0.1", "29500": port, "host1:29500": f"127.0.0.1:{port}", "8": "1",
        "16": "2", "fsdp2.yaml": str(config),
    }  # fmt: skip
    command = readme_commands("torchrun" if way == "ddp" else "accelerate")[1]
    command = [here.get(word, word) for word in command]
    script: list[str | Path] = ["-m", "lora_llama.cli"]
    if way == "ddp":
        first = ["torch.distributed.run", *command[1:-2]]
        second = first
    else:
        script = [HERE / "finetune_sharded.py"]
        first = ["accelerate.commands.launch", *command[2:-2]]
        rank = first.index("--machine_rank") + 1
        second = [*first[:rank], "1", *first[rank + 1 :]]
    rest = [*script, *arguments(options, output)]
    printed = launch(*first, *rest, others=[[*second, *rest]])
    assert way == "ddp" or SHARDED in printed
    assert_same_training(output, one_process)
    assert (output / "checkpoint-3" / "rng_state_1.json").exists()
