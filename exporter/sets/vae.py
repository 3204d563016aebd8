"""The VAE of a build with its parts: where it is found, its weights, and the engine it becomes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.aoti import vae as aoti_vae
from wanexport.exporter.backends.backend import Progress, Request, VaeRequest
from wanexport.exporter.backends.order import BuildOptions
from wanexport.exporter.backends.table import find_backend
from wanexport.exporter.bundle.writer import BundleWriter
from wanexport.graphs.vae_checkpoint import (
    VaeCheckpoint,
    VaeWeights,
    open_vae_checkpoint,
    with_chunks,
)
from wanexport.graphs.weights import write_tensors
from wanexport.runtime.bundle.manifest import (
    BASE,
    VAE,
    FileRecord,
    WeightsRecord,
    weights_label,
)
from wanexport.runtime.bundle.tensorfile import header_sha256
from wanexport.runtime.bundle.vae_signature import vae_weights_layout
from wanexport.runtime.engines.device import gpu_or_cpu
from wanexport.runtime.errors import BadRequest, printable, refuse_empty
from wanexport.runtime.family import family_of
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.parts.find import find_in
from wanexport.runtime.vae_config import CHUNKS, VaeConfig
from wanexport.runtime.vae_memory import needed_bytes

VAE_FILE = "vae.safetensors"
DTYPES = ("bf16", "fp32")
_SHARE = 0.15  # of a GPU's memory, of which the model beside it takes most


@dataclass(frozen=True)
class OrderedVae:
    """A VAE to build: its checkpoint, and the engine that is asked for."""

    checkpoint: VaeCheckpoint
    request: VaeRequest


def order_vae(
    denoiser: Request, source: Mapping[str, Any], asked: BuildOptions
) -> OrderedVae | None:
    """The VAE that a build asks for, beside its first engine; None where it asks for none.

    source is the record of where the model comes from. Raises WanExportError when there is no VAE,
    it is another than the model's, or cannot be built here.
    """
    if not (asked.parts or asked.vae):
        _refuse_options(asked)
        return None
    refuse_empty(vae=asked.vae)
    backend = find_backend(aoti_vae.BACKEND)
    device = asked.device or backend.default_device()
    (target,) = backend.targets(device, aoti_vae.OPTIONS)
    dtype = asked.vae_dtype or backend.default_dtype(device)
    if dtype not in DTYPES:
        raise BadRequest(f"unknown VAE dtype {dtype!r}: expected of {', '.join(DTYPES)}")
    asked.progress("vae: checkpoint", 0, 0)
    checkpoint = open_vae_checkpoint(_find(denoiser, source, asked))
    _check_kind(denoiser, checkpoint)
    whole = replace(denoiser.geometry, chunk=0, cache=0)  # of a causal denoiser
    config = _cut(checkpoint.config, whole, dtype, device, asked)
    request = VaeRequest(
        config=denoiser.config,
        geometry=whole,
        sampling=denoiser.sampling,
        backend=aoti_vae.BACKEND,
        dtype=dtype,
        device=device,
        target=target,
        attention="products",  # no kernel of the denoiser's is compiled beside it
        vae=config,
    )
    return OrderedVae(checkpoint, request)


def _refuse_options(asked: BuildOptions) -> None:
    given = {
        "--vae-dtype": asked.vae_dtype,
        "--vae-chunk": asked.vae_chunk,
        "--vae-tf32": asked.vae_tf32 or None,
    }
    named = [option for option, value in given.items() if value is not None]
    if named:
        raise BadRequest(
            f"{' and '.join(named)}: only an engine of the VAE takes this; add --parts, or --vae "
            f"with its file or folder"
        )


def _find(denoiser: Request, source: Mapping[str, Any], asked: BuildOptions) -> Path:
    """Where the checkpoint of the VAE lies; it is downloaded where the model was."""
    if asked.vae is not None:
        path = Path(asked.vae)
        if not path.exists():
            raise BadRequest(f"{printable(path)} does not exist: name the VAE's file or folder")
        return path
    origin = source.get("path") or source.get("hub")
    if origin is None:
        raise BadRequest(
            "random weights have no VAE beside them: name one with --vae, or leave out --parts"
        )
    return find_in(denoiser.config, origin, needs=("vae",)).vae


def _check_kind(denoiser: Request, checkpoint: VaeCheckpoint) -> None:
    """Raise BadRequest when the model takes other latents than the VAE makes."""
    expected, found = family_of(denoiser.config).vae, checkpoint.config
    if (found.channels, found.spatial_stride) != (expected.channels, expected.spatial_stride):
        raise BadRequest(
            f"{printable(checkpoint.path)} has latents of {found.channels} channels, one for "
            f"{found.spatial_stride}x{found.spatial_stride} pixels; the model takes "
            f"{expected.channels} for {expected.spatial_stride}x{expected.spatial_stride}: name "
            f"{expected.file}"
        )


def _cut(
    config: VaeConfig, geometry: Geometry, dtype: str, device: str, asked: BuildOptions
) -> VaeConfig:
    """The sizes with the chunks that are asked for, or that suit the video and the memory."""
    if asked.vae_chunk is not None and asked.vae_chunk not in CHUNKS:
        raise BadRequest(
            f"--vae-chunk {asked.vae_chunk}: expected from {CHUNKS[0]} to {CHUNKS[-1]}"
        )
    chunks = {
        part: asked.vae_chunk or choose_chunk(config, geometry, dtype, part, _room(device))
        for part in ("decode", "encode")
    }
    return with_chunks(config, **chunks, tf32=asked.vae_tf32)


def _room(device: str) -> float:
    """Bytes that a call may take. On a CPU none: there a chunk costs memory and gains nothing."""
    import torch

    if device == "cpu":
        return 0
    return _SHARE * torch.cuda.get_device_properties(gpu_or_cpu(device)).total_memory


def choose_chunk(config: VaeConfig, geometry: Geometry, dtype: str, part: str, room: float) -> int:
    """The latent frames of a steady call: of what fits, what computes least, and the most of it."""
    later = max(1, geometry.latent[0] - 1)
    fitting = [
        k for k in CHUNKS
        if k == CHUNKS[0] or needed_bytes(config, geometry, dtype, part, k) <= room
    ]  # fmt: skip
    return min(fitting, key=lambda k: (-(-later // k) * k, -k))


def add_vae_weights(writer: BundleWriter, vae: OrderedVae, progress: Progress) -> list[str]:
    """Convert the checkpoint, or return what is reused because the bundle holds it.

    Raises BadRequest when the bundle holds another VAE.
    """
    request, source = vae.request, VaeWeights(vae.checkpoint)
    label = weights_label(BASE, "", request.dtype, VAE)
    progress(f"weights {label}: reading the checkpoint", 0, 0)
    content = source.digest()
    _check_source(writer, content)
    record = writer.find_weights(label, request.layout)
    if record is not None:
        writer.put_weights(label, record)
        return [f"weights {label}"]
    path = writer.free_folder(Path("weights") / label) / VAE_FILE

    def show(done: int, total: int) -> None:
        progress(f"weights {label}", done, total)

    layout = vae_weights_layout(request.vae, request.dtype)
    sha256 = write_tensors(path, layout, source, show)
    relative = path.relative_to(writer.path).as_posix()
    record = WeightsRecord(
        name=BASE,
        role=VAE,
        expert="",
        dtype=request.dtype,
        layout=header_sha256(path),
        file=FileRecord(relative, path.stat().st_size, sha256),
        content=content,
        source={"path": str(vae.checkpoint.path.resolve()), "layout": vae.checkpoint.layout},
    )
    writer.put_weights(label, record)
    return []


def _check_source(writer: BundleWriter, content: str) -> None:
    """Raise BadRequest when the bundle holds the weights of another VAE."""
    for label, known in writer.known_weights().items():
        if known.role != VAE or known.content == content:
            continue
        if label not in writer.committed.weights:
            writer.forget_weights(label)
            continue
        raise BadRequest(
            f"{writer.path} holds another VAE, of {printable(known.source.get('path', '-'), 200)}: "
            f"remove its engine first (wanexport remove), or name another folder with -o"
        )
