"""Find a Wan checkpoint's tensors in either layout, and stream them into a weights file.

Layouts: the official one (Wan-Video) and diffusers', as single files or shards with an index, in
fp32, bf16 or fp16. One key table maps diffusers' names to the official ones.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from wanexport.graphs.config import EXPERTS, WanConfig
from wanexport.graphs.model import parameter_dtype, parameter_shapes
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.manifest import fsync_folder
from wanexport.runtime.tensorfile import TensorEntry, make_header, read_fully, read_header

CHUNK = 1 << 23  # elements converted at a time: 32 MB of fp32
HEAD_DIM = 128  # of every published Wan; used when a checkpoint comes without config.json
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TORCH_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_DTYPES.items()}
_PREFIX = "model.diffusion_model."
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SUBFOLDERS = {  # of the two experts, or of diffusers' one model
    ("high_noise_model", "low_noise_model"): EXPERTS,
    ("transformer", "transformer_2"): EXPERTS,
    ("transformer",): ("",),
}

# diffusers name -> official name; {} is the block's number, * is weight or bias.
_KEY_TABLE = {
    "patch_embedding.*": "patch_embedding.*",
    "condition_embedder.text_embedder.linear_1.*": "text_embedding.0.*",
    "condition_embedder.text_embedder.linear_2.*": "text_embedding.2.*",
    "condition_embedder.time_embedder.linear_1.*": "time_embedding.0.*",
    "condition_embedder.time_embedder.linear_2.*": "time_embedding.2.*",
    "condition_embedder.time_proj.*": "time_projection.1.*",
    "condition_embedder.image_embedder.norm1.*": "img_emb.proj.0.*",
    "condition_embedder.image_embedder.ff.net.0.proj.*": "img_emb.proj.1.*",
    "condition_embedder.image_embedder.ff.net.2.*": "img_emb.proj.3.*",
    "condition_embedder.image_embedder.norm2.*": "img_emb.proj.4.*",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "blocks.{}.scale_shift_table": "blocks.{}.modulation",
    "blocks.{}.attn1.to_q.*": "blocks.{}.self_attn.q.*",
    "blocks.{}.attn1.to_k.*": "blocks.{}.self_attn.k.*",
    "blocks.{}.attn1.to_v.*": "blocks.{}.self_attn.v.*",
    "blocks.{}.attn1.to_out.0.*": "blocks.{}.self_attn.o.*",
    "blocks.{}.attn1.norm_q.*": "blocks.{}.self_attn.norm_q.*",
    "blocks.{}.attn1.norm_k.*": "blocks.{}.self_attn.norm_k.*",
    "blocks.{}.attn2.to_q.*": "blocks.{}.cross_attn.q.*",
    "blocks.{}.attn2.to_k.*": "blocks.{}.cross_attn.k.*",
    "blocks.{}.attn2.to_v.*": "blocks.{}.cross_attn.v.*",
    "blocks.{}.attn2.to_out.0.*": "blocks.{}.cross_attn.o.*",
    "blocks.{}.attn2.norm_q.*": "blocks.{}.cross_attn.norm_q.*",
    "blocks.{}.attn2.norm_k.*": "blocks.{}.cross_attn.norm_k.*",
    "blocks.{}.attn2.add_k_proj.*": "blocks.{}.cross_attn.k_img.*",
    "blocks.{}.attn2.add_v_proj.*": "blocks.{}.cross_attn.v_img.*",
    "blocks.{}.attn2.norm_added_k.*": "blocks.{}.cross_attn.norm_k_img.*",
    "blocks.{}.norm2.*": "blocks.{}.norm3.*",
    "blocks.{}.ffn.net.0.proj.*": "blocks.{}.ffn.0.*",
    "blocks.{}.ffn.net.2.*": "blocks.{}.ffn.2.*",
    "scale_shift_table": "head.modulation",
    "proj_out.*": "head.head.*",
}
_UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")  # diffusers ignores it too


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor of a checkpoint lies."""

    file: Path
    entry: TensorEntry


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint. `tensors` has, for each expert, the official names."""

    path: Path
    layout: str
    config: WanConfig
    tensors: dict[str, dict[str, SourceTensor]]
    boundary: float | None  # where the checkpoint itself states one

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts; empty for a model without."""
        return tuple(expert for expert in self.tensors if expert)


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognise a folder (or one safetensors file) as a Wan checkpoint.

    Raises WanExportError when there is none, a shard is missing, tensors are missing, unexpected or
    wrongly shaped, or the two experts differ in size.
    """
    names, experts = next(
        (item for item in _SUBFOLDERS.items() if all((path / name).is_dir() for name in item[0])),
        ((".",), ("",)),
    )
    found = {expert: _open_model(path / name) for name, expert in zip(names, experts, strict=True)}
    configs = {config for config, _, _ in found.values()}
    if len(configs) > 1:
        raise WanExportError(
            f"the two experts in {path} differ in size: expected one config for both"
        )
    index = _read_json(path / "model_index.json")
    return Checkpoint(
        path=path,
        layout=next(iter(found.values()))[1],
        config=configs.pop(),
        tensors={expert: tensors for expert, (_, _, tensors) in found.items()},
        boundary=index.get("boundary_ratio"),
    )


def _open_model(path: Path) -> tuple[WanConfig, str, dict[str, SourceTensor]]:
    tensors: dict[str, SourceTensor] = {}
    for file in _weight_files(path):
        for name, entry in read_header(file).items():
            tensors[name.removeprefix(_PREFIX)] = SourceTensor(file, entry)
    layout = "diffusers" if "condition_embedder.time_proj.weight" in tensors else "official"
    if layout == "diffusers":
        tensors = {official_name(k): t for k, t in tensors.items() if not _UNUSED.fullmatch(k)}
    folder = path.parent if path.is_file() else path
    config = recognise(tensors, _read_json(folder / "config.json"), path)
    _check_tensors(tensors, config, path)
    return config, layout, tensors


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / _INDEX
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise WanExportError(
                f"{path} lacks {', '.join(missing)}, which its index lists: download again"
            )
        return [path / name for name in names]
    files = sorted(path.glob("diffusion_pytorch_model*.safetensors"))
    files = files or sorted(path.glob("*.safetensors"))
    if not files:
        raise WanExportError(
            f"{path} is no Wan checkpoint: expected *.safetensors in it, in high_noise_model/ and "
            f"low_noise_model/, or in transformer/"
        )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file. Raises WanExportError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WanExportError(f"cannot read {path} ({error}): download it again") from error
    return data if isinstance(data, dict) else {}


def official_name(name: str) -> str:
    """Translate a diffusers parameter name; a name the table lacks is returned as it is."""
    number = re.match(r"blocks\.(\d+)\.", name)
    generic = re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)
    stem, _, last = generic.rpartition(".")
    wild = f"{stem}.*" if last in ("weight", "bias") else generic
    if wild not in _KEY_TABLE:
        return name
    official = _KEY_TABLE[wild].replace("*", last)
    return official.replace("{}", number[1]) if number else official


def diffusers_name(name: str) -> str:
    """Translate an official parameter name to diffusers'; the inverse of `official_name`."""
    number = re.match(r"blocks\.(\d+)\.", name)
    generic = re.sub(r"^blocks\.\d+\.", "blocks.{}.", name)
    stem, _, last = generic.rpartition(".")
    wild = f"{stem}.*" if last in ("weight", "bias") else generic
    diffusers = {v: k for k, v in _KEY_TABLE.items()}[wild].replace("*", last)
    return diffusers.replace("{}", number[1]) if number else diffusers


