"""A model's folder as transformers writes it: config.json, and tensors in one file or in shards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanexport.runtime.bundle.pinned_file import PinnedFile, pin_opened
from wanexport.runtime.bundle.regular_file import open_regular, read_regular
from wanexport.runtime.bundle.tensorfile import TensorEntry, read_header
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.errors import BundleError, printable
from wanexport.runtime.parts.stored import StoredTensor
from wanexport.runtime.parts.torch_checkpoint import read_stored

# What transformers takes where several are there, in this order.
_FILES = ("model.safetensors", "model.safetensors.index.json",
          "pytorch_model.bin", "pytorch_model.bin.index.json")  # fmt: skip
_MOST_JSON = 16 << 20  # bytes
LARGEST = 1 << 19  # of a config's sizes: umT5-xxl's vocabulary has 256384 tokens


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds. Raises BundleError when there is none or it is damaged."""
    if not (folder / "config.json").is_file():
        raise BundleError(f"{folder} has no config.json: download it again")
    return _read_json(folder, "config.json")


def config_sizes(
    folder: Path,
    config: Mapping[str, Any],
    defaults: Mapping[str, int],
    *,
    layers: str,
    num_tensors: int,
) -> dict[str, int]:
    """The sizes that the config has, or leaves at these defaults.

    Raises BundleError for what is no size, and where there are more `layers` than tensors.
    """
    sizes = {name: config.get(name, default) for name, default in defaults.items()}
    for name, size in sizes.items():
        largest = num_tensors if name == layers else LARGEST
        if type(size) is not int or not 0 < size <= largest:
            raise BundleError(
                f"cannot read {folder} (the {name} of config.json is {printable(size)}, expected 1 "
                f"to {largest}): download it again"
            )
    return sizes


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder's files by name, mapped.

    Raises BundleError when a file is missing or damaged.
    """
    found = next((name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        raise BundleError(f"cannot read {folder} (it has no {_FILES[0]}): download it again")
    names = _shards(folder, found) if found.endswith(".json") else [found]
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if not (folder / name).exists():
            raise BundleError(f"cannot read {folder} (it has no {name}): download it again")
        read = _read_safetensors if name.endswith(".safetensors") else read_stored
        tensors |= read(folder / name)
    return tensors


def _shards(folder: Path, index: str) -> list[str]:
    """The files that an index names."""
    places = _read_json(folder, index).get("weight_map")
    names = sorted(map(str, places.values())) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name or "\\" in name for name in names):
        raise BundleError(f"cannot read {folder} ({index} names no files): download it again")
    return list(dict.fromkeys(names))


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(read_regular(folder / name, at_most=_MOST_JSON))
        if not isinstance(values, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(
            f"cannot read {folder} ({name} is damaged: {printable(error, 200)}): download it again"
        ) from error
    return values


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    descriptor = _open(path)
    with open(descriptor, "rb"):
        return _mapped(descriptor, pin_opened(path, descriptor))


def read_pinned(file: PinnedFile) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file by name, mapped.

    Raises BundleError when it is damaged, or another than was pinned.
    """
    with file.opened() as descriptor:
        return _mapped(descriptor, file)


def _mapped(descriptor: int, file: PinnedFile) -> dict[str, StoredTensor]:
    entries = read_header(descriptor)
    # By the descriptor, where it has a name: another file may have the path meanwhile.
    own = Path(f"/proc/self/fd/{descriptor}")
    name = str(own if own.exists() else file.path)
    content = torch.from_file(name, shared=False, size=file.identity.size, dtype=torch.uint8)
    return {
        name: StoredTensor(_tensor(content, entry, name, file), file, entry.offset)
        for name, entry in entries.items()
    }


def _open(path: Path) -> int:
    try:
        return open_regular(path)
    except OSError as error:
        raise BundleError(
            f"cannot read {printable(path)}: {error.strerror}: download it again"
        ) from error


def _tensor(content: Tensor, entry: TensorEntry, name: str, file: PinnedFile) -> Tensor:
    """A tensor of the mapped content, copied where it does not lie on its item's boundary."""
    dtype = getattr(torch, STORED[entry.dtype].torch or "none", None)
    if dtype is None:
        raise BundleError(
            f"{printable(file.path)} has {printable(name)} as {entry.dtype}, which is not read"
        )
    raw = content[entry.offset : entry.offset + entry.size]
    if entry.offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(entry.shape)
