"""A checkpoint that is not all there is refused before a training is begun or a file written."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from lora_llama import state_files, training
from lora_llama.batching import SupervisedDataset
from lora_llama.options import FinetuneOptions
from lora_llama.resuming import check_checkpoint, read_state
from lora_llama.training import finetune

BATCH = "per_device_train_batch_size x gradient_accumulation_steps x number of processes"
DIGEST = "SHA-256 of the encoded rows, in their order"
ROWS = [{"prompt": f"add {i}+1", "completion": str(i + 1)} for i in range(8)]


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneOptions:
    """The options of a training of four steps, which saved a checkpoint after the second."""
    directory = tmp_path_factory.mktemp("training")
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = FinetuneOptions(
        model=str(tiny_llama), data=str(data), output_dir=str(directory / "output"),
        dtype="float32", val_set_size=0, max_steps=4, save_steps=2, warmup_steps=0, lora_r=2,
        lora_target_modules="q_proj,up_proj",
    )  # fmt: skip
    finetune(options)
    return options


@pytest.fixture
def checkpoint(trained: FinetuneOptions, tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    return shutil.copytree(Path(trained.output_dir) / "checkpoint-2", tmp_path / "checkpoint-2")


@pytest.fixture
def refused(trained, checkpoint, tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Resumes from the checkpoint, in vain; returns the error's message."""

    def resume(**changes: Any) -> str:
        output = tmp_path / "new"
        options = dataclasses.replace(
            trained, resume_from_checkpoint=str(checkpoint), output_dir=str(output), **changes
        )
        capsys.readouterr()
        with pytest.raises((ValueError, OSError)) as caught:
            finetune(options)
        assert not output.exists()
        return str(caught.value)

    return resume


def never(*_: Any, **__: Any) -> None:
    pytest.fail("the model was loaded")


def test_the_checkpoint_itself_is_complete(trained, checkpoint, tmp_path):
    check_checkpoint(str(checkpoint), {"default": trained.lora_config()})
    assert read_state(str(checkpoint)).global_step == 2
    options = dataclasses.replace(
        trained, resume_from_checkpoint=str(checkpoint), output_dir=str(tmp_path / "new")
    )
    _, result = finetune(options)
    assert result.steps == 4 and [step for step, _ in result.train_losses] == [1, 2, 3, 4]


NEEDED = [
    "adapter_config.json", "adapter_model.safetensors", "optimizer.json", "optimizer.safetensors",
    "scheduler.json", "rng_state_0.json", "rng_state_0.safetensors", "training.json",
]  # fmt: skip
FAULTS: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut at its end": lambda content: content[:-8],
}


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_all_there(name, fault, refused, checkpoint, monkeypatch):
    monkeypatch.setattr(training.LoraLlamaForCausalLM, "from_pretrained", never)
    file = checkpoint / name
    content = FAULTS[fault](file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    message = refused()
    assert message.startswith("resume_from_checkpoint: ") and str(file) in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [], "expected a JSON object, got list"),
        (lambda state: None, "expected a JSON object, got NoneType"),
        (lambda state: {}, "global_step: expected an integer of at least 1, got 0"),
        (
            lambda state: state | {"global_step": "2"},
            "global_step: expected an integer of at least 1, got '2'",
        ),
        (lambda state: state | {"something": "new"}, "unexpected keyword argument 'something'"),
    ],
)
def test_a_state_of_another_kind(change, message, refused, checkpoint, monkeypatch):
    monkeypatch.setattr(training.LoraLlamaForCausalLM, "from_pretrained", never)
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    found = refused()
    assert found.startswith("resume_from_checkpoint: ") and f"{file}: " in found
    assert message in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "r: expected 2, got 8"),
        ({"lora_alpha": 9}, "lora_alpha: expected 32, got 9"),
        ({"use_rslora": True}, "use_rslora: expected False, got True"),
        ({"lora_dropout": 0.3}, "lora_dropout: expected 0.0, got 0.3"),
        # The weights below the adapter would be others.
        ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True, got pissa"),
        ({"seed": 7}, "seed: expected 42, got 7"),
        ({"per_device_train_batch_size": 2}, f"{BATCH}: expected 4, got 2"),
        ({"gradient_accumulation_steps": 2}, f"{BATCH}: expected 4, got 8"),
        ({"max_length": 11}, f"{DIGEST}: expected HEX, got HEX"),
        ({"train_on_inputs": True}, f"{DIGEST}: expected HEX, got HEX"),
        (
            {"packing": True},
            f"training rows: expected 8, got 1; {DIGEST}: expected HEX, got HEX",
        ),
        (
            {"val_set_size": 2},
            f"training rows: expected 8, got 6; {DIGEST}: expected HEX, got HEX",
        ),
        (
            {"val_set_size": 2, "seed": 7, "per_device_train_batch_size": 1, "lora_dropout": 0.5},
            f"training rows: expected 8, got 6; {DIGEST}: expected HEX, got HEX; "
            f"seed: expected 42, got 7; {BATCH}: expected 4, got 1; "
            "lora_dropout: expected 0.0, got 0.5",
        ),
    ],
)
def test_another_training(changes, message, refused, checkpoint, monkeypatch):
    monkeypatch.setattr(training.LoraLlamaForCausalLM, "from_pretrained", never)
    found = re.sub("[0-9a-f]{64}", "HEX", refused(**changes))
    assert found == f"resume_from_checkpoint: {checkpoint} is of another training: {message}"


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [*rows[:-1], {"prompt": rows[-1]["prompt"], "completion": "x"}],
        lambda rows: [{"prompt": "ADD 0+1", "completion": "1"}, *rows[1:]],
        lambda rows: [rows[1], rows[0], *rows[2:]],
    ],
)
def test_other_data_of_the_same_number(change, trained, refused, tmp_path):
    data = tmp_path / "other.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in change(ROWS)))
    assert f"is of another training: {DIGEST}: expected " in refused(data=str(data))


