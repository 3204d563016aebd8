"""Where a checkpoint's models and files lie, and whether all of them arrived."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from wanexport.graphs.experts import expert_of_name
from wanexport.graphs.json_file import read_object
from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.wan_config import EXPERTS

_NAMES = "diffusion_pytorch_model*.safetensors"
_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_PAIRS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.(safetensors|gguf|pt|pth|bin)")
# The endings of files that hold a model: a folder's are those of the first group that it has.
_ENDINGS = ((".safetensors",), (".gguf",), (".pt", ".pth", ".ckpt", ".bin"))
# What else lies beside a model under these endings.
_PART_FILES = ("models_*.pth", "Wan2.*_VAE.pth", "training_args.bin", "optimizer*", "scheduler*")


@dataclass(frozen=True)
class Part:
    """The files of one model; `listed` is the file of each tensor, where an index lists them."""

    path: Path  # of the folder or the file
    files: tuple[Path, ...]
    listed: Mapping[str, str] | None = None


def find_parts(path: Path, index: Mapping[str, Any]) -> dict[str, Part]:
    """The files of each expert, or of the one model, which is called "".

    Raises BadRequest when an expert or a file did not arrive, or more than one model did.
    """
    places = _find_places(path, index)
    if len(places) > 1:
        return {expert: _weight_files(place) for expert, place in places.items()}
    ((name, place),) = places.items()
    part = _weight_files(place)
    if not place.is_dir() or part.listed is not None:
        return {name: part}
    return _pair_of(part) or {name: part}


def _pair_of(part: Part) -> dict[str, Part]:
    """The experts whose files lie in one folder, told apart by their names; empty for one model.

    Raises BadRequest when there are files of both, and others.
    """
    groups: dict[str, list[Path]] = {}
    for file in part.files:
        groups.setdefault(expert_of_name(file.name), []).append(file)
    if not {*EXPERTS} <= groups.keys():
        return {}
    if len(groups) > len(EXPERTS) or not all(map(_is_one_model, groups.values())):
        names = _few([printable(file.name) for file in part.files])
        raise BadRequest(
            f"{printable(part.path)} has more files than one for each expert ({names}): name the "
            f"two, -m HIGH --low-noise LOW"
        )
    return {expert: Part(part.path, tuple(groups[expert])) for expert in EXPERTS}


def _is_one_model(files: Sequence[Path]) -> bool:
    """Whether these are one file, or numbered shards of one model."""
    stems = {shard[1] if (shard := _SHARD.fullmatch(file.name)) else None for file in files}
    return len(files) == 1 or (len(stems) == 1 and None not in stems)


def _find_places(path: Path, index: Mapping[str, Any]) -> dict[str, Path]:
    """The folder or file of each expert, or of the one model."""
    if not path.is_dir():
        return {"": path}
    where = printable(path)
    present = {name for pair in _PAIRS for name in pair if (path / name).is_dir()}
    places = [pair for pair in _PAIRS if present & {*pair}]
    found = [pair[0] if pair[0] in present else pair[1] for pair in places]
    if any(fnmatch(name, _NAMES) for name in os.listdir(path)):
        found.append(_NAMES)
    if len(found) > 1:
        raise BadRequest(
            f"{where} has a model in {' and in '.join(found)}: pass -m a folder with one of them"
        )
    _check_index(path, index, present)
    if not places:
        return {"": path}
    (pair,) = places
    missing = [name for name in pair if name not in present]
    if not missing:
        return dict(zip(EXPERTS, (path / name for name in pair), strict=True))
    if present == {"transformer"}:
        return {"": path / "transformer"}
    (other,) = present
    raise BadRequest(_lacks(path, missing[0], other, "the other expert is there"))


def _check_index(path: Path, index: Mapping[str, Any], present: Collection[str]) -> None:
    """Hold the folders of a pipeline against its model_index.json."""
    for name in ("transformer", "transformer_2"):
        other = "transformer" if name == "transformer_2" else "transformer_2"
        if name in index and (index[name] not in (None, [None, None])) != (name in present):
            if name in present:
                raise BadRequest(
                    f"{printable(path)} has {name}/, but its model_index.json says that there is "
                    f"none: download it again, or pass -m {printable(path / name)}"
                )
            raise BadRequest(_lacks(path, name, other, "model_index.json names it"))
    if index.get("boundary_ratio") is not None and "transformer_2" not in present:
        reason = f"model_index.json has boundary_ratio {index['boundary_ratio']}"
        raise BadRequest(_lacks(path, "transformer_2", "transformer", reason))


def _lacks(path: Path, name: str, other: str, reason: str) -> str:
    return (
        f"{printable(path)} lacks {name}/ ({reason}): download it again, or to build one expert "
        f"by itself pass -m {printable(path / other)} with --expert-alone"
    )


def _weight_files(path: Path) -> Part:
    """The files of a folder, or the one file. Raises BadRequest when one or all are missing."""
    if not path.is_dir():
        shard = _SHARD.fullmatch(path.name)
        if shard and int(shard[3]) > 1:
            raise BadRequest(
                f"{printable(path)} is one of {int(shard[3])} shards: pass -m its folder"
            )
        return Part(path, (path,))
    names = sorted(os.listdir(path))
    if _INDEX in names:
        return _listed_files(path)
    chosen = [name for name in names if fnmatch(name, _NAMES)] or _of_a_format(names)
    if not chosen:
        raise BadRequest(
            f"{printable(path)} is no Wan checkpoint: expected *.safetensors, *.gguf or *.pt in "
            f"it, in high_noise_model/ and low_noise_model/, or in transformer/"
        )
    _check_shards(path, chosen)
    return Part(path, tuple(path / name for name in chosen))


def _of_a_format(names: Sequence[str]) -> list[str]:
    """The files of a folder that hold a model: both experts, or those of its first format."""
    own = [name for name in names if not any(fnmatch(name, part) for part in _PART_FILES)]
    models = [name for name in own if name.lower().endswith(sum(_ENDINGS, ()))]
    if len(models) == len(EXPERTS) and {*map(expert_of_name, models)} == {*EXPERTS}:
        return models
    for endings in _ENDINGS:
        if chosen := [name for name in own if name.lower().endswith(endings)]:
            return chosen
    return []


def _listed_files(path: Path) -> Part:
    index = path / _INDEX
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise BadRequest(f"{printable(index)} has no weight_map: download it again")
    values = list(listed.values())
    if not all(isinstance(value, str) and Path(value).name == value for value in values):
        raise BadRequest(f"{printable(index)} names what are no files: download it again")
    names = sorted(set(values))
    there = os.listdir(path)
    missing = [printable(name) for name in names if name not in there]
    if missing:
        raise BadRequest(
            f"{printable(path)} lacks {_few(missing)}, which its index lists: download again"
        )
    strays = [printable(name) for name in there if fnmatch(name, _NAMES) and name not in names]
    if strays:
        raise BadRequest(
            f"{printable(path)} has {_few(sorted(strays))}, which its index does not list: move "
            f"what is of another model to a folder of its own, or delete the index"
        )
    return Part(path, tuple(path / name for name in names), listed)


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_listed(listed: Mapping[str, str] | None, names: Collection[str], file: Path) -> None:
    """Raise BadRequest when a file and the index of its model list other tensors."""
    if listed is None:
        return
    expected = {name for name, place in listed.items() if place == file.name}
    for some, what in (
        (expected - {*names}, "lacks what its index lists"),
        ({*names} - expected, "has what its index does not list"),
    ):
        if some:
            few = _few(sorted(map(printable, some)))
            raise BadRequest(f"{printable(file)} {what} ({few}): download both again")


def _check_shards(path: Path, names: list[str]) -> None:
    """Refuse a set of numbered shards that is not whole."""
    for name in names:
        if shard := _SHARD.fullmatch(name):
            stem, count, ending = shard[1], int(shard[3]), shard[4]
            whole = (f"{stem}-{k:05}-of-{count:05}.{ending}" for k in range(1, count + 1))
            missing = [printable(other) for other in whole if other not in names]
            if missing:
                raise BadRequest(
                    f"{printable(path)} lacks {_few(missing)} of {count} shards: download again"
                )