def recognise(
    tensors: Mapping[str, SourceTensor], stated: Mapping[str, Any], path: Path
) -> WanConfig:
    """The config that follows from the tensors; config.json adds only the number of heads and eps.

    Raises WanExportError when a tensor that decides the config is missing.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].entry.shape) != rank:
            raise WanExportError(
                f"{path} is no Wan diffusion transformer: it has no {name} of rank {rank}; "
                f"expected the official or the diffusers layout"
            )
        return tensors[name].entry.shape

    dim, in_channels = shape("patch_embedding.weight", 5)[:2]
    blocks = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    image_tokens = 0
    if "img_emb.proj.0.weight" in tensors:
        image_tokens = 514 if "img_emb.emb_pos" in tensors else 257
    return WanConfig(
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
        num_heads=stated.get("num_heads")
        or stated.get("num_attention_heads")
        or max(1, dim // HEAD_DIM),
        num_layers=max(blocks) + 1,
        in_channels=in_channels,
        out_channels=shape("head.head.weight", 2)[0] // 4,
        image_tokens=image_tokens,
        text_dim=shape("text_embedding.0.weight", 2)[1],
        text_len=stated.get("text_len", 512),
        freq_dim=shape("time_embedding.0.weight", 2)[1],
        eps=stated.get("eps", 1e-6),
    )


def _check_tensors(tensors: Mapping[str, SourceTensor], config: WanConfig, path: Path) -> None:
    expected = parameter_shapes(config)
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        entry = tensors[name].entry
        if entry.shape != expected[name]:
            problems.append(f"{name} is {list(entry.shape)}, expected {list(expected[name])}")
        elif entry.dtype not in _TORCH_DTYPES:
            problems.append(f"{name} is {entry.dtype}, expected F32, BF16 or F16")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WanExportError(
            f"{path} does not fit a Wan of dim {config.dim} and {config.num_layers} blocks: "
            f"{'; '.join(sorted(problems)[:8])}{more}"
        )


class WeightSource(Protocol):
    """Gives parameters in chunks, and a hash that tells two sources apart."""

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The parameter's elements in order, as 1-D tensors of its stored dtype."""
        ...

    def digest(self) -> str:
        """A hash of the content of all parameters."""
        ...


