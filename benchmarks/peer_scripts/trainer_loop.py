"""The job with the Hugging Face Trainer: https://huggingface.co/docs/transformers/main_classes/trainer.

torchrun --standalone --nproc_per_node=2 trainer_loop.py --epochs 10

A model of one's own, as that page asks for it: it takes ``labels`` and returns the loss first. Only a whole training; the Trainer
evaluates after each epoch. Changed from its defaults, so that it trains what the others train and does nothing besides: SGD for
AdamW, a constant learning rate, no clipping of gradients, no checkpoints, logs or progress bar. Left: DDP's search for unused
parameters (the Trainer's choice for models that are not from transformers), its loaders, its filling up of the last batches.
"""

import os
import tempfile
from typing import Any

import fitting
import job
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from transformers import EvalPrediction, Trainer, TrainingArguments


class WithLoss(nn.Module):
    """The CNN in the Trainer's words."""

    def __init__(self) -> None:
        """Holds it."""
        super().__init__()
        self.cnn = job.CNN()

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 1, 28, 28) and labels (n,) → (mean loss, logits (n, 10))."""
        logits = self.cnn(images)
        return F.cross_entropy(logits, labels), logits


class Named(Dataset[dict[str, Tensor]]):
    """Samples as the keyword arguments of ``WithLoss.forward``."""

    def __init__(self, data: TensorDataset) -> None:
        """Wraps ``data``."""
        self.data = data

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample."""
        image, label = self.data[index]
        return {"images": image, "labels": label}


def accuracy(found: EvalPrediction) -> dict[str, Any]:
    """The Trainer's ``compute_metrics``."""
    return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}


if __name__ == "__main__":
    args = job.arguments()
    settings = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        seed=args.seed,
        num_train_epochs=args.epochs or 1,
        per_device_train_batch_size=job.GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        per_device_eval_batch_size=fitting.TEST_BATCH,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,  # there is no GPU to pin for
    )
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = WithLoss()
    optimizer = job.sgd(model)
    recorder = fitting.Recorder(model.cnn, optimizer)
    trainer = Trainer(
        model,
        settings,
        train_dataset=Named(job.digits()),
        eval_dataset=Named(job.digits(test=True)),
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
    )
    trainer.train()
    recorder.done([line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line][-1])
