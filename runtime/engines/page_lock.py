"""Host memory that a GPU copies from by itself, while the host goes on."""

import weakref
from contextlib import suppress

import torch
from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: for every GPU of the process


def lock_pages(buffer: Tensor, device: torch.device, owner: object) -> bool:
    """Lock the pages of a buffer until `owner`, which holds it, is no more; False where the system
    refuses. On a CPU there is nothing to lock.

    PyTorch's own pinned memory is rounded up to a power of two, and never given back.
    """
    if device.type != "cuda" or not buffer.nbytes:
        return True
    start = buffer.data_ptr()
    with torch.cuda.device(device):
        error = int(torch.cuda.cudart().cudaHostRegister(start, buffer.nbytes, _PORTABLE))
        if error:  # which the next kernel would be told of, as if it were its own
            with suppress(RuntimeError):
                torch.zeros(1, device=device)
            return False
    weakref.finalize(owner, _unlock, start, device).atexit = False
    return True


def _unlock(start: int, device: torch.device) -> None:
    """What is copied from there on any GPU must end first."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
    torch.cuda.cudart().cudaHostUnregister(start)
