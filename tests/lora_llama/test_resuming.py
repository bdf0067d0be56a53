"""A checkpoint that is not all there is refused before a training is begun or a file written."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from lora_llama import training
from lora_llama.options import FinetuneOptions
from lora_llama.resuming import check_checkpoint, read_state
from lora_llama.training import finetune

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
    "scheduler.json", "rng_state_0.json", "rng_state_0.safetensors",
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
        (lambda state: {}, "global_step: expected at least 1, got 0"),
        (lambda state: state | {"global_step": "2"}, "global_step: expected at least 1, got '2'"),
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
        ({"lora_r": 8}, "has an adapter with r=2; this one has r=8"),
        ({"lora_alpha": 9}, "has an adapter with lora_alpha=32; this one has lora_alpha=9"),
        (
            {"use_rslora": True},
            "has an adapter with use_rslora=False; this one has use_rslora=True",
        ),
    ],
)
def test_an_adapter_with_other_options(changes, message, refused, checkpoint, monkeypatch):
    monkeypatch.setattr(training.LoraLlamaForCausalLM, "from_pretrained", never)
    assert refused(**changes) == f"resume_from_checkpoint: {checkpoint} {message}"


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
