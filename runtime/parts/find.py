"""Where a checkpoint has the parts that stand around the denoiser.

A checkpoint in diffusers' layout keeps each part in a folder, one in the official layout (the
Wan-AI repositories without `-Diffusers`) in one file each. This file finds them; `text_encoder.py`,
`image_encoder.py` and `vae.py` open them.
"""

import ntpath
import os
import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from wanexport.runtime.bundle.manifest import Manifest, read_manifest
from wanexport.runtime.errors import BundleError, printable
from wanexport.runtime.family import family_of
from wanexport.runtime.parts.hub import HUB_ID, download, is_offline
from wanexport.runtime.wan_config import WanConfig

PARTS = ("text_encoder", "vae", "image_encoder")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

# layout -> part -> its folder or file in the checkpoint
_NAMES = {
    "official": {
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "google/umt5-xxl",
        "vae": "",  # the family says which
        "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    },
    "diffusers": {
        "text_encoder": "text_encoder",
        "tokenizer": "tokenizer",
        "vae": "vae",
        "image_encoder": "image_encoder",
    },
}
_TITLES = {
    "text_encoder": "the text encoder",
    "tokenizer": "the tokenizer",
    "vae": "the VAE",
    "image_encoder": "the CLIP image encoder",
}


@dataclass(frozen=True)
class ComponentFiles:
    """Where the parts of one checkpoint lie; `origin` is its folder or hub id."""

    origin: str
    layout: str  # official or diffusers
    text_encoder: Path
    tokenizer: Path
    vae: Path
    image_encoder: Path | None  # None where the model takes no CLIP features


def find_components(
    bundle: str | Path, model: str | Path | None = None, *, needs: Collection[str] = PARTS
) -> ComponentFiles:
    """Find the parts in the checkpoint the bundle came from, or in `model`, a folder or hub id.

    Only the parts in `needs` are downloaded and looked for: the paths of the others may not exist.
    What a bundle names may be a stranger's choice: only who wants its parts calls this, and
    `origin_note` says beforehand what will be followed.
    Raises BundleError, naming what is missing and where to get it, when the bundle came from random
    weights, the checkpoint has moved, or it lacks a part, and when the bundle names what no build
    would have written; BadRequest when `model` is neither a folder nor a hub id.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    if model is not None:
        return find_in(manifest.config, model, needs=needs)
    wanted = _wanted(manifest.config, needs)
    origin, folders = _recorded(bundle, manifest, wanted)
    return _found(manifest.config, wanted, origin, folders)


def find_in(
    config: WanConfig, model: str | Path, *, needs: Collection[str] = PARTS
) -> ComponentFiles:
    """The same in `model`, a folder, a file or a hub id, for a model of this config."""
    model, wanted = str(model), _wanted(config, needs)
    if os.path.exists(model):  # unlike Path's, it is False for a name that is too long
        return _found(config, wanted, str(Path(model).resolve()), _folders(Path(model)))
    return _found(config, wanted, model, [download(model, _patterns(_names_of(config), wanted))])


def _wanted(config: WanConfig, needs: Collection[str]) -> list[str]:
    """What must be found for the parts in needs, of those that the model has."""
    names = _names_of(config)["official"]
    parts = ("text_encoder", "tokenizer", "vae", "image_encoder")
    return [part for part in parts if part in names and _owner(part) in needs]


def _found(
    config: WanConfig, wanted: Sequence[str], origin: str, folders: Sequence[Path]
) -> ComponentFiles:
    """What is wanted, in the folder that has the most. Raises BundleError when it lacks a part."""
    names = _names_of(config)
    layout, folder = _best(names, folders, wanted)
    paths = {part: folder / name for part, name in names[layout].items()}
    if missing := [part for part in wanted if not paths[part].exists()]:
        lacks = " and ".join(f"{_TITLES[part]} ({names[layout][part]})" for part in missing)
        get = f"get it from {_hub_id(config, layout)}"
        if is_offline() and not os.path.exists(origin):
            get = "it is not in the hub's cache, and HF_HUB_OFFLINE forbids downloads: unset that"
        raise BundleError(f"{origin} lacks {lacks}: {get}, or name another checkpoint (-m, model=)")
    return ComponentFiles(
        origin=origin,
        layout=layout,
        text_encoder=paths["text_encoder"],
        tokenizer=paths["tokenizer"],
        vae=paths["vae"],
        image_encoder=paths.get("image_encoder"),
    )


def origin_note(
    bundle: str | Path, model: str | Path | None, *, needs: Collection[str] = PARTS
) -> str:
    """Which source that the bundle names will be followed for these parts; empty for none.

    Nothing is followed yet. Raises BundleError when it names what no build would have written.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    source = _followed(bundle, manifest) if model is None else None
    if source is None:
        return ""
    names = _names_of(manifest.config)["official"]
    titles = " and ".join(_TITLES[part] for part in PARTS if part in needs and part in names)
    origin = printable(source.get("hub") or source["path"], 300)
    return f"taking {titles} from {origin}, which the bundle names; -m names another checkpoint"


def _owner(part: str) -> str:
    """The tokenizer is needed with the text encoder, every other part by itself."""
    return "text_encoder" if part == "tokenizer" else part


def _names_of(config: WanConfig) -> dict[str, dict[str, str]]:
    """The names of the parts that a model has, in each layout."""
    names = {layout: dict(parts) for layout, parts in _NAMES.items()}
    family = family_of(config)
    names["official"]["vae"] = family.vae.file
    if not family.clip_tokens:
        for parts in names.values():
            del parts["image_encoder"]
    return names


def _hub_id(config: WanConfig, layout: str = "official") -> str:
    """The published checkpoint that has the parts of a model."""
    name = family_of(config).hub
    return f"{name}-Diffusers" if layout == "diffusers" else name


def _recorded(
    bundle: Path, manifest: Manifest, wanted: Sequence[str]
) -> tuple[str, list[Path]]:  # fmt: skip
    """The checkpoint that the bundle's weights came from, and the folders that may hold parts."""
    source = _followed(bundle, manifest)
    if source is not None and "hub" in source:
        patterns = _patterns(_names_of(manifest.config), wanted)
        folder = download(source["hub"], patterns, revision=source.get("revision"))
        return source["hub"], [folder]
    if source is not None:
        return source["path"], _folders(Path(source["path"]))
    sources = [record.source for record in manifest.weights.values()]
    titles = " and ".join(_TITLES[part] for part in wanted)
    hint = f"name a checkpoint that has {titles} (-m, model=), as {_hub_id(manifest.config)}"
    moved = [source["path"] for source in sources if "path" in source]
    if moved:
        raise BundleError(f"{moved[0]}, the checkpoint that {bundle} came from, is gone: {hint}")
    text = ", or give text embeddings (--text)" if "text_encoder" in wanted else ""
    raise BundleError(f"{bundle} came from random weights alone: {hint}{text}")


def _followed(bundle: Path, manifest: Manifest) -> Mapping[str, Any] | None:
    """The first recorded source that can be followed: of the hub, or a path that exists here."""
    for record in manifest.weights.values():
        source = record.source
        if "hub" in source:
            named = (source["hub"], source.get("revision") or "main")
            fit = (HUB_ID.fullmatch(named[0]), _REVISION.fullmatch(named[1]))
            if not all(fit) or ".." in "".join(named):
                raise _odd_source(bundle, " at ".join(named), "no hub id and revision")
            return source
        if "path" in source:
            path = source["path"]
            if not path.isprintable() or not _is_plain(path, posixpath) | _is_plain(path, ntpath):
                raise _odd_source(bundle, path, "no absolute path")
            if _is_plain(path, os.path) and os.path.exists(path):
                return source
    return None


def _is_plain(path: str, system: ModuleType) -> bool:
    """Whether it is how a system's builds write an absolute path, and on no other machine.

    A bundle may come from another system. Whoever asks Windows for a machine's share logs in there.
    """
    is_share = path[:2] in ("//", "\\\\")
    return not is_share and bool(system.isabs(path)) and path == system.normpath(path)


def _odd_source(bundle: Path, named: str, what: str) -> BundleError:
    return BundleError(
        f"{bundle} names {printable(named, 200)} as its checkpoint, which is {what} that a build "
        f"writes: name the checkpoint (-m, model=)"
    )


def _folders(path: Path) -> list[Path]:
    """Where the parts of a checkpoint may lie: in it, or where it is one of several models."""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    return [folder, folder.parent]


def _patterns(names: Mapping[str, Mapping[str, str]], wanted: Sequence[str]) -> list[str]:
    """What to download of a repository, whichever layout it has."""
    found = [parts[part] for parts in names.values() for part in wanted]
    return [name if name.endswith(".pth") else f"{name}/*" for name in found]


def _best(
    names: Mapping[str, Mapping[str, str]], folders: Sequence[Path], wanted: Sequence[str]
) -> tuple[str, Path]:
    """The layout and folder with the most of the wanted parts; the first where none has any."""

    def count(choice: tuple[str, Path]) -> int:
        layout, folder = choice
        return sum((folder / names[layout][part]).exists() for part in wanted)

    return max(((layout, folder) for folder in folders for layout in names), key=count)
