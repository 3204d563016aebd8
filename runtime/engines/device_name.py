"""The names of devices, as options and PyTorch have them."""

import re

from wanexport.runtime.errors import BadRequest


def check_device(device: str) -> str:
    """A device's name as it is. Raises BadRequest unless it is `cpu`, `cuda` or `cuda:N`."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise BadRequest(f"unknown device {device!r}: expected one of cpu, cuda, cuda:N")
    return device


def device_kind(device: str) -> str:
    """`cpu` or `cuda`, without the number of a GPU."""
    return device.partition(":")[0]
