"""What `profile` is asked for: a bundle, a function of the user's, or a trace that there is."""

import os
from pathlib import Path

from wanexport.exporter.module_function import is_function
from wanexport.runtime.errors import BadRequest, refuse_empty

BUNDLE, FUNCTION, TRACE = "bundle", "function", "trace"
_EXPECTED = "expected a bundle's folder, MODULE:FUNCTION, or a Chrome trace"
_PROGRAMS = (".pt2", ".pt", ".pth", ".onnx", ".plan", ".engine", ".safetensors", ".so")


def kind_of_target(target: str | Path) -> str:
    """Which of the three a target is. Raises BadRequest when it is none."""
    refuse_empty(target=target)
    text = str(target)
    if text.lower().endswith(_PROGRAMS) and not os.path.isdir(text):
        suffix = Path(text).suffix
        raise BadRequest(
            f"{text} is not opened, as a {suffix} file may run what a stranger put there: "
            f"{_EXPECTED}; of your own file, a function that loads it and returns (model, args)"
        )
    if os.path.isdir(text):
        return BUNDLE
    if os.path.lexists(text):
        return TRACE
    if text.endswith((".json", ".json.gz", ".gz")):
        raise BadRequest(f"there is no file {text}: {_EXPECTED}")
    if is_function(text):
        return FUNCTION
    raise BadRequest(f"there is no {text}: {_EXPECTED}")
