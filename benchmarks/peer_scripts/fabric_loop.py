"""The job with Lightning Fabric, which starts this script again for each further rank: https://lightning.ai/docs/fabric.

python fabric_loop.py --world_size 2

With --epochs a whole training, by the five steps of https://lightning.ai/docs/fabric/stable/fundamentals/convert.html:
``setup_dataloaders`` puts a DistributedSampler into each loader, which pads, and sets its epoch; ``all_gather`` as in
https://lightning.ai/docs/fabric/stable/advanced/distributed_communication.html. DDP and the loaders with their defaults.
"""

import fitting
import job
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader

if __name__ == "__main__":
    args = job.arguments()
    fabric = Fabric(accelerator="cpu", devices=args.world_size)
    fabric.launch()
    torch.set_num_threads(args.threads)
    if args.epochs:
        fabric.seed_everything(args.seed, verbose=False)  # of the sampler, too
    else:
        torch.manual_seed(0)
    model = job.CNN()
    if args.epochs:
        optimizer = job.sgd(model)
        recorder = fitting.Recorder(model, optimizer)
        model, optimizer = fabric.setup(model, optimizer)
        train, test = fabric.setup_dataloaders(*fitting.loaders(fabric.world_size))
        recorder.done(fitting.fit(model, optimizer, train, test, args.epochs, fabric.backward, fabric.all_gather))
    else:
        model, optimizer = fabric.setup(model, job.sgd(model))
        loader = fabric.setup_dataloaders(DataLoader(job.digits(), batch_size=job.GLOBAL_BATCH // fabric.world_size))
        job.train(model, optimizer, loader, args.steps, fabric.backward)
