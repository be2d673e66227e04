"""Finds devices, their free memory, and copies tensors to them."""

import psutil
import torch
from torch import Tensor

from ficpd.errors import BackboneError, ConfigError

KINDS = ("cpu", "cuda", "mps")


def find_device(name: str) -> torch.device:
    """Returns a device. Raises `ConfigError` for an unknown name, and `BackboneError` for an unavailable device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"engine.device = {name!r} is no device; write {', '.join(KINDS)}") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type):
        raise BackboneError(f"engine.device = {name!r} is not available here; --set engine.device=cpu")
    return device


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a device in bytes, including torch's reserved but unused memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available


def is_out_of_memory(error: Exception) -> bool:
    """Tells whether an error of torch says that a device has no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size  # slow to import, and rarely needed

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def copy_to(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copies a tensor to a device. The copy to a GPU is from pinned memory and does not block."""
    to_gpu = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if to_gpu else tensor).to(device, dtype or tensor.dtype, non_blocking=to_gpu)
