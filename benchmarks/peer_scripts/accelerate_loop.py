"""The job with Hugging Face Accelerate: https://huggingface.co/docs/accelerate/quicktour.

ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 accelerate_loop.py    (--multi_gpu: several processes)
"""

import job
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

if __name__ == "__main__":
    args = job.arguments()
    torch.set_num_threads(args.threads)
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = job.CNN()
    loader = DataLoader(job.digits(), batch_size=job.GLOBAL_BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, job.sgd(model), loader)
    job.train(model, optimizer, loader, args.steps, accelerator.backward)
    accelerator.end_training()
