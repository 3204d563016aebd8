"""What lies in the file of an encoder that a bundle carries: this imports PyTorch."""

from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch

from wanexport.runtime.bundle.pinned_file import PinnedFile
from wanexport.runtime.decode import decode, parse_json
from wanexport.runtime.errors import BundleError, printable
from wanexport.runtime.parts.carried import CONFIG, MOST_BYTES, TOKENIZER
from wanexport.runtime.parts.model_folder import LARGEST, read_pinned
from wanexport.runtime.parts.stored import StoredTensor

Config = TypeVar("Config")


@dataclass(frozen=True)
class CarriedFile(Generic[Config]):
    """Sizes of an encoder, its weights by name, mapped, and its tokenizer.json, if it has one."""

    config: Config
    tensors: dict[str, StoredTensor]
    tokenizer: bytes


def read_carried(file: PinnedFile, config_type: type[Config]) -> CarriedFile[Config]:
    """What a file has of an encoder with sizes of this type.

    Raises BundleError when it is damaged, another than was pinned, or states no such sizes.
    """
    stored = read_pinned(file)
    texts = {name: stored.pop(name) for name in MOST_BYTES if name in stored}
    try:
        content = {name: _bytes(name, text) for name, text in texts.items()}
        config: Config = decode(config_type, parse_json(content[CONFIG]), CONFIG)
        _check(config, len(stored))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{printable(file.path)} is no encoder of a bundle ({printable(error, 200)}): run "
            f"wanexport build --parts again"
        ) from error
    return CarriedFile(config, stored, content.get(TOKENIZER, b""))


def _bytes(name: str, text: StoredTensor) -> bytes:
    tensor = text.tensor
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or len(tensor) > MOST_BYTES[name]:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
    return tensor.numpy().tobytes()


def _check(config: Any, num_tensors: int) -> None:
    """Raise ValueError for sizes of which no model is made, even one without memory."""
    for name, size in asdict(config).items():
        largest = num_tensors if name == "num_layers" else LARGEST
        if isinstance(size, int) and not 0 < size <= largest:
            raise ValueError(f"{name} is {size}, expected 1 to {largest}")
