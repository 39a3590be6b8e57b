"""The Hugging Face Trainer: the same job in its loop; alone, or started by whatever starts ranks.

python launchers/hf_trainer.py
torchrun --nproc_per_node=2 launchers/hf_trainer.py
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 launchers/hf_trainer.py     (with GPUs without the variable)
mpirun -np 2 python launchers/hf_trainer.py

torchrun, accelerate or mpirun
  |-- python hf_trainer.py    RANK=0 ...  Trainer --.  DistributedDataParallel, made by accelerate,
  `-- python hf_trainer.py    RANK=1 ...  Trainer --+-- which the Trainer brings along
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command_line import parse_config
from common.config import MASTER_FLAGS, TrainConfig
from common.errors import UsageError, exit_status
from common.events import Phases
from common.nesting import check_accelerate, mpi_world
from common.rank import Rank, rank_number
from common.training import train


def rank_from_variables(environment: Mapping[str, str], config: TrainConfig) -> Rank:
    """The rank that torchrun's, accelerate's or mpirun's variables describe; without any, a process on its own."""
    address, port = config.master_addr or "127.0.0.1", config.master_port or 29500
    if environment.get("WORLD_SIZE"):
        world_size = rank_number(environment, "WORLD_SIZE")
        local = rank_number(environment, "LOCAL_RANK"), rank_number(environment, "LOCAL_WORLD_SIZE", world_size)
        return Rank(
            "hf_trainer",
            rank_number(environment, "RANK"),
            world_size,
            *local,
            rank_number(environment, "GROUP_RANK", 0),
            address,
            port,
            restart=rank_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
        )
    if world := mpi_world(environment):
        return Rank("hf_trainer", world.rank, world.size, world.local_rank, world.local_size, 0, address, port, one_terminal=True)
    return Rank("hf_trainer")


def fit(config: TrainConfig, rank: Rank, phases: Phases) -> None:
    """Hands the job to the Trainer."""
    try:
        from transformers import Trainer, TrainingArguments
    except ImportError as error:
        raise UsageError(f"hf_trainer.py: {error.name} is missing; pip install -e '.[hf]' in this folder") from None
    from common import hf_job

    job = hf_job.Session(config, rank, phases)
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = Trainer(
            job.model,
            TrainingArguments(output_dir=f"{config.save}.trainer" if config.save else nowhere, **job.arguments()),
            data_collator=hf_job.Collate(job.model),
            train_dataset=job.train_data,
            eval_dataset=job.eval_data,
            compute_metrics=lambda found: hf_job.accuracy(found.predictions, found.label_ids),
            optimizers=(job.optimizer, job.schedule),
        )
        trainer.train()
    job.finish(trainer.state.log_history)


def main() -> None:
    """This process is one rank."""
    config = parse_config("hf_trainer.py", __doc__ or "", MASTER_FLAGS)
    rank = rank_from_variables(os.environ, config)
    if not rank.forms_group:
        check_accelerate(rank.launchers)
    else:  # for accelerate, which joins the group
        numbers = {"RANK": rank.rank, "WORLD_SIZE": rank.world_size, "LOCAL_RANK": rank.local_rank, "MASTER_PORT": rank.master_port}
        os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": rank.master_addr or ""}
    train(config, rank, fit)


if __name__ == "__main__":
    mpi = mpi_world(os.environ)
    sys.exit(exit_status(main, speaks=(str(mpi.rank) if mpi else os.environ.get("LOCAL_RANK", "0")) == "0"))