class CheckpointWeights:
    """Reads one expert's tensors from its files, chunk by chunk."""

    def __init__(self, tensors: Mapping[str, SourceTensor]) -> None:
        self.tensors = tensors
        self._hashes: dict[str, str] = {}

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The parameter's elements in order. Raises WanExportError when its file ends early."""
        file, entry = self.tensors[name].file, self.tensors[name].entry
        dtype = _TORCH_DTYPES[entry.dtype]
        buffer = bytearray(min(entry.size, CHUNK * dtype.itemsize))
        digest, left = hashlib.sha256(), entry.size
        with file.open("rb", buffering=0) as stream:
            stream.seek(entry.offset)
            while left:
                view = memoryview(buffer)[: min(left, len(buffer))]
                if not read_fully(stream, view):
                    raise WanExportError(f"{file} ended while {name} was read: download it again")
                digest.update(view)
                left -= len(view)
                yield torch.frombuffer(view, dtype=dtype)
        self._hashes[name] = digest.hexdigest()

    def digest(self) -> str:
        """A hash over names and bytes, not layout or shards; reads the tensors not yet read."""
        for name in self.tensors.keys() - self._hashes.keys():
            for _ in self.chunks(name):
                pass
        return hashlib.sha256(json.dumps(self._hashes, sort_keys=True).encode()).hexdigest()


class RandomWeights:
    """Seeded weights of a preset: each tensor from its own stream, so that none depends on order.

    Matrices have variance 1 / fan_in, and norms lie around 1, so that a forward of any depth stays
    in range and every parameter matters to its result.
    """

    def __init__(self, config: WanConfig, seed: int, expert: str) -> None:
        self.shapes = parameter_shapes(config)
        self.identity = f"{seed}/{expert}"

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The parameter's elements in order, fp32."""
        seed = hashlib.sha256(f"{self.identity}/{name}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))
        shape = self.shapes[name]
        centre, deviation = _distribution(name, shape)
        left = int(np.prod(shape))
        while left:
            values = generator.random(min(left, CHUNK), dtype=np.float32)
            values -= 0.5
            values *= np.float32(
                deviation * 12**0.5
            )  # a uniform of width w deviates by w / sqrt(12)
            values += np.float32(centre)
            left -= len(values)
            yield torch.from_numpy(values)

    def digest(self) -> str:
        """A hash of the seed, the expert and the shapes."""
        content = json.dumps([self.identity, self.shapes], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a random parameter."""
    if name.endswith("modulation"):
        return 0.0, float(shape[-1] ** -0.5)
    if len(shape) == 1 or name == "img_emb.emb_pos":
        is_norm = "norm" in name or re.match(r"img_emb\.proj\.[04]", name)
        return (1.0, 0.1) if is_norm and name.endswith("weight") else (0.0, 0.1)
    return 0.0, float(np.prod(shape[1:]) ** -0.5)


def weights_layout(config: WanConfig, dtype: str) -> tuple[bytes, dict[str, TensorEntry]]:
    """Header and entries of the weights file of this config in fp32, bf16 or fp16."""
    tensors = {
        name: (_SAFETENSORS_DTYPES[parameter_dtype(name, DTYPES[dtype])], shape)
        for name, shape in parameter_shapes(config).items()
    }
    return make_header(tensors)


def write_weights(
    path: Path,
    config: WanConfig,
    dtype: str,
    source: WeightSource,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Stream a source into a weights file, casting each tensor once; return the file's SHA-256.

    The file appears under its name only when it is whole and on disk. progress is called with bytes
    done and in all. Raises WanExportError when a value does not fit fp16.
    """
    header, entries = weights_layout(config, dtype)
    total = sum(entry.size for entry in entries.values())
    partial = path.with_name(path.name + ".partial")
    digest, done = hashlib.sha256(header), 0
    with partial.open("wb") as file:
        file.write(header)
        for name, entry in entries.items():
            for chunk in source.chunks(name):
                cast = _cast(chunk, _TORCH_DTYPES[entry.dtype], name)
                file.write(cast)
                digest.update(cast)
                done += len(cast)
                progress(done, total)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_folder(path.parent)
    return digest.hexdigest()


def _cast(chunk: Tensor, dtype: torch.dtype, name: str) -> memoryview:
    cast = chunk.to(dtype)
    if dtype == torch.float16 and not cast.isfinite().all():
        raise WanExportError(
            f"{name} has values beyond fp16's 65504: build with --dtype bf16 or fp32"
        )
    data: memoryview = cast.view(torch.uint8).numpy().data
    return data


def load_weights(
    file: Path, entries: Mapping[str, TensorEntry], names: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Read tensors of a weights file: names maps each parameter to the tensor it takes."""
    with file.open("rb", buffering=0) as stream:
        for parameter, name in names.items():
            entry = entries[name]
            buffer = bytearray(entry.size)
            stream.seek(entry.offset)
            if not read_fully(stream, memoryview(buffer)):
                raise WanExportError(f"{file} ended while {name} was read: build the bundle again")
            yield (
                parameter,
                torch.frombuffer(buffer, dtype=_TORCH_DTYPES[entry.dtype]).reshape(entry.shape),
            )
