"""Find a Wan checkpoint's tensors in either layout, and the config that follows from them.

Layouts: the official one (Wan-Video) and diffusers', as single files or shards with an index, in
fp32, bf16 or fp16.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexport.graphs.experts import expert_of_name, why_alone
from wanexport.graphs.foreign import PREFIX, refuse_foreign_file, refuse_foreign_tensors
from wanexport.graphs.places import check_listed, find_parts, weight_files
from wanexport.graphs.stated import boundary_of, check_config, read_config, read_index, settings
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.bundle.tensorfile import TensorEntry, read_header, read_metadata
from wanexport.runtime.dtypes import DTYPES, PRECISIONS
from wanexport.runtime.errors import BadRequest, WanExportWarning, printable
from wanexport.runtime.parts.key_tables import required
from wanexport.runtime.plain_wan import family_name
from wanexport.runtime.wan_config import WanConfig
from wanexport.runtime.wan_keys import official_name

# What one expert of an A14B is taken for: each has the tensors of a model that is one.
_OF_ONE_EXPERT = ("t2v", "i2v-a14b")
STORED_DTYPES = tuple(DTYPES[name].stored for name in PRECISIONS)

_UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")  # diffusers ignores it too


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor of a checkpoint lies."""

    file: Path
    entry: TensorEntry
    name: str  # as the file has it


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint. `tensors` has, for each expert, the official names."""

    path: Path
    layout: str
    config: WanConfig
    tensors: dict[str, dict[str, SourceTensor]]
    boundary: float | None  # where the checkpoint itself states one
    alone: str = ""  # what says that this is one expert of an A14B without the other

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts; empty for a model without."""
        return tuple(expert for expert in self.tensors if expert)


def open_checkpoint(path: Path) -> Checkpoint:
    """Recognise a folder (or one safetensors file) as a Wan checkpoint.

    Raises WanExportError when there is none, an expert, a shard or a tensor is missing, tensors are
    unexpected or wrongly shaped, the files contradict each other, or the experts differ in size.
    """
    try:
        return _open(path)
    except OSError as error:
        place = path if error.filename is None else error.filename
        raise BadRequest(f"cannot read {printable(place)}: {error.strerror}") from error


def _open(path: Path) -> Checkpoint:
    index = read_index(path) if path.is_dir() else {}
    boundary = boundary_of(index, path)
    parts = find_parts(path, index)
    experts = len([expert for expert in parts if expert])
    found = {expert: _open_model(part, expert, experts) for expert, part in parts.items()}
    configs = {config for config, _, _ in found.values()}
    if len(configs) > 1:
        raise BadRequest(
            f"the two experts in {printable(path)} differ in size: expected one config for both"
        )
    config = configs.pop()
    if len(parts) > 1 and "boundary_ratio" in index and boundary is None:
        warnings.warn(
            f"{printable(path)}/model_index.json has no boundary_ratio for its two experts: the "
            f"official one is taken",
            WanExportWarning,
            stacklevel=2,
        )
    alone = ""
    if len(parts) == 1 and config.family in _OF_ONE_EXPERT:
        ((_, _, tensors),) = found.values()
        alone = why_alone(path, {tensor.file for tensor in tensors.values()})
    return Checkpoint(
        path=path,
        layout=next(iter(found.values()))[1],
        config=config,
        tensors={expert: tensors for expert, (_, _, tensors) in found.items()},
        boundary=boundary,
        alone=alone,
    )


def _open_model(
    path: Path, expert: str, experts: int
) -> tuple[WanConfig, str, dict[str, SourceTensor]]:
    tensors: dict[str, SourceTensor] = {}
    entries: dict[str, TensorEntry] = {}  # by the names that the files have
    files, listed = weight_files(path)
    for file in files:
        own = _read_file(file, expert)
        for stored, entry in own.items():
            name = stored.removeprefix(PREFIX)
            if name in tensors:
                raise BadRequest(
                    f"{printable(name)} is in {printable(tensors[name].file)} and in "
                    f"{printable(file)}: pass -m one of the files, or a folder with one model"
                )
            tensors[name] = SourceTensor(file, entry, stored)
        check_listed(listed, own, file)
        entries |= own
    refuse_foreign_tensors(entries, path)
    layout = "diffusers" if "condition_embedder.time_proj.weight" in tensors else "official"
    if layout == "diffusers":
        tensors = {official_name(k): t for k, t in tensors.items() if not _UNUSED.fullmatch(k)}
    config_file = files[0].parent / "config.json"
    owned = any(file.name.startswith("diffusion_pytorch_model") for file in files)
    stated = read_config(config_file, owned=owned)
    config = recognise(tensors, stated, path, config_file, experts=experts)
    check_config(stated, config, config_file)
    _check_tensors(tensors, config, path)
    return config, layout, tensors


