"""A weights file whose tensors get LoRAs merged into them when they are read. Needs no PyTorch."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from wanexport.runtime.bundle.pinned_file import PinnedFile

if TYPE_CHECKING:
    from wanexport.runtime.lora.merge import LoraStack


@dataclass(frozen=True)
class MergedFile(PinnedFile):
    """What a file holds once a stack of LoRAs is merged into it; the file stays as it is."""

    stack: "LoraStack" = field(kw_only=True)

    @property
    def content(self) -> Hashable:
        """What tells this content from another."""
        return self.identity, self.stack.content


def stack_of(file: PinnedFile | None) -> "LoraStack | None":
    """The LoRAs that a file is read with; None for none."""
    return file.stack if isinstance(file, MergedFile) else None


def merge_array(stack: "LoraStack", name: str, base: np.ndarray) -> np.ndarray:
    """A parameter with the LoRAs merged, in its dtype; base is fp32 or fp16, and stays as it is.

    Raises as LoraStack.merge does, and BadRequest for a value that the dtype cannot hold.
    """
    import torch

    given = torch.from_numpy(base)
    rounded: np.ndarray = stack.rounded(name, given).numpy()
    return rounded
