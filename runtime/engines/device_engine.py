"""What engines share whose tensors are PyTorch's, on one device."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.engines.device import to_device


class DeviceEngine(ABC):
    """An engine on the device `device_of`, which holds the weights of a file while a call runs."""

    device_of: torch.device

    @property
    def device(self) -> str:
        """PyTorch's name of the device."""
        return str(self.device_of)

    def array(self, value: Any) -> Tensor:
        """An fp32 tensor on the device."""
        return to_device(value, self.device_of)

    def use(self, weights: PinnedFile) -> None:
        """Read the weights of a file now, when calls that run have ended."""
        with self._held(weights):
            pass

    @abstractmethod
    def _held(self, file: PinnedFile) -> AbstractContextManager[Any]:
        """The weights of a file within the block. Raises EngineFailure of a closed engine."""
