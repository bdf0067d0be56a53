"""An accelerated PEFT model in transformers' own Trainer; sharded over processes where launched so.

    accelerate launch --config_file fsdp2.yaml train_peft.py DIRECTORY

DIRECTORY then has the adapter, in PEFT's format, and losses.json.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from distributed_worker import batch, fused_calls, peft_model
from finetune_sharded import shard_on_cpus
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer, TrainingArguments

from lora_kernels.sharding import is_sharded

ROWS = 4


def main(directory: Path) -> None:
    processes = dist.get_world_size() if dist.is_initialized() else 1
    rows = batch(slice(None))
    trainer = Trainer(
        model=peft_model(),
        args=TrainingArguments(
            output_dir=str(directory / "trainer"),
            max_steps=3,
            per_device_train_batch_size=ROWS // processes,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
        ),
        train_dataset=[{name: tensor[row] for name, tensor in rows.items()} for row in range(ROWS)],
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if dist.is_initialized():
        calls = fused_calls(model)
        print(f"process {dist.get_rank()}: sharded {is_sharded(model)}, calls {calls}")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if trainer.is_world_process_zero():
        model.save_pretrained(directory, state_dict=state)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        (directory / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        shard_on_cpus()
    main(Path(sys.argv[1]))
    if dist.is_initialized():
        dist.destroy_process_group()
