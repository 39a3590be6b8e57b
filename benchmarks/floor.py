"""The floor under every launch time: one interpreter that imports what a rank imports, and makes one optimizer step.

No launcher, no flags, no process group. anatomy.py runs it as ``python benchmarks/floor.py CONFIG --result FILE``, CONFIG being
a TrainConfig as JSON.
"""

import gc
import json
import sys
from pathlib import Path

gc.disable()  # as common.training does while it imports: what no rank pays is not in the floor
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import datasets, events, loop, models
from common.config import TrainConfig
from common.errors import UsageError, exit_status
from common.files import write_json
from common.lean import spare_the_compiler


def main() -> None:
    """Makes the job's first step, as loop.run does on one rank."""
    phases = events.Phases(events.command_started([]))
    gc.freeze()
    gc.enable()
    phases.mark("torch_imported")
    if len(sys.argv) != 4:
        raise UsageError("floor.py takes CONFIG --result FILE: benchmarks/anatomy.py gives them; run that")
    config = TrainConfig(**json.loads(sys.argv[1]))
    torch.set_num_threads(config.threads or torch.get_num_threads())
    spare_the_compiler()
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[config.precision]
    device = torch.device("cpu")
    data, _ = datasets.load_datasets(config, device, dtype)
    model = models.build_model(config).to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=loop.MOMENTUM)
    phases.mark("model_built")
    x, y = datasets.fetch(data, torch.arange(config.global_batch(1)), device, dtype)
    loss, _ = models.loss_and_logits(model, models.takes_labels(model), x, y)
    loss.backward()
    optimizer.step()
    phases.mark("first_step_done")
    marks = phases.marks
    write_json(sys.argv[3], {"launcher": "floor", "launch_seconds": marks["first_step_done"], "phases": marks})


if __name__ == "__main__":
    sys.exit(exit_status(main))
