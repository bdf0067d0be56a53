"""`lora-llama finetune`, sharded by accelerate (FSDP2) over processes on a CPU.

    accelerate launch --config_file fsdp2.yaml finetune_sharded.py finetune --model ...

accelerate shards over accelerators only: on a CPU it passes over the setting without a word, and
replicates. So it is told here that these processes are of the kind that it shards; all that follows
is its own code, transformers' and ours.
"""

import sys

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType

from lora_llama import cli, training
from lora_llama.training import LoraTrainer


def shard_on_cpus() -> None:
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def main() -> int:
    shard_on_cpus()
    seen: list[LoraTrainer] = []
    finetune = training.finetune

    def watched(*args, **kwargs):
        trainer, result = finetune(*args, **kwargs)
        seen.append(trainer)
        return trainer, result

    cli.finetune = watched
    code = cli.main()
    if seen and seen[0].is_world_process_zero():
        parameters = dict(seen[0].model.named_parameters())
        kinds = sorted({type(parameter).__name__ for parameter in parameters.values()})
        units = sum(type(m).__name__.startswith("FSDP") for m in seen[0].model.modules())
        print(f"sharded: {seen[0].accelerator.is_fsdp2}, {units} units of {kinds}")
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
