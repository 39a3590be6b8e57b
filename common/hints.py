"""What PyTorch's errors mean here, and what to do: a sentence for each whose cause is known. Standard library only."""

from __future__ import annotations

# A part of the error's text, in small letters → the sentence.
_KNOWN = (
    (
        "expected to have finished reduction",
        "the model has parameters that this step did not use, and DDP waits for their gradients; give --find_unused_parameters",
    ),
    (
        "duplicate gpu detected",
        "two ranks use the same GPU; start at most as many ranks as there are GPUs (--nproc_per_node), or give --backend gloo",
    ),
    (
        "re-initialize cuda in forked",
        "CUDA was used before the ranks were forked, which it does not survive; give --start_method spawn",
    ),
    ("too many open files", "this process may open too few files; ulimit -n 65536 raises the limit of this shell"),
    ("shared memory segment", "/dev/shm is too small; give the container --shm-size=1g (docker run)"),
    ("shared memory(shm)", "/dev/shm is too small; give the container --shm-size=1g (docker run)"),
    ("unable to allocate shared memory", "/dev/shm is too small; give the container --shm-size=1g (docker run)"),
)


def hint(error: BaseException) -> str:
    """What to do about ``error``; empty where its own text has to do."""
    text = str(error).lower()
    return next((sentence for phrase, sentence in _KNOWN if phrase in text), "")
