"""What `-m` means: a folder, a Hugging Face hub id, or with random weights a preset."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanexport.graphs.checkpoint import Checkpoint, open_checkpoint
from wanexport.graphs.config import PRESETS, variant
from wanexport.graphs.experts import FOLDERS, expert_of_name
from wanexport.graphs.weights import CheckpointWeights, RandomWeights
from wanexport.runtime.errors import BadRequest, printable
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
    """A model to build; `weights` has one entry for each expert, or "" where there are none."""

    name: str
    config: WanConfig
    weights: dict[str, CheckpointWeights | RandomWeights]
    boundary: float | None
    record: dict[str, Any]  # for the manifest

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts; empty for a model without."""
        return tuple(expert for expert in self.weights if expert)


def resolve(
    model: str | None, random_weights: int | None, *, expert_alone: bool = False
) -> ModelSource:
    """Find the model; expert_alone allows one expert of an A14B without the other.

    Raises BadRequest when it does not exist, is no Wan checkpoint, or is one expert alone.
    """
    if model is not None and not model.strip():
        raise BadRequest(f"-m is empty: name a folder or a hub id, as {EXAMPLE}")
    if random_weights is not None:
        return _random(model or DEFAULT_PRESET, random_weights)
    model = model or DEFAULT_MODEL
    path = Path(model)
    if os.path.lexists(path):  # unlike Path's, it is False for a name that is too long
        checkpoint = open_checkpoint(path)
        _check_alone(checkpoint, printable(path), checkpoint.alone, expert_alone)
        return _from_checkpoint(checkpoint, {"path": str(path.resolve())})
    if model.lower() in PRESETS:
        raise BadRequest(
            f"{model} is a preset, not a checkpoint: add --random-weights SEED, "
            f"or name a folder or hub id"
        )
    path = download(model, _DIT_FILES)
    if not any(file.suffix == ".safetensors" for file in path.rglob("*")):
        raise BadRequest(
            f"{model} has no {_MODEL_FILES[1]} where a Wan has them: download the file that you "
            f"mean and pass -m FILE"
        )
    checkpoint = open_checkpoint(path)
    named = f"{model} is named so" if expert_of_name(model.rpartition("/")[2]) else ""
    _check_alone(checkpoint, model, checkpoint.alone or named, expert_alone)
    return _from_checkpoint(checkpoint, {"hub": model, "revision": path.name})


def _check_alone(checkpoint: Checkpoint, name: str, reason: str, allowed: bool) -> None:
    """Refuse one expert of an A14B by itself, unless it was asked for."""
    if reason and not allowed and not checkpoint.experts:
        raise BadRequest(
            f"{name} is one expert of an A14B ({reason}): pass -m a folder with both, in "
            f"high_noise_model/ and low_noise_model/, or --expert-alone to build this one by itself"
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
        record={**origin, "layout": checkpoint.layout, "files": _file_stats(checkpoint)},
    )


def _file_stats(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and modification time of every weights file: unchanged stats mean unchanged content."""
    files = {t.file for tensors in checkpoint.tensors.values() for t in tensors.values()}
    stats = {file: file.stat() for file in sorted(files)}
    return {
        str(f.relative_to(checkpoint.path.parent)): [s.st_size, s.st_mtime_ns]
        for f, s in stats.items()
    }
