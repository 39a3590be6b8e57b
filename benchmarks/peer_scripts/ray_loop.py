"""The job with Ray Train: https://docs.ray.io/en/latest/train/getting-started-pytorch.html.

python ray_loop.py --world_size 2
"""

import tempfile
from typing import Any

import job
import ray
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig
from torch.utils.data import DataLoader


def train_func(config: dict[str, Any]) -> None:
    """One rank; Ray has joined the process group."""
    torch.set_num_threads(config["threads"])
    torch.manual_seed(0)
    model = ray.train.torch.prepare_model(job.CNN())
    batch_size = job.GLOBAL_BATCH // ray.train.get_context().get_world_size()
    loader = ray.train.torch.prepare_data_loader(DataLoader(job.digits(), batch_size=batch_size))
    job.train(model, job.sgd(model), loader, config["steps"])


if __name__ == "__main__":
    args = job.arguments()
    ray.init(num_cpus=args.world_size, include_dashboard=False)  # as many as ranks, also where there are fewer cores
    with tempfile.TemporaryDirectory() as folder:
        trainer = ray.train.torch.TorchTrainer(
            train_func,
            train_loop_config={"threads": args.threads, "steps": args.steps},
            scaling_config=ScalingConfig(num_workers=args.world_size),
            run_config=RunConfig(storage_path=folder),
        )
        trainer.fit()
    ray.shutdown()
