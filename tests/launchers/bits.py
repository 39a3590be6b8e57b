"""Models of which every rank leaves a digest of its own parameters."""

# Uses some of its parameters only, by step and rank.
USES_SOME = """
import atexit, hashlib, os, pathlib
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)) for _ in range(3)
        )
        self.calls = 0
        atexit.register(self.leave)

    def forward(self, x):
        if not torch.distributed.is_initialized():  # the check of model and data, before the ranks meet
            return sum(layer(x) for layer in self.layers)
        self.calls += self.training
        rank = torch.distributed.get_rank()
        return self.layers[(self.calls + rank) % 3](x) + self.layers[self.calls % 3](x)

    def leave(self):
        bits = b"".join(p.detach().numpy().tobytes() for p in self.parameters())
        pathlib.Path(f"bits-{os.getpid()}").write_text(hashlib.sha256(bits).hexdigest())
"""

USES_ALL = USES_SOME.replace("(self.calls + rank) % 3", "0").replace("self.calls % 3", "1").replace("range(3)", "range(2)")


def digests(folder):
    """The digests that the ranks left, and none stays for the next run."""
    files = list(folder.glob("bits-*"))
    found = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return found
