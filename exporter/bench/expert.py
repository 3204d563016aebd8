"""A bundle of two experts as `bench` sees it: as that of the high-noise one, alone in memory."""

from collections.abc import Mapping
from dataclasses import replace

from wanexport.runtime.bundle.details import is_plan_of_step
from wanexport.runtime.bundle.manifest import FileRecord, Manifest
from wanexport.runtime.program import WHOLE


def with_measured_expert(manifest: Manifest) -> Manifest:
    """The manifest as that of a model of one expert: the high-noise one where there are two."""
    if not manifest.experts:
        return manifest
    expert = manifest.experts[0]
    return replace(
        manifest,
        experts=(),
        weights={
            name: replace(record, expert="")
            for name, record in manifest.weights.items()
            if record.expert == expert
        },
        engines=tuple(
            replace(
                engine,
                sampling=replace(engine.sampling, boundary=None),
                files=_files_of(expert, engine.files),
            )
            for engine in manifest.engines
        ),
    )


def _files_of(expert: str, files: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """An engine's files with the plan of one expert, where each has its own, as that of all."""
    own = f"{WHOLE}-{expert}"
    if own not in files:
        return dict(files)
    others = {role: file for role, file in files.items() if not is_plan_of_step(role)}
    return {WHOLE: files[own], **others}
