"""`wanexport add`: another weights set for the engines that a bundle has."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanexport.exporter.backends.backend import Progress
from wanexport.exporter.bundle.place import check_place
from wanexport.exporter.bundle.writer import BundleWriter, open_bundle
from wanexport.exporter.model_source import ModelSource, check_of_model, resolve_as
from wanexport.exporter.sets.convert import add_weights
from wanexport.exporter.sets.loras import LoraOptions, merged, opened
from wanexport.graphs.merged import BundleWeights
from wanexport.graphs.weights import bundle_tensors
from wanexport.runtime.bundle.check import check_content
from wanexport.runtime.bundle.manifest import (
    BASE,
    ENCODERS,
    VAE,
    Manifest,
    read_manifest,
    weights_label,
)
from wanexport.runtime.bundle.signature import parameter_shapes
from wanexport.runtime.bundle.usable import engine_names
from wanexport.runtime.decode import Name, decode
from wanexport.runtime.errors import BadRequest, BundleError, printable, refuse_empty
from wanexport.runtime.lora.given import Given
from wanexport.runtime.machine.memory import peak_rss
from wanexport.runtime.recipes import recipe_named
from wanexport.runtime.wan_config import EXPERTS


def add(
    bundle: str | Path,
    name: str,
    *,
    model: str | Path | None = None,
    low_noise: str | Path | None = None,
    ema: bool | None = None,
    lora: Sequence[Given] = (),
    lora_high: Sequence[Given] = (),
    lora_low: Sequence[Given] = (),
    lora_partial: bool = False,
    recipe: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Add a weights set to a bundle, and return the record of what was done; nothing is compiled.

    model, low_noise and ema are a checkpoint of the bundle's model, as `build` takes it; without,
    the LoRAs are merged into the bundle's base set, as it was rounded. lora to lora_partial are as
    in `build`. recipe is how a run with the set samples, one of `recipes.RECIPES`.
    There is a file for each precision that the bundle's engines have, and each expert.
    Raises WanExportError for whatever the caller can put right, and leaves the bundle as it was.
    """
    refuse_empty(bundle=bundle, name=name, model=model, low_noise=low_noise)
    bundle, loras = Path(bundle), LoraOptions(lora, lora_high, lora_low, lora_partial)
    manifest = read_manifest(bundle)
    check_place(bundle)
    _check_name(name, manifest)
    check_of_model(model, low_noise, ema)
    if model is None and not loras:
        raise BadRequest("nothing to add: pass -m a checkpoint, or --lora FILE[:STRENGTH]")
    if recipe is not None:
        recipe_named(recipe).check(manifest.config.family)
    progress("checkpoint", 0, 0)
    checkpoint = None if model is None else resolve_as(manifest, str(model), low_noise, ema)
    stacks, reused = opened(loras, manifest.config, manifest.experts), []
    with open_bundle(bundle, manifest) as writer:
        for dtype in _precisions(writer.manifest):
            source = merged(checkpoint or _base(writer, dtype), stacks)
            for expert in source.weights:
                reused += add_weights(
                    writer, source, expert, dtype, progress, name=name, recipe=recipe or ""
                )
        writer.commit(keeps_unfinished=True)
    own = writer.manifest.sets_named(name)
    return {
        "bundle": str(bundle),
        "name": name,
        "recipe": recipe,
        "weights": {weights_label(w.name, w.expert, w.dtype): asdict(w) for w in own},
        "reused": reused,
        "peak_rss_bytes": peak_rss(),
    }


def _check_name(name: str, manifest: Manifest) -> None:
    """Raise BadRequest for a name that no new set can have."""
    try:
        decode(Name, name, "the name")
    except (TypeError, ValueError):
        raise BadRequest(
            f"{printable(name)!r} is no name of a weights set: expected letters, digits, ., _, + "
            f"and -, at most 64"
        ) from None
    if name in engine_names(manifest):
        raise BadRequest(f"{name} is an engine of the bundle: choose another name")
    if name in (BASE, VAE, *ENCODERS, *EXPERTS):
        raise BadRequest(f"{name} is what a build calls its own weights: choose another name")
    if not manifest.sets_named(BASE):
        raise BadRequest("the bundle has no base set, which says what its engines read: build it")


def _precisions(manifest: Manifest) -> list[str]:
    """The precisions of the base set, in which a set for the same engines is."""
    return list(dict.fromkeys(record.dtype for record in manifest.sets_named(BASE)))


def _base(writer: BundleWriter, dtype: str) -> ModelSource:
    """The bundle's base set in one precision, whole and unaltered, as a source."""
    manifest = writer.manifest
    names = {name: name for name in parameter_shapes(manifest.config)}
    weights = {}
    for record in manifest.sets_named(BASE):
        if record.dtype == dtype:
            check_content(writer.path, record.file)
            tensors = bundle_tensors(writer.path / record.file.path, names)
            weights[record.expert] = BundleWeights(tensors, record.content)
    experts = manifest.experts or ("",)
    if missing := [expert for expert in experts if expert not in weights]:
        raise BundleError(
            f"the base set lacks {missing[0] or dtype} in {dtype}: run wanexport build again"
        )
    return ModelSource(
        name=manifest.model,
        config=manifest.config,
        weights={expert: weights[expert] for expert in experts},
        boundary=None,
        record={"set": BASE},
    )
