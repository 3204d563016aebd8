"""Find a Wan checkpoint's tensors in either layout, and the config that follows from them.

Layouts: the official one (Wan-Video) and diffusers', as single files or shards with an index, two
experts in folders or files of their own. The formats of files are those of `stored_file.py` and
`quantised.py`.
"""

import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from wanexport.graphs.experts import expert_of_name, why_alone
from wanexport.graphs.foreign import FSDP, prefix_of, refuse_foreign_tensors
from wanexport.graphs.places import Part, check_listed, find_parts
from wanexport.graphs.quantised import describe_stored, with_scales
from wanexport.graphs.source_tensor import FLOATS, SCALED, SourceTensor
from wanexport.graphs.stated import (
    SELF_FORCING,
    boundary_of,
    check_config,
    is_of_causal,
    read_config,
    read_index,
    settings,
)
from wanexport.graphs.stored_file import open_stored
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.dtypes import STORED
from wanexport.runtime.errors import BadRequest, WanExportWarning, printable
from wanexport.runtime.key_tables import required
from wanexport.runtime.plain_wan import family_name
from wanexport.runtime.wan_config import EXPERTS, WanConfig
from wanexport.runtime.wan_keys import official_name

# What one expert of an A14B is taken for: each has the tensors of a model that is one.
_OF_ONE_EXPERT = ("t2v", "i2v-a14b")

_UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")  # diffusers ignores it too


