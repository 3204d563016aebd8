"""`wanexport remove`: take a weights set or an engine out of a bundle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from wanexport.exporter.bundle.place import check_place
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.runtime.bundle.manifest import BASE, ENCODERS, VAE, Manifest, read_manifest
from wanexport.runtime.bundle.usable import engine_names, unread_name
from wanexport.runtime.errors import BadRequest, printable, refuse_empty


def remove(bundle: str | Path, name: str) -> dict[str, Any]:
    """Take a weights set, with all its files, an engine or an encoder out of a bundle, whole or not
    at all.

    name is that of the set, the engine's as `ls` and `inspect` show it, or `text_encoder` or
    `image_encoder`. Returns what went.
    Raises BadRequest when there is none, and for the base set, BundleError as read_manifest does.
    """
    refuse_empty(bundle=bundle, name=name)
    bundle = Path(bundle)
    before = read_manifest(bundle)
    check_place(bundle)
    _without(before, name)  # refuses before anything is locked
    with open_bundle(bundle, before) as writer:
        kept = _without(writer.manifest, name)
        left = kept.files()
        gone = [file for file in writer.manifest.files() if file not in left]
        writer.manifest = kept
        writer.journal = _without_if_there(writer.journal, name)
        writer.commit(keeps_unfinished=True)
    return {
        "bundle": str(bundle),
        "name": name,
        "files": [file.path for file in gone],
        "bytes": sum(file.size for file in gone),
    }


def _without(manifest: Manifest, name: str) -> Manifest:
    """The manifest without a set or an engine. Raises BadRequest when it has neither."""
    if name == BASE:
        raise BadRequest(
            "base is the set that the bundle's engines were proven with, and stays: to be rid of "
            "it delete the bundle's folder"
        )
    kept = _without_if_there(manifest, name)
    if kept == manifest:
        sets = dict.fromkeys(record.name for record in manifest.weights.values())
        roles = dict.fromkeys(record.role for record in manifest.weights.values())
        named = [own for own in sets if own != BASE] + [own for own in roles if own in ENCODERS]
        there = ", ".join(named + engine_names(manifest))
        raise BadRequest(
            f"the bundle has no weights set and no engine {printable(name)}: expected one of "
            f"{printable(there, 1000) or 'none, it has base alone'}"
        )
    return kept


def _without_if_there(manifest: Manifest, name: str) -> Manifest:
    """The manifest without what has the name, and without weights of a VAE that has no engine.

    An encoder is called by its role.
    """
    engines = tuple(engine for engine in manifest.engines if engine.name != name)
    gone = {e.layout for e in manifest.engines if e.role == VAE} - {e.layout for e in engines}
    return replace(
        manifest,
        weights={
            label: record
            for label, record in manifest.weights.items()
            if name not in (record.name, record.role if record.role in ENCODERS else None)
            and not (record.role == VAE and record.layout in gone)
        },
        engines=engines,
        unread=tuple(data for data in manifest.unread if unread_name(data) != name),
    )
