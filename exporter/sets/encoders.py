"""The encoders of a build with its parts: umT5 with its tokenizer, and CLIP where a model takes it.

Their weights are copied into a file of the bundle, by our names: umT5's in bf16, in which it
computes; CLIP's, which computes in fp16 on a GPU and in fp32 on a CPU, as the checkpoint has them.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Progress, Request
from wanexport.exporter.backends.order import BuildOptions
from wanexport.exporter.bundle.writer import BundleWriter
from wanexport.graphs.source_tensor import SourceTensor
from wanexport.graphs.weights import CheckpointWeights, write_tensors
from wanexport.runtime.bundle.manifest import (
    BASE,
    IMAGE_ENCODER,
    TEXT_ENCODER,
    FileRecord,
    WeightsRecord,
    weights_label,
)
from wanexport.runtime.bundle.regular_file import read_regular
from wanexport.runtime.bundle.tensorfile import TensorEntry, make_header
from wanexport.runtime.dtypes import DTYPES, PRECISIONS
from wanexport.runtime.errors import BadRequest, BundleError, EngineFailure, explain, printable
from wanexport.runtime.family import family_of
from wanexport.runtime.parts.carried import CONFIG, MOST_BYTES, TOKENIZER
from wanexport.runtime.parts.find import find_in
from wanexport.runtime.parts.stored import StoredTensor

_TITLES = {TEXT_ENCODER: "text encoder", IMAGE_ENCODER: "image encoder"}


@dataclass(frozen=True)
class OrderedEncoder:
    """An encoder to carry: its role, where it lies, its tensors by our names, and its texts."""

    role: str
    path: Path
    dtype: str
    tensors: Mapping[str, StoredTensor]
    texts: Mapping[str, bytes]

    @property
    def label(self) -> str:
        """How manifest, messages and folder call it: `text_encoder-bf16`."""
        return weights_label(BASE, "", self.dtype, self.role)

    @property
    def layout(self) -> str:
        """Hash of its file's header."""
        return hashlib.sha256(self.header[0]).hexdigest()

    @property
    def header(self) -> tuple[bytes, dict[str, TensorEntry]]:
        """Header and entries of its file."""
        stored = DTYPES[self.dtype].stored
        shapes = {name: (stored, tuple(own.tensor.shape)) for name, own in self.tensors.items()}
        return make_header({**shapes, **{n: ("U8", (len(t),)) for n, t in self.texts.items()}})

    @property
    def source(self) -> dict[str, Any]:
        """Where it comes from: what stays the same as long as the files do."""
        pinned = {own.file.path for own in self.tensors.values() if own.file is not None}
        stats = {file: file.stat() for file in sorted(pinned or {self.path})}
        texts = {name: hashlib.sha256(text).hexdigest() for name, text in self.texts.items()}
        return {
            "path": str(self.path.resolve()),
            "files": {f.name: [found.st_size, found.st_mtime_ns] for f, found in stats.items()},
            "texts": texts,
        }


class _EncoderWeights:
    """A source of an encoder's tensors and texts, as `write_tensors` takes one."""

    def __init__(self, encoder: OrderedEncoder) -> None:
        self.texts = encoder.texts
        places = {name: _place(name, own, encoder.path) for name, own in encoder.tensors.items()}
        self.weights = CheckpointWeights(places)

    def chunks(self, name: str) -> Iterator[Any]:
        """A tensor's elements in order, or a text's bytes."""
        import torch

        if name in self.texts:
            yield torch.frombuffer(bytearray(self.texts[name]), dtype=torch.uint8)
        else:
            yield from self.weights.chunks(name)

    def digest(self) -> str:
        """A hash of the checkpoint's tensors and of the texts; reads what is not yet read."""
        texts = {name: hashlib.sha256(text).hexdigest() for name, text in self.texts.items()}
        parts = [self.weights.digest(), texts]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _place(name: str, own: StoredTensor, path: Path) -> SourceTensor:
    """Where a tensor's values are read: in its file, or where none has them in order, in memory."""
    dtype = _precision(own)
    entry = TensorEntry(
        DTYPES[dtype].stored, tuple(own.tensor.shape), own.offset, own.tensor.nbytes
    )
    if own.file is not None:
        return SourceTensor(own.file.path, entry, name)
    return SourceTensor(path, entry, name, mapped=own.tensor)


def _precision(own: StoredTensor) -> str:
    found = str(own.tensor.dtype).removeprefix("torch.")
    return next(name for name in PRECISIONS if DTYPES[name].torch == found)


