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

import common.loop  # noqa: F401  what a rank imports
from common import acceleration, datasets, events, models, optimizers
from common.config import TrainConfig
from common.errors import UsageError, exit_status
from common.files import write_json
from common.lean import spare_the_compiler
from common.precision import Precision


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
    device = torch.device("cpu")
    precision = Precision(config, device)
    acceleration.check(config, device)
    if not config.compile:
        spare_the_compiler()
    data, _ = datasets.load_datasets(config, device, precision.weights)
    model = acceleration.placed(models.build_model(config), config, device, precision.weights)
    if config.compile:
        acceleration.compile(model)
    optimizer = optimizers.make(model, config)
    phases.mark("model_built")
    x, y = datasets.fetch(data, torch.arange(config.global_batch(1)), device, precision.weights)
    with precision.autocast():
        loss, _ = models.loss_and_logits(model, models.takes_labels(model), x, y)
    precision.backward(loss)
    precision.step(optimizer)
    phases.mark("first_step_done")
    marks = phases.marks
    write_json(sys.argv[3], {"launcher": "floor", "launch_seconds": marks["first_step_done"], "phases": marks})


if __name__ == "__main__":
    sys.exit(exit_status(main))