def test_the_digest_of_a_dataset():
    def digest(*rows: list[int], **more: list[int]) -> str:
        items = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
        items[0] |= {name: torch.tensor(values) for name, values in more.items()}
        return SupervisedDataset(items).sha256

    assert digest([1, 2], [3]) == digest([1, 2], [3])
    others = [
        digest([1], [2, 3]), digest([3], [1, 2]), digest([1, 2, 3]), digest([1, 2], [3], [4]),
        digest([1, 2], [3], labels=[-100, 2]), digest([1, 2], [3], position_ids=[0, 1]),
    ]  # fmt: skip
    assert len({digest([1, 2], [3]), *others}) == 1 + len(others)


def test_the_trainer_itself_refuses_another_training(trained, checkpoint, tmp_path):
    """As `finetune` does: a training of one's own may begin here."""
    options = dataclasses.replace(
        trained, output_dir=str(tmp_path / "new"), max_steps=1, save_steps=0
    )
    trainer, _ = finetune(options)
    trainer.args.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match=f"another training: {BATCH}: expected 4, got 8"):
        trainer.train(str(checkpoint))


def test_the_same_global_batch_goes_on(trained, checkpoint, tmp_path):
    options = dataclasses.replace(
        trained, resume_from_checkpoint=str(checkpoint), output_dir=str(tmp_path / "new"),
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-5,
        logging_steps=2, save_steps=1,
    )  # fmt: skip
    _, result = finetune(options)
    assert result.steps == 4 and (tmp_path / "new" / "checkpoint-3").exists()


@pytest.mark.parametrize(("state", "kind"), [([1], "list"), ("x", "str"), (None, "NoneType")])
def test_a_record_of_another_kind(state, kind, refused, checkpoint, monkeypatch):
    monkeypatch.setattr(training.LoraLlamaForCausalLM, "from_pretrained", never)
    file = checkpoint / "training.json"
    file.write_bytes(state_files.to_files(state)[".json"])
    assert refused() == f"resume_from_checkpoint: {file}: expected an object, got {kind}"


def test_an_adapter_of_other_layers_is_refused_with_every_key(refused, checkpoint):
    message = refused(lora_target_modules="q_proj,v_proj")
    assert message.startswith(f"resume_from_checkpoint: {checkpoint}: the adapter does not fit")
    for projection, word in (("mlp.up_proj", "unexpected"), ("self_attn.v_proj", "missing")):
        keys = re.findall(rf"{word} (model\.layers\.\d\.{projection}\.lora_[AB]\.weight)", message)
        assert len(set(keys)) == 4


def test_a_checkpoint_of_pickles_is_refused_by_name(refused, checkpoint, monkeypatch):
    monkeypatch.setattr(training.LoraLlamaForCausalLM, "from_pretrained", never)
    pickles = ("optimizer.pt", "rng_state.pth", "scheduler.pt")
    for path in [*checkpoint.glob("optimizer*"), *checkpoint.glob("scheduler*")]:
        path.unlink()
    for path in checkpoint.glob("rng_state*"):
        path.unlink()
    for name in pickles:
        (checkpoint / name).write_bytes(b"not read")
    message = refused()
    assert message.startswith(
        f"resume_from_checkpoint: {checkpoint} was saved by an older version or transformers: "
        "optimizer.pt, rng_state.pth, scheduler.pt: pickles can run code and are never loaded"
    )


def test_a_checkpoint_of_no_process_is_refused(refused, checkpoint, monkeypatch):
    monkeypatch.setattr(training.LoraLlamaForCausalLM, "from_pretrained", never)
    for path in checkpoint.glob("rng_state*"):
        path.unlink()
    assert refused() == f"resume_from_checkpoint: {checkpoint / 'rng_state_0.json'} is missing"


@pytest.mark.parametrize("name", ["push_to_hub", "deepspeed"])
def test_what_would_be_saved_as_a_pickle_is_refused(name, trained, monkeypatch):
    make = FinetuneOptions.training_arguments

    def changed(self: FinetuneOptions, has_eval: bool) -> Any:
        arguments = make(self, has_eval)
        if name == "push_to_hub":
            arguments.push_to_hub = True
        return arguments

    monkeypatch.setattr(FinetuneOptions, "training_arguments", changed)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self: None)
    if name == "deepspeed":
        original = Trainer.create_accelerator_and_postprocess

        def with_deepspeed(self: Any) -> None:
            original(self)
            self.is_deepspeed_enabled = True

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(ValueError, match="pickle"):
        finetune(trained)
