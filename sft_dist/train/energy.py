"""What a GPU has used since its driver was loaded, as NVML counts it: the library is part of the driver."""

from __future__ import annotations

import ctypes

LIBRARY = "libnvidia-ml.so.1"
# nvml.h: 0 is NVML_SUCCESS.
SUCCESS = 0


def joules(*, use_cpu: bool) -> float | None:
    """Of this process's GPU, whoever uses it; None without a GPU and where it does not count (before Volta, slices of one).

    nvmlDeviceGetTotalEnergyConsumption, in millijoules.
    """
    import torch

    if use_cpu or not torch.cuda.is_available():
        return None
    try:
        return _count(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
    except (OSError, AttributeError):  # no such library, an old one
        return None


def _count(uuid: str) -> float | None:
    library = ctypes.CDLL(LIBRARY)
    device, count = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlInit_v2() != SUCCESS:
        return None
    try:
        found = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)) == SUCCESS
        if not found or library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(count)) != SUCCESS:
            return None
    finally:
        library.nvmlShutdown()
    return count.value / 1000
