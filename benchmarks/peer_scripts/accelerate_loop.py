"""The job with Hugging Face Accelerate: https://huggingface.co/docs/accelerate/quicktour.

ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 accelerate_loop.py    (--multi_gpu: several processes)

With --epochs a whole training, as the guide converts a loop: the loaders go through ``prepare``, which shares their batches out
(even_batches: the last ones are filled up from the start), and ``gather_for_metrics`` leaves what was filled up out of the
accuracy. DDP and the loaders with their defaults.
"""

import fitting
import job
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

if __name__ == "__main__":
    args = job.arguments()
    torch.set_num_threads(args.threads)
    accelerator = Accelerator()
    torch.manual_seed(args.seed)
    model = job.CNN()
    if args.epochs:
        optimizer = job.sgd(model)
        recorder = fitting.Recorder(model, optimizer)
        model, optimizer, train, test = accelerator.prepare(model, optimizer, *fitting.loaders(accelerator.num_processes))
        recorder.done(fitting.fit(model, optimizer, train, test, args.epochs, accelerator.backward, accelerator.gather_for_metrics))
    else:
        loader = DataLoader(job.digits(), batch_size=job.GLOBAL_BATCH // accelerator.num_processes)
        model, optimizer, loader = accelerator.prepare(model, job.sgd(model), loader)
        job.train(model, optimizer, loader, args.steps, accelerator.backward)
    accelerator.end_training()