@dataclass(frozen=True)
class Checkpoint:
    """A recognised checkpoint. `tensors` has, for each expert, the official names."""

    path: Path
    layout: str
    config: WanConfig
    tensors: dict[str, dict[str, SourceTensor]]
    boundary: float | None  # where the checkpoint itself states one
    alone: str = ""  # what says that this is one expert of an A14B without the other
    stored: str = ""  # what is quantised, and how; empty where nothing is
    generator: str = ""  # which of a training's models it is; empty where it is no such

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts; empty for a model without."""
        return tuple(expert for expert in self.tensors if expert)


def open_checkpoint(
    path: Path, low_noise: Path | None = None, *, ema: bool | None = None
) -> Checkpoint:
    """Recognise a folder or a file as a Wan checkpoint; with low_noise, two as both experts.

    ema is which of the two models of a training's file is read, as in `read_torch_file`.
    Raises WanExportError when there is none, an expert, a shard or a tensor is missing, tensors are
    unexpected or wrongly shaped, the files contradict each other, the experts differ in size or
    are one, or the format is not read.
    """
    try:
        return _open(path, ema) if low_noise is None else _open_pair(path, low_noise, ema)
    except OSError as error:
        place = path if error.filename is None else error.filename
        raise BadRequest(f"cannot read {printable(place)}: {error.strerror}") from error


@dataclass(frozen=True)
class _Model:
    """One model of a checkpoint: all of it, or an expert."""

    config: WanConfig
    layout: str
    tensors: dict[str, SourceTensor]
    generators: frozenset[str]


def _open(path: Path, ema: bool | None) -> Checkpoint:
    index = read_index(path) if path.is_dir() else {}
    boundary = boundary_of(index, path)
    parts = find_parts(path, index)
    checkpoint = _checkpoint(path, parts, boundary, ema)
    if len(parts) > 1 and "boundary_ratio" in index and boundary is None:
        warnings.warn(
            f"{printable(path)}/model_index.json has no boundary_ratio for its two experts: the "
            f"official one is taken",
            WanExportWarning,
            stacklevel=3,
        )
    if len(parts) == 1 and checkpoint.config.family in _OF_ONE_EXPERT:
        (tensors,) = checkpoint.tensors.values()
        alone = why_alone(path, {tensor.file for tensor in tensors.values()})
        return replace(checkpoint, alone=alone)
    return checkpoint


def _open_pair(high: Path, low: Path, ema: bool | None) -> Checkpoint:
    """Both experts, each a folder or file of its own."""
    parts = {}
    for expert, path in zip(EXPERTS, (high, low), strict=True):
        _check_expert(path, expert)
        found = find_parts(path, read_index(path) if path.is_dir() else {})
        if len(found) > 1:
            raise BadRequest(
                f"{printable(path)} has both experts: pass -m that alone, or one of its files for "
                f"each of -m and --low-noise"
            )
        parts[expert] = found[""]
    return _checkpoint(high, parts, None, ema)


def _checkpoint(
    path: Path, parts: Mapping[str, Part], boundary: float | None, ema: bool | None
) -> Checkpoint:
    experts = len([expert for expert in parts if expert])
    models = {expert: _open_model(part, expert, experts, ema) for expert, part in parts.items()}
    if len({model.config for model in models.values()}) > 1:
        raise BadRequest(
            f"the two experts in {printable(path)} differ in size: expected one config for both"
        )
    if len(models) > 1:
        _refuse_twins(*(model.tensors for model in models.values()))
    first = next(iter(models.values()))
    generators = {name for model in models.values() for name in model.generators}
    if len(generators) > 1:
        raise BadRequest(
            f"{printable(path)} has files with generator_ema and files without: add --no-ema to "
            f"read generator of all, or take files of one training"
        )
    return Checkpoint(
        path=path,
        layout=first.layout,
        config=first.config,
        tensors={expert: model.tensors for expert, model in models.items()},
        boundary=boundary,
        stored=describe_stored(t for model in models.values() for t in model.tensors.values()),
        generator="".join(generators),
    )


def _refuse_twins(high: Mapping[str, SourceTensor], low: Mapping[str, SourceTensor]) -> None:
    """Raise BadRequest when both experts are one file: the high-noise one given twice, say."""
    for name, tensor in high.items():
        if not os.path.samefile(tensor.file, low[name].file):
            return
    raise BadRequest(
        f"{printable(tensor.file)} is given as both experts: pass -m the high-noise file and "
        f"--low-noise the other"
    )


def _open_model(part: Part, expert: str, experts: int, ema: bool | None) -> _Model:
    files = _read_files(part, expert, ema)
    tensors = with_scales(files.tensors, files.quantisation, part.path)
    layout = "diffusers" if "condition_embedder.time_proj.weight" in tensors else "official"
    if layout == "diffusers":
        used = {name: t for name, t in tensors.items() if not _UNUSED.fullmatch(name)}
        tensors = {official_name(name): tensor for name, tensor in used.items()}
        if len(tensors) < len(used):
            raise BadRequest(
                f"{printable(part.path)} has tensors under diffusers' names and the official ones "
                f"too: download it again"
            )
    config_file = part.files[0].parent / "config.json"
    owned = any(file.name.startswith("diffusion_pytorch_model") for file in part.files)
    stated = read_config(config_file, owned=owned)
    config = recognise(tensors, stated, part.path, config_file, experts=experts)
    if config.family == "t2v" and (files.generators or is_of_causal(stated)):
        config = replace(config, family=SELF_FORCING)
    is_quantised = any(tensor.is_quantised for tensor in tensors.values())
    check_config(stated, config, config_file, is_quantised=is_quantised)
    _check_tensors(tensors, config, part.path)
    return _Model(config, layout, tensors, files.generators)


class _Files(NamedTuple):
    """The tensors of a model without the prefix of their names, and what its files say of them."""

    tensors: dict[str, SourceTensor]
    quantisation: list[Any]
    generators: frozenset[str]


def _read_files(part: Part, expert: str, ema: bool | None) -> _Files:
    found: dict[str, SourceTensor] = {}  # by the names that the files have
    quantisation, generators = [], set()
    for file in part.files:
        _check_expert(file, expert)
        own = open_stored(file, ema)
        for name in own.tensors.keys() & found.keys():
            raise BadRequest(
                f"{printable(name)} is in {printable(found[name].file)} and in "
                f"{printable(file)}: pass -m one of the files, or a folder with one model"
            )
        check_listed(part.listed, own.tensors, file)
        found |= own.tensors
        quantisation += [] if own.quantisation is None else [own.quantisation]
        generators |= {own.generator} - {""}
    refuse_foreign_tensors({name: t.entry.shape for name, t in found.items()}, part.path)
    plain = {name.replace(FSDP, ""): tensor for name, tensor in found.items()}
    prefix = prefix_of(plain)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in plain.items()}
    if len(tensors) < len(found):
        twice = prefix if len(plain) == len(found) else FSDP
        raise BadRequest(
            f"{printable(part.path)} has names twice, with and without {twice}: download it again"
        )
    return _Files(tensors, quantisation, frozenset(generators))


def _check_expert(file: Path, expert: str) -> None:
    """Refuse a file that is named as the other expert than the one that it is given as."""
    if expert and expert_of_name(file.name) not in ("", expert):
        raise BadRequest(
            f"{printable(file)} is given as the {expert.replace('_', '-')} expert, and is named as "
            f"the other: pass -m the high-noise one and --low-noise the other, or put each into "
            f"its own folder"
        )


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
        elif entry.dtype in STORED and entry.dtype not in (*FLOATS, *SCALED):
            problems.append(f"{name} is {entry.dtype}, expected {', '.join(FLOATS)}")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadRequest(
            f"{printable(path)} does not fit a Wan of dim {config.dim} and {config.num_layers} "
            f"blocks: {'; '.join(sorted(problems)[:8])}{more}"
        )
