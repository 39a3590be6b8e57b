"""The job with Lightning Fabric, which starts this script again for each further rank: https://lightning.ai/docs/fabric.

python fabric_loop.py --world_size 2
"""

import job
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader

if __name__ == "__main__":
    args = job.arguments()
    fabric = Fabric(accelerator="cpu", devices=args.world_size)
    fabric.launch()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = job.CNN()
    model, optimizer = fabric.setup(model, job.sgd(model))
    loader = fabric.setup_dataloaders(DataLoader(job.digits(), batch_size=job.GLOBAL_BATCH // fabric.world_size))
    job.train(model, optimizer, loader, args.steps, fabric.backward)
