"""The classes of TensorRT's real Python bindings, without TensorRT: what they have, and how called.

    python -m tests.oracles.bindings MODULE        prints what `describe` says of it, as JSON

The bindings of some TensorRT versions lie in `.venv/contract/<version>`, where `make setup` puts
them. They link to libraries of which they import nine C symbols; stand-ins of these let them load.
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / ".venv" / "contract"
VERSIONS = ("10.14.1.48.post1", "10.16.1.11", "11.4.0.106")
_SYMBOLS = {  # of each library
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
_PARAMETER = inspect.Parameter


def stand_ins(version: str, folder: Path) -> dict[str, str]:
    """Compile the libraries of a version, whose functions all return null, and a module `tensorrt`
    that is its bindings; the environment in which a process can import it."""
    for library, symbols in _SYMBOLS.items():
        source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols)
        name = f"lib{library}.so.{version.partition('.')[0]}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-"]
        subprocess.run([*command, "-o", str(folder / name)], input=source, text=True, check=True)
    module = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    (folder / "tensorrt.py").write_text(module)
    paths = os.pathsep.join(map(str, (folder, CONTRACT / version, ROOT)))
    return {**os.environ, "PYTHONPATH": paths, "LD_LIBRARY_PATH": str(folder)}


def describe(module: Any) -> dict[str, Any]:
    """Each name of a module or class: for a class its members, else what kind it is of, and the
    docstring of a function."""
    return {name: _describe(inspect.getattr_static(module, name)) for name in dir(module)}


def _describe(member: Any) -> dict[str, Any]:
    if inspect.isclass(member):
        return {"kind": "class", "members": describe(member)}
    if isinstance(member, property):
        return {"kind": "property" if member.fset else "read-only property"}
    if isinstance(member, staticmethod):
        member = member.__func__
    if callable(member):
        return {"kind": "function", "doc": member.__doc__ or ""}
    return {"kind": "value"}


def signatures(name: str, doc: str) -> list[inspect.Signature]:
    """The signatures that pybind11 writes into a docstring, one for each overload."""
    heads = re.findall(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", doc, re.MULTILINE)
    if not heads:
        raise ValueError(f"{name} states no signature")
    return [inspect.Signature([_parameter(text) for text in _split(head)]) for head in heads]


def _parameter(text: str) -> inspect.Parameter:
    kinds = (
        _PARAMETER.POSITIONAL_OR_KEYWORD,
        _PARAMETER.VAR_POSITIONAL,
        _PARAMETER.VAR_KEYWORD,
    )
    name = re.match(r"(\**)(\w+)", text)
    assert name, text
    default = None if " = " in text else _PARAMETER.empty
    return _PARAMETER(name[2], kinds[len(name[1])], default=default)


def _split(text: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def accepts(stated: list[inspect.Signature], arguments: tuple[Any, ...], **named: Any) -> bool:
    """Whether any of the signatures takes these arguments."""
    for signature in stated:
        try:
            signature.bind(*arguments, **named)
        except TypeError:
            continue
        return True
    return False


if __name__ == "__main__":
    print(json.dumps(describe(importlib.import_module(sys.argv[1]))))
