"""How fast a device multiplies matrices at best, by its maker's data sheet, and how much of that a training uses."""

from __future__ import annotations

import torch

# Dense products of bfloat16 (V100, T4: float16), in FLOP/s, of a GPU whose name holds the word. Source: NVIDIA's data sheets, the
# figures without sparsity.
_HALF = (
    ("H200", 989.4e12),
    ("H100 PCIe", 756.0e12),
    ("H100 NVL", 835.0e12),
    ("H100", 989.4e12),
    ("A100", 312.0e12),
    ("L40S", 362.0e12),
    ("L4", 121.0e12),
    ("V100", 125.0e12),
    ("T4", 65.0e12),
)


def peak_flops(device: torch.device, half: bool) -> float | None:
    """FLOP/s of ``device`` in half precision; None where it is not known, and for other precisions."""
    if device.type != "cuda" or not half:
        return None
    words = torch.cuda.get_device_name(device)
    return next((flops for name, flops in _HALF if name in words), None)
