"""Open an engine of a bundle: check its files, attach the weights."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

from wanexport.runtime.bundle.check import check_content, check_weights
from wanexport.runtime.bundle.manifest import (
    BASE,
    EngineRecord,
    Manifest,
    read_manifest,
)
from wanexport.runtime.bundle.path import WEIGHTS_FILE
from wanexport.runtime.bundle.pinned_file import PinnedFile, pin
from wanexport.runtime.bundle.tensorfile import header_sha256, read_header
from wanexport.runtime.bundle.usable import check_usable
from wanexport.runtime.denoiser import Denoiser, WeightsSet
from wanexport.runtime.engines.choose import Choice, choose_engine
from wanexport.runtime.engines.engine import OFFLOADS, EngineKeywords, EngineOptions
from wanexport.runtime.engines.table import ENGINES
from wanexport.runtime.errors import (
    BadRequest,
    BundleError,
    WanExportError,
    needing_extra,
    refuse_empty,
)
from wanexport.runtime.lora.given import Loras, by_expert
from wanexport.runtime.lora.merged_file import MergedFile

_HOW = {  # how messages call the options that a backend may not have
    "attention": "attention kernel",
    "offload": "offload",
    "resident_blocks": "resident blocks",
    "cuda_graph": "CUDA graph",
    "provider": "provider of ONNX Runtime",
    "provider_options": "provider options",
}


def load(bundle: str | Path, **options: Unpack[EngineKeywords]) -> Denoiser:
    """Open the engine of a bundle that fits; what is None, or left out, is free.

    Which engine: backend (`onnx`, `aoti`, `tensorrt`, `tensorrt-rtx`), device (`cpu`, `cuda`,
    `cuda:1`), resolution (`480x832`, `832*480` or (480, 832)), frames and dtype; of a causal model
    chunk and cache too, the latent frames of a call and those that it can attend to. Engines of
    several shapes are not chosen from. An ONNX engine runs on either device: provider is ONNX
    Runtime's, `cpu`, `cuda`, `tensorrt` or `tensorrt-rtx`, and provider_options are its own.

    weights is the name of a weights set of the bundle, or other weights of the same layout (a
    fine-tune or merged LoRA): a file, or a folder with `denoiser.safetensors`, or with one in each
    of `high_noise/` and `low_noise/` where the model has two experts. `Denoiser.use` changes it.

    On a GPU: offload `experts` keeps one of two experts on the device and replaces its weights at
    the switch. `blocks`, of an AOTInductor engine, keeps resident_blocks of its blocks there, by
    default as many as leave room for a forward and the VAE, and copies the others from the host's
    memory while those before them run. None is whatever fits, which is said where it is not all.
    cuda_graph is whether to replay a captured graph, by default where launching takes as long as
    running; of a causal model there is none. Weights already on the device are shared. attention is
    the kernel of self-attention in an AOTInductor engine (`fa4`, `cudnn` or `sdpa`) in place of the
    recorded one.

    An engine is native code, and its hash is the bundle's own: open bundles of people you trust.
    Nothing else that a bundle names is opened or downloaded.
    Raises BadRequest when nothing or more than one shape fits, or for an option that the engine
    lacks; BundleError when a file is missing or was altered, or this machine cannot execute the
    engine; EngineFailure when the device has too little memory.
    """
    asked = EngineOptions(**options)
    refuse_empty(bundle=bundle, weights=asked.weights)
    bundle = Path(bundle)
    while True:
        manifest = read_manifest(bundle)
        choice = choose_engine(bundle, manifest, asked)
        try:
            return open_engine(bundle, manifest, choice, asked)
        except WanExportError:
            if read_manifest(bundle) == manifest:
                raise
            # A build replaced the bundle between the two: what it removed is not missing.


def chosen(bundle: str | Path, **options: Unpack[EngineKeywords]) -> Choice:
    """The engine that `load` would open with these options, and its device; nothing is opened.

    Raises what `load` raises for what does not fit.
    """
    refuse_empty(bundle=bundle)
    return choose_engine(Path(bundle), read_manifest(Path(bundle)), EngineOptions(**options))


def fitted(
    bundle: Path, record: EngineRecord, device: str, options: EngineOptions
) -> EngineOptions:
    """The options with which `load` opens an engine on a device: what they leave open of how a GPU
    holds weights follows from what is free there. Raises what `load` raises."""
    if device == "cpu" or "resident_blocks" not in ENGINES[record.backend].backend().OPTIONS:
        return options
    manifest = read_manifest(bundle)
    files = find_weights(bundle, record, options.weights, manifest).files
    from wanexport.runtime.fitting import fit_options  # of a GPU alone

    return fit_options(manifest, record, files, options, device)


def open_engine(
    bundle: Path, manifest: Manifest, choice: Choice, options: EngineOptions
) -> Denoiser:
    """Open one engine of a manifest on a device, as `choose_engine` gives them.

    Raises what `load` raises.
    """
    record, device = choice
    check_usable(bundle, manifest, record)
    backend = ENGINES[record.backend].backend()
    check_options(record, options, backend.OPTIONS)
    _check_offload(record, manifest, options, backend.OPTIONS)
    _check_cuda_graph(record, options)
    # Engines are code: their whole content is checked at every load.
    files = {role: check_content(bundle, file) for role, file in record.files.items()}
    find = partial(_find, bundle, record)
    chosen: list[WeightsSet] = []

    def weights() -> Mapping[str, PinnedFile]:
        if not chosen:
            chosen.append(find_weights(bundle, record, options.weights, manifest))
        return chosen[0].files

    if "resident_blocks" in backend.OPTIONS and device != "cpu":
        from wanexport.runtime.fitting import fit_options  # of a GPU alone

        options = fit_options(manifest, record, weights(), options, device)
    engines = backend.open_engines(record, files, weights, options, device)
    own = chosen[0] if chosen else None
    return Denoiser(record, engines, own, find, offload=options.offload)


def _check_offload(
    record: EngineRecord, manifest: Manifest, options: EngineOptions, taken: frozenset[str]
) -> None:
    """Raise BadRequest for a way to offload that there is not, or not for this engine."""
    way, blocks = options.offload, options.resident_blocks
    if way not in (None, *OFFLOADS):
        raise BadRequest(f"offload is {way!r:.40}: expected {' or '.join(OFFLOADS)}")
    if way == "experts" and len(manifest.experts) < 2:
        raise BadRequest("offload experts swaps two experts, this model has one: leave it out")
    if way == "blocks" and "resident_blocks" not in taken:
        raise BadRequest(
            f"engine {record.name} is one graph and streams no blocks: choose, or build, an engine "
            f"of --backend aoti"
        )
    if blocks is not None and way != "blocks":
        raise BadRequest("resident blocks are those that stay with --offload blocks: add that")
    if blocks is not None and (type(blocks) is not int or blocks < 0):
        raise BadRequest(f"{blocks!r:.40} resident blocks: expected a whole number from 0")


def _check_cuda_graph(record: EngineRecord, options: EngineOptions) -> None:
    """Raise BadRequest for a captured graph of calls that use what a session has."""
    if options.cuda_graph and not record.program.is_plain:
        raise BadRequest(
            f"engine {record.name} keeps a state of each session, of which a captured CUDA graph "
            f"would hold one: leave --cuda-graph out"
        )


def check_options(record: EngineRecord, options: EngineOptions, taken: frozenset[str]) -> None:
    """Refuse what a backend does not know in place of leaving it out without a word."""
    wrong = [words for name, words in _HOW.items() if name in options.given() and name not in taken]
    if wrong:
        raise BadRequest(
            f"engine {record.name} has no {' and no '.join(wrong)}: leave it out, or choose an "
            f"engine of another --backend"
        )


def find_weights(
    bundle: Path,
    record: EngineRecord,
    weights: str | Path | None,
    manifest: Manifest | None = None,
) -> WeightsSet:
    """The files of a weights set by expert, checked against the engine.

    weights is the name of one of the bundle's, None for the base set, or a file or folder. Without
    a manifest the bundle's is read, which may have got other sets since the engine was opened.
    Raises BadRequest when there is none of this name and layout, and for a file that is laid out
    for another engine, BundleError for one that is missing, damaged or not the manifest's.
    """
    manifest = manifest or read_manifest(bundle)
    sets = manifest.sets(record.layout)
    name = BASE if weights is None else str(weights)
    experts = manifest.experts or ("",)
    if name in sets and not isinstance(weights, Path):
        records = sets[name]
        if missing := [expert for expert in experts if expert not in records]:
            raise BundleError(f"weights set {name} lacks {missing[0]}: run wanexport build again")
        files = {e: check_weights(bundle, records[e]) for e in experts}
        return WeightsSet(name, files, records[experts[0]].recipe)
    if weights is None:
        raise BundleError(f"{bundle} has no weights for engine {record.name}: build it again")
    if not os.path.lexists(weights):
        raise BadRequest(
            f"{bundle} has no weights set {name:.80} for engine {record.name}, nor is there such a "
            f"file: expected one of {', '.join(sets)}, or a path"
        )
    paths = _named(Path(weights), experts)
    return WeightsSet(name, {expert: _other(path, record) for expert, path in paths.items()})


def _find(
    bundle: Path,
    record: EngineRecord,
    weights: str | Path | None,
    *,
    lora: Loras = (),
    lora_partial: bool = False,
) -> WeightsSet:
    """A weights set with LoRAs merged in, where there are any. Raises as LoraStack does too."""
    found = find_weights(bundle, record, weights)
    loras = by_expert(lora, [expert for expert in found.files if expert])
    if not any(loras.values()):
        return found
    with needing_extra("build", "a LoRA in memory"):
        from wanexport.runtime.lora.merge import open_stacks

    header = read_header(next(iter(found.files.values())).path)  # all have one layout
    shapes = {name: entry.shape for name, entry in header.items()}
    stacks = open_stacks(loras, shapes, partial=lora_partial)
    files = {
        expert: MergedFile(**vars(file), stack=stacks[expert]) if expert in stacks else file
        for expert, file in found.files.items()
    }
    names = dict.fromkeys(
        f"{path}:{strength:g}" for own in loras.values() for path, strength in own
    )
    return WeightsSet(" + ".join([found.name, *names]), files, found.recipe)


def _named(weights: Path, experts: Sequence[str]) -> dict[str, Path]:
    """The file for each expert that a user's file or folder holds."""
    if os.path.isfile(weights):  # unlike Path's, it is False for a name that is too long
        if len(experts) > 1:
            raise BadRequest(
                f"{weights} is one file, the model has two experts: name a folder with "
                f"{WEIGHTS_FILE} in each of {', '.join(f'{expert}/' for expert in experts)}"
            )
        return {experts[0]: weights}
    paths = {expert: weights / expert / WEIGHTS_FILE for expert in experts}
    for path in paths.values():
        if not os.path.isfile(path):
            raise BadRequest(
                f"weights folder {path.parent} has no {WEIGHTS_FILE}: name one that has"
            )
    return paths


def _other(path: Path, record: EngineRecord) -> PinnedFile:
    file = pin(path)
    with file.opened():
        read_header(path)  # refuses a file that was cut short
        found = header_sha256(path)
    if found != record.layout:
        raise BadRequest(
            f"{path} is laid out for another engine: its header hash is {found[:12]}, engine "
            f"{record.name} needs {record.layout[:12]}; run wanexport build again"
        )
    return file