def order_encoders(
    denoiser: Request, source: Mapping[str, Any], asked: BuildOptions
) -> list[OrderedEncoder]:
    """The encoders that a build with --parts carries; none where it is without.

    source is the record of where the model comes from, which has them beside it. No weights are
    read yet. Raises WanExportError when they are missing, damaged, or another model's.
    """
    if not asked.parts:
        return []
    origin = source.get("path") or source.get("hub")
    if origin is None:
        raise BadRequest(
            "random weights have no encoders beside them: leave out --parts; --vae by itself "
            "builds an engine of the VAE"
        )
    asked.progress("encoders: checkpoint", 0, 0)
    has_clip = family_of(denoiser.config).clip_tokens
    needs = (TEXT_ENCODER, IMAGE_ENCODER) if has_clip else (TEXT_ENCODER,)
    files = find_in(denoiser.config, origin, needs=needs)
    ordered = [_text_encoder(denoiser, files.text_encoder, files.tokenizer)]
    if has_clip:
        assert files.image_encoder is not None
        ordered.append(_image_encoder(files.image_encoder))
    return ordered


def _text_encoder(denoiser: Request, path: Path, tokenizer: Path) -> OrderedEncoder:
    from wanexport.runtime.parts.umt5_files import find_umt5

    model, tensors = find_umt5(path)
    if model.config.dim != denoiser.config.text_dim:
        raise BadRequest(
            f"{printable(path)} gives {model.config.dim} values a token, the model takes "
            f"{denoiser.config.text_dim}: pass -m a checkpoint with its own text encoder"
        )
    file = tokenizer / TOKENIZER
    try:
        content = read_regular(file, at_most=MOST_BYTES[TOKENIZER])
    except OSError as error:
        raise BundleError(f"{explain(error)}: download the tokenizer's folder again") from error
    texts = {CONFIG: _as_json(model.config), TOKENIZER: content}
    return OrderedEncoder(TEXT_ENCODER, path, "bf16", tensors, texts)


def _image_encoder(path: Path) -> OrderedEncoder:
    from wanexport.runtime.parts.vit_files import find_vit

    model, tensors = find_vit(path)
    (*found,) = {_precision(own) for own in tensors.values()}
    dtype = found[0] if len(found) == 1 else "fp32"
    return OrderedEncoder(IMAGE_ENCODER, path, dtype, tensors, {CONFIG: _as_json(model.config)})


def _as_json(config: Any) -> bytes:
    return json.dumps(asdict(config), sort_keys=True).encode()


def add_encoders(
    writer: BundleWriter, encoders: Sequence[OrderedEncoder], progress: Progress
) -> list[str]:
    """Copy each encoder, and return what is reused because the bundle holds it.

    Raises BadRequest when the bundle holds another one, EngineFailure when the disk is too small.
    """
    reused: list[str] = []
    for encoder in encoders:
        weights = _EncoderWeights(encoder)
        _check_source(writer, encoder, weights, progress)
        record = writer.find_weights(encoder.label, encoder.layout)
        reused += [f"weights {encoder.label}"] if record else []
        writer.put_weights(encoder.label, record or _copy(writer, encoder, weights, progress))
    return reused


def _check_source(
    writer: BundleWriter, encoder: OrderedEncoder, weights: _EncoderWeights, progress: Progress
) -> None:
    """Raise BadRequest when the bundle holds another encoder in the place of this."""
    for label, known in writer.known_weights().items():
        if known.role != encoder.role or known.source == encoder.source:
            continue
        progress(f"weights {label}: reading the checkpoint to compare", 0, 0)
        if known.content == weights.digest():
            continue
        if label not in writer.committed.weights:
            writer.forget_weights(label)
            continue
        raise BadRequest(
            f"{writer.path} holds another {_TITLES[encoder.role]}, of "
            f"{printable(known.source.get('path', '-'), 200)}: remove it first (wanexport remove "
            f"BUNDLE {encoder.role}), or name another folder with -o"
        )


def _copy(
    writer: BundleWriter, encoder: OrderedEncoder, weights: _EncoderWeights, progress: Progress
) -> WeightsRecord:
    """Write an encoder's file and return its record."""
    label, header = encoder.label, encoder.header
    path = writer.free_folder(Path("weights") / label) / f"{encoder.role}.safetensors"
    _check_disk(path.parent, sum(entry.size for entry in header[1].values()))

    def show(done: int, total: int) -> None:
        progress(f"weights {label}", done, total)

    sha256 = write_tensors(path, header, weights, show)
    return WeightsRecord(
        name=BASE,
        role=encoder.role,
        expert="",
        dtype=encoder.dtype,
        layout=encoder.layout,
        file=FileRecord(path.relative_to(writer.path).as_posix(), path.stat().st_size, sha256),
        content=weights.digest(),
        source=encoder.source,
    )


def _check_disk(folder: Path, needed: int) -> None:
    """Refuse a copy that would end in a full disk after minutes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EngineFailure(
            f"{folder} needs {needed / 1e9:.2f} GB for an encoder, its disk has {free / 1e9:.2f} "
            f"GB free: name a folder elsewhere with -o, or leave out --parts"
        )