def _read_file(file: Path, expert: str) -> dict[str, TensorEntry]:
    """The entries of one file, which is of a Wan and not of the other expert."""
    refuse_foreign_file(file)
    entries = read_header(file)
    refuse_foreign_tensors(entries, file, partial=True)
    if "_quantization_metadata" in read_metadata(file):
        raise BadRequest(
            f"{printable(file)} is quantised, as its header's _quantization_metadata says, which "
            f"is not read yet: take the fp32, bf16 or fp16 file of the same model"
        )
    if expert and expert_of_name(file.name) not in ("", expert):
        raise BadRequest(
            f"{printable(file)} lies where the {expert.replace('_', '-')} expert belongs, and is "
            f"named as the other: put each into its own folder"
        )
    return entries


def recognise(
    tensors: Mapping[str, SourceTensor],
    stated: Mapping[str, Any],
    path: Path,
    config_file: Path,
    *,
    experts: int,
) -> WanConfig:
    """The config that follows from the tensors; config.json adds only heads, text_len and eps.

    experts is how many the model has, 0 for a model that is one.
    Raises BadRequest when a tensor that decides the config is missing.
    """
    what = f"{printable(path)} is no Wan diffusion transformer"
    shapes = {name: tensor.entry.shape for name, tensor in tensors.items()}
    shape = required(shapes, what, "the official or the diffusers layout", BadRequest)
    dim, in_channels = shape("patch_embedding.weight", 5)[:2]
    out_channels = shape("head.head.weight", 2)[0] // 4
    if (in_channels, out_channels) == (48, 16):
        raise BadRequest(
            f"{printable(path)} is of Wan-Fun-Control (48 channels in, 16 out), which is not read "
            f"yet: take a plain Wan: T2V, I2V, FLF2V, TI2V or an A14B"
        )
    num_layers = _count_blocks(tensors, path)
    heads, text_len, eps = settings(stated, dim, config_file)
    image_tokens = _image_tokens(tensors)
    return WanConfig(
        family=family_name(in_channels - out_channels, out_channels, image_tokens, experts),
        dim=dim,
        ffn_dim=shape("blocks.0.ffn.0.weight", 2)[0],
        num_heads=heads,
        num_layers=num_layers,
        in_channels=in_channels,
        out_channels=out_channels,
        image_tokens=image_tokens,
        text_dim=shape("text_embedding.0.weight", 2)[1],
        text_len=text_len,
        freq_dim=shape("time_embedding.0.weight", 2)[1],
        eps=eps,
    )


def _image_tokens(names: Collection[str]) -> int:
    """How many CLIP tokens a model of these tensors attends to."""
    if "img_emb.proj.0.weight" not in names:
        return 0
    return 514 if "img_emb.emb_pos" in names else 257


def _count_blocks(names: Iterable[str], path: Path) -> int:
    """How many blocks the tensors are of. Raises BadRequest when one of them is not there."""
    matches = (re.match(r"blocks\.(\d{1,6})\.", name) for name in names)
    blocks = {int(match[1]) for match in matches if match}
    if blocks != set(range(len(blocks))):
        raise BadRequest(
            f"{printable(path)} has blocks up to {max(blocks)}, but not all: download again"
        )
    return len(blocks)


def _check_tensors(tensors: Mapping[str, SourceTensor], config: WanConfig, path: Path) -> None:
    expected = parameter_shapes(config)
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {printable(name)}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        entry = tensors[name].entry
        if entry.shape != expected[name]:
            problems.append(f"{name} is {list(entry.shape)}, expected {list(expected[name])}")
        elif entry.dtype not in STORED_DTYPES:
            problems.append(f"{name} is {entry.dtype}, expected {', '.join(STORED_DTYPES)}")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadRequest(
            f"{printable(path)} does not fit a Wan of dim {config.dim} and {config.num_layers} "
            f"blocks: {'; '.join(sorted(problems)[:8])}{more}"
        )
