"""Open one file of a checkpoint, in whatever format its first bytes tell: names, no weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from wanexport.graphs.foreign import file_format, refuse_foreign_tensors
from wanexport.graphs.gguf_file import read_gguf
from wanexport.graphs.quantised import METADATA
from wanexport.graphs.source_tensor import SourceTensor
from wanexport.graphs.torch_file import lacks_generator, read_torch_file
from wanexport.runtime.bundle.tensorfile import read_header, read_metadata
from wanexport.runtime.errors import BadRequest, printable

# What writers of GGUF files give a Wan: names of their own stand for no architecture.
_ARCHITECTURES = ("", "wan", "pig", "cow")


class StoredFile(NamedTuple):
    """The tensors of a file by the names that it has, and what its header says of quantisation.

    generator is the one of a training's models that these are, `generator` or `generator_ema`, and
    then they are a causal Wan's; empty where the file has no such.
    """

    tensors: dict[str, SourceTensor]
    quantisation: Any  # None where it says nothing
    generator: str = ""


def open_stored(path: Path, ema: bool | None = None) -> StoredFile:
    """The tensors of a file, which is of a Wan, or of a part of one; ema as in `read_torch_file`.

    Raises WanExportError when the file is damaged, of another format or of another thing.
    """
    kind = file_format(path)
    if kind == "torch":
        saved = read_torch_file(path, ema)
        found = StoredFile(saved.tensors, None, saved.generator)
    elif ema is not None:
        raise lacks_generator(path, ema)
    elif kind == "gguf":
        found = StoredFile(_read_gguf(path), None)
    else:
        entries, metadata = read_header(path), read_metadata(path)
        tensors = {name: SourceTensor(path, entry, name) for name, entry in entries.items()}
        found = StoredFile(tensors, metadata.get(METADATA))
    shapes = {name: tensor.entry.shape for name, tensor in found.tensors.items()}
    refuse_foreign_tensors(shapes, path, partial=True)
    return found


def _read_gguf(path: Path) -> dict[str, SourceTensor]:
    header = read_gguf(path)
    if header.architecture not in _ARCHITECTURES:
        raise BadRequest(
            f"{printable(path)} is a GGUF file of {printable(header.architecture)}, no Wan: pass "
            f"-m a Wan's diffusion transformer"
        )
    tensors = {}
    for name, entry in header.tensors.items():
        bias = header.tensors.get(f"{name.removesuffix('weight')}bias")
        shape = _unfolded(name, entry.shape, bias.shape if bias else ())
        tensors[name] = SourceTensor(path, replace(entry, shape=shape), name)
    return tensors


def _unfolded(name: str, shape: tuple[int, ...], bias: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor had before stable-diffusion.cpp wrote it.

    GGML's tensors have four dimensions, and no leading ones: that of the patches' convolution,
    [D, C, 1, 2, 2], became [D * C, 1, 2, 2], and [1, 6, D] became [6, D].
    """
    if name.endswith("patch_embedding.weight") and len(shape) == 4 and len(bias) == 1:
        if bias[0] and shape[0] % bias[0] == 0:
            return (bias[0], shape[0] // bias[0], *shape[1:])
    if name.endswith(("modulation", "img_emb.emb_pos")) and len(shape) == 2:
        return (1, *shape)
    return shape
