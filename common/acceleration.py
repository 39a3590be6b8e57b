"""What makes a step faster on its device, or its batch statistics right; the model stays the same."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import TrainConfig
from common.errors import UsageError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 1 << 30


def check(config: TrainConfig, device: torch.device) -> None:
    """Refuses what ``device`` or this machine cannot do.

    Raises:
        UsageError: --sync_batchnorm without CUDA, or --compile without a compiler.
    """
    if config.sync_batchnorm and device.type != "cuda":
        raise UsageError(
            f"--sync_batchnorm on {device.type}: PyTorch's SyncBatchNorm runs on CUDA only; leave it out (each rank then "
            "normalises with its own part's statistics), or take a model with LayerNorm or GroupNorm"
        )
    if config.compile:
        _check_compiler(device)


def _check_compiler(device: torch.device) -> None:
    """Asks where torch.compile would ask: its C++ compiler is $CXX, else g++ (macOS: clang++)."""
    import sysconfig

    from torch._inductor import config, cpp_builder, exc

    config.compile_threads = 1  # a rank compiles by itself: no pool of workers to be left behind, or to fight for the cores
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UsageError(
                "--compile on cuda: needs Triton, which is not here (pip install triton) or not for this GPU; leave it out"
            )
    if device.type == "mps":
        return
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UsageError(
            f"--compile: no C++ compiler ({config.cpp.cxx[-1]} cannot be run); install one (Debian: apt install g++), name one "
            "with CXX, or leave it out"
        ) from None
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        raise UsageError(
            f"--compile: compiled code includes {headers}, which is not there; install Python's headers (Debian: apt install "
            "python3-dev), or leave it out"
        )


def keep_freed_memory() -> None:
    """Has glibc keep what tensors have freed, and use it for the next ones.

    By default it maps each tensor above a threshold (128 KiB, growing to 32 MiB) anew and returns the end of its heap once 128 KiB
    are free there, so the same pages are fetched and zeroed by the kernel every step (mallopt(3), M_MMAP_THRESHOLD and
    M_TRIM_THRESHOLD). Five epochs of the digits CNN on one core of an EPYC: 2.4 s instead of 2.8, and 100 MiB more at the end.

    Raises:
        UsageError: the C library is not glibc.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)):
        raise UsageError("--keep_memory: only glibc (most of Linux) can be told to, which is not here; leave it out")


def placed(model: nn.Module, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """``model`` on ``device`` as ``dtype``, laid out in memory as ``--channels_last`` says."""
    model = model.to(device, dtype)
    if config.channels_last:
        for tensor in [*model.parameters(), *model.buffers()]:  # not model.to(memory_format=…): it fails on five dimensions
            tensor.data = channels_last(tensor.data)
    return model


def channels_last(tensor: Tensor) -> Tensor:
    """The same numbers with a pixel's channels side by side in memory, where there are pixels: shape (n, channels, height, width).

    Convolutions read a pixel's channels together; with the usual layout their library rearranges them first, every time.
    """
    if tensor.ndim != 4:
        return tensor
    _, channels, height, width = tensor.shape
    # Of one channel torch says that it is in this layout already, but its strides do not, and convolutions go by those.
    strides = (height * width * channels, 1, width * channels, channels)
    return tensor.contiguous(memory_format=torch.channels_last).as_strided(tensor.shape, strides)


def with_common_statistics(model: nn.Module) -> nn.Module:
    """``model`` with each BatchNorm as a SyncBatchNorm: its statistics are of all ranks' samples, so N ranks normalise as one does.

    It talks over the default process group in forward and backward and needs no DDP: it goes with every ``--sync``.

    Raises:
        UsageError: there is no BatchNorm.
    """
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise UsageError("--sync_batchnorm: this model has no BatchNorm, so there is nothing to synchronise; leave it out")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def compile(model: nn.Module) -> None:
    """Compiles ``model`` in place, when it is first called; before DDP wraps it.

    PyTorch's advice: the compiler does not handle DDP's wrapper well, and finds the buckets from within
    (https://docs.pytorch.org/docs/stable/compile/programming_model.where_to_apply_compile.html). What is compiled is kept in
    $TORCHINDUCTOR_CACHE_DIR, by default a folder in the system's temporary one, for the other ranks and the next run.
    """
    model.compile()
