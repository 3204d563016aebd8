"""What `-m` means: a folder, a file, a hub id or a file there, or with random weights a preset."""

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from wanexport.graphs.checkpoint import Checkpoint, open_checkpoint
from wanexport.graphs.config import PRESETS, variant
from wanexport.graphs.experts import FOLDERS, expert_of_name
from wanexport.graphs.torch_file import ema_option, lacks_generator
from wanexport.graphs.weights import CheckpointWeights, RandomWeights, WeightSource
from wanexport.runtime.bundle.manifest import Manifest
from wanexport.runtime.errors import BadRequest, printable
from wanexport.runtime.family import FAMILIES, are_alike
from wanexport.runtime.parts.hub import EXAMPLE, download
from wanexport.runtime.wan_config import WanConfig

DEFAULT_MODEL = EXAMPLE
DEFAULT_PRESET = "t2v-1.3b"
_MODEL_FILES = (
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
_DIT_FILES = (
    "model_index.json",
    *_MODEL_FILES,
    *(f"{folder}/{name}" for folder in FOLDERS for name in _MODEL_FILES),
)


@dataclass(frozen=True)
class ModelSource:
    """A model to build; `weights` has one entry for each expert, or "" where there are none.

    `record` is for the manifest, and so is `loras`, what was merged into each expert.
    """

    name: str
    config: WanConfig
    weights: dict[str, WeightSource]
    boundary: float | None
    record: dict[str, Any]
    loras: Mapping[str, Sequence[dict[str, Any]]] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts; empty for a model without."""
        return tuple(expert for expert in self.weights if expert)

    def record_of(self, expert: str) -> dict[str, Any]:
        """Where the weights of one expert come from, for the manifest."""
        loras = self.loras.get(expert)
        return {**self.record, "lora": list(loras)} if loras else self.record


def resolve(
    model: str | None,
    random_weights: int | None,
    *,
    low_noise: str | None = None,
    expert_alone: bool = False,
    family: str | None = None,
    ema: bool | None = None,
) -> ModelSource:
    """Find the model; with low_noise, model and this are the two experts of an A14B.

    expert_alone allows one expert of an A14B without the other. family is what the model is of,
    where its tensors are those of two. ema is whether generator_ema is read of a file that has
    this or generator; None takes the average where there is one. Raises BadRequest when a
    checkpoint does not exist, is no Wan checkpoint, is one expert alone, of another family, or
    lacks the generator that was asked for.
    """
    found = _found(model, random_weights, low_noise, expert_alone, ema)
    return found if family is None else _of_family(found, family)


def _of_family(source: ModelSource, family: str) -> ModelSource:
    """The model as one of a family whose tensors it has. Raises BadRequest for another's."""
    own = source.config.family
    if family == own:
        return source
    if not are_alike(family, own):
        raise BadRequest(
            f"--family {family}: the tensors of {source.name} are of family {own}; leave it out"
        )
    config = replace(source.config, family=family)
    name = variant(config, source.experts) if source.name != own else family
    return replace(source, config=config, name=name)


def _found(
    model: str | None,
    random_weights: int | None,
    low_noise: str | None,
    expert_alone: bool,
    ema: bool | None,
) -> ModelSource:
    """What `resolve` finds, of the family that it says itself."""
    for option, value in (("-m", model), ("--low-noise", low_noise)):
        if value is not None and not value.strip():
            raise BadRequest(f"{option} is empty: name a folder, a file or a hub id, as {EXAMPLE}")
    if low_noise is not None and (model is None or random_weights is not None or expert_alone):
        raise BadRequest(
            "--low-noise is the second expert of an A14B: pass -m the high-noise one, and leave "
            "out --random-weights and --expert-alone"
        )
    if ema is not None and (model is None or random_weights is not None):
        raise BadRequest(f"{ema_option(ema)} is of a file that -m names: leave it out")
    if random_weights is not None:
        return _random(model or DEFAULT_PRESET, random_weights)
    model = model or DEFAULT_MODEL
    place = _find(model, ema)
    if low_noise is not None:
        low = _find(low_noise, ema)
        checkpoint = open_checkpoint(place.path, low.path, ema=ema)
        return _from_checkpoint(checkpoint, {**place.origin, "low_noise": low.whole})
    checkpoint = open_checkpoint(place.path, ema=ema)
    named = f"{place.name} is named so" if expert_of_name(place.name.rpartition("/")[2]) else ""
    _check_alone(checkpoint, printable(model, 300), checkpoint.alone or named, expert_alone)
    return _from_checkpoint(checkpoint, place.origin)


def check_of_model(
    model: str | Path | None, low_noise: str | Path | None, ema: bool | None
) -> None:
    """Raise BadRequest for what says more of a checkpoint where none is named."""
    if low_noise is not None and model is None:
        raise BadRequest("--low-noise is the second expert of -m: pass the high-noise one with -m")
    if ema is not None and model is None:
        raise BadRequest(f"{ema_option(ema)} is of a file that -m names: leave it out, or pass -m")


def resolve_as(
    manifest: Manifest, model: str, low_noise: str | Path | None, ema: bool | None
) -> ModelSource:
    """A checkpoint of the model that a bundle is of, as `resolve` takes it.

    Raises BadRequest when it is none, or of another model.
    """
    low = None if low_noise is None else str(low_noise)
    alone = not manifest.experts and low is None
    source = resolve(model, None, low_noise=low, expert_alone=alone, ema=ema)
    own = manifest.config.family
    if own in FAMILIES and are_alike(own, source.config.family):
        source = _of_family(source, own)
    if (source.config, source.experts) != (manifest.config, manifest.experts):
        raise BadRequest(
            f"{printable(model)} is another model ({source.name}) than the bundle's "
            f"({manifest.model}): pass -m the checkpoint that it was built from, or a like one"
        )
    return source


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint lies; `name` is what the hub calls it, empty for what is here."""

    path: Path
    name: str
    origin: dict[str, Any]  # for the manifest

    @property
    def whole(self) -> str:
        """How -m would name it again."""
        parts = (self.origin.get(key) for key in ("path", "hub", "file"))
        return ":".join(part for part in parts if part)


def _find(model: str, ema: bool | None) -> _Place:
    """A folder or file here, or of the hub, from which it is downloaded.

    Of a whole repository only safetensors are, in which there is no generator of ema's kind.
    """
    path = Path(model)
    if os.path.lexists(path):  # unlike Path's, it is False for a name that is too long
        whole = str(path.resolve())
        return _Place(path, "", {"path": whole})
    if model.lower() in PRESETS:
        raise BadRequest(
            f"{model} is a preset, not a checkpoint: add --random-weights SEED, "
            f"or name a folder or hub id"
        )
    hub, _, file = model.partition(":")
    if file:
        return _find_file(hub, file)
    if ema is not None:
        raise lacks_generator(model, ema)
    folder = download(hub, _DIT_FILES)
    if not any(file.suffix == ".safetensors" for file in folder.rglob("*")):
        raise BadRequest(
            f"{model} has no {_MODEL_FILES[1]} where a Wan has them: name the file that you mean, "
            f"-m {model}:FILE"
        )
    return _Place(folder, model, {"hub": model, "revision": folder.name})


def _find_file(hub: str, file: str) -> _Place:
    """One file of a repository of the hub."""
    parts = PurePosixPath(file).parts
    if not parts or ".." in parts or file.startswith("/") or "\\" in file:
        raise BadRequest(
            f"{printable(file)} is no file of a repository: expected one as in "
            f"-m Comfy-Org/Wan_2.2_ComfyUI_Repackaged:split_files/diffusion_models/FILE"
        )
    folder = download(hub, [glob.escape(file)])
    if not (folder / file).is_file():
        raise BadRequest(f"{hub} has no file {printable(file)}: look up its name on the hub")
    return _Place(folder / file, file, {"hub": hub, "revision": folder.name, "file": file})


def _check_alone(checkpoint: Checkpoint, name: str, reason: str, allowed: bool) -> None:
    """Refuse one expert of an A14B by itself, unless it was asked for."""
    if reason and not allowed and not checkpoint.experts:
        raise BadRequest(
            f"{name} is one expert of an A14B ({reason}): pass the other with --low-noise (-m is "
            f"the high-noise one), -m a folder with both, or --expert-alone to build this one by "
            f"itself"
        )


def _random(model: str, seed: int) -> ModelSource:
    preset = PRESETS.get(model.lower())
    if preset is None:
        raise BadRequest(
            f"{printable(repr(model))} is no preset: --random-weights takes {', '.join(PRESETS)}"
        )
    experts = preset.experts or ("",)
    return ModelSource(
        name=model.lower(),
        config=preset.config,
        weights={expert: RandomWeights(preset.config, seed, expert) for expert in experts},
        boundary=None,
        record={"random_seed": seed, "preset": model.lower()},
    )


def _from_checkpoint(checkpoint: Checkpoint, origin: dict[str, Any]) -> ModelSource:
    return ModelSource(
        name=variant(checkpoint.config, checkpoint.experts),
        config=checkpoint.config,
        weights={e: CheckpointWeights(tensors) for e, tensors in checkpoint.tensors.items()},
        boundary=checkpoint.boundary if checkpoint.experts else None,
        record={
            **origin,
            "layout": checkpoint.layout,
            **({"generator": checkpoint.generator} if checkpoint.generator else {}),
            **({"stored": checkpoint.stored} if checkpoint.stored else {}),
            "files": _file_stats(checkpoint),
        },
    )


def _file_stats(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and modification time of every weights file: unchanged stats mean unchanged content."""
    files = {t.file for tensors in checkpoint.tensors.values() for t in tensors.values()}
    stats = {file: file.stat() for file in sorted(files)}
    return {
        _relative(file, checkpoint.path.parent): [found.st_size, found.st_mtime_ns]
        for file, found in stats.items()
    }


def _relative(file: Path, folder: Path) -> str:
    """A file's path within a folder; its whole one where it lies elsewhere."""
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file.resolve())
