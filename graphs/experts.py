"""Which expert of an A14B a folder or a file is: names tell it, the tensors of both are alike."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from wanexport.graphs.stated import read_index

FOLDERS = {  # of each layout -> the expert in it
    "high_noise_model": "high_noise",
    "low_noise_model": "low_noise",
    "transformer": "high_noise",
    "transformer_2": "low_noise",
}
_HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_LEVEL = re.compile(
    r"(?<![a-z])(high|low)(?![a-z]|[^a-z]*(quality|res|resolution|vram|mem|memory|ram|speed|motion"
    r"|def|definition|fps|poly|rank|contrast|light|key|end|detail|details|step|steps)(?![a-z]))"
    r"|(?<![a-z])(high|low)[^a-z]*noise"
)


def expert_of_name(name: str) -> str:
    """The expert that a name says, in any spelling of the published ones; empty for none or both.

    `wan2.2_t2v_high_noise_14B`, `T2V-A14B-LOW_fp8`, `HighNoise-Q4`; not `low_vram`, `high_quality`.
    """
    words = _HUMPS.sub("_", name).lower()
    found = {match[1] or match[3] for match in _LEVEL.finditer(words)}
    return f"{found.pop()}_noise" if len(found) == 1 else ""


def why_alone(path: Path, files: Iterable[Path]) -> str:
    """What says that a model is one expert of an A14B by itself; empty when nothing does."""
    # The name may be that of a link or of its target: the hub's cache has it in the link alone.
    for place in (Path(os.path.abspath(path)), path.resolve()):
        folder = place.parent if path.is_file() else place
        if folder.name == "transformer" and _has_second(folder.parent):
            return f"{folder.parent} has a second expert"
        if folder.name in FOLDERS and folder.name != "transformer":
            return f"{folder.name} is the name of one expert's folder"
        for name in (place.name, *(file.name for file in files)):
            if expert := expert_of_name(name):
                return f"{name} is named as the {expert.replace('_', '-')} expert"
    return ""


def _has_second(pipeline: Path) -> bool:
    """Whether a folder of a pipeline of diffusers has two transformers, or says that it should."""
    index = read_index(pipeline)
    named = index.get("transformer_2") not in (None, [None, None])
    return named or index.get("boundary_ratio") is not None or (pipeline / "transformer_2").is_dir()
