"""What a report says of a bundle, of its engines, and of the machine that writes it."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wanexport.exporter.report.figures import count, scientific, seconds

_LIBRARIES = (
    "wanexport", "torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "triton",
    "diffusers", "tensorrt", "tensorrt-rtx-cu13-bindings", "flash-attn-4", "numpy",
)  # fmt: skip
Held = Mapping[str, Any]  # of `inspect`


def facts_of_bundle(held: Held) -> dict[str, Any]:
    """The model and the tables of weights and engines."""
    return {
        "model": held["model"],
        "wanexport": held["wanexport"],
        "parameters": count(held["parameters"], "").strip(),
        "experts": held["experts"],
        "bytes": count(held["bytes"], "B"),
        "problems": held["problems"],
        "weights": [
            (
                record["name"],
                label,
                record["dtype"],
                count(record["file"]["size"], "B"),
                _origin(record["source"]),
            )
            for label, record in held["weights"].items()
        ],
        "engines": [
            (
                engine["name"],
                "passed" if engine["proof"] else "-",
                scientific(engine["proof"].get("error")),
                scientific(engine["proof"].get("gate")),
                count(engine["bytes"], "B"),
            )
            for engine in held["engines"]
        ],
    }


def facts_of_engine(engine: Held) -> dict[str, Any]:
    """What an engine is, its proof and lint in words."""
    program, sampling = engine["program"], engine["sampling"]
    flops = engine["build"].get("flops_per_forward")
    return {
        "name": engine["name"],
        "unusable": engine["unusable"],
        "facts": [
            ("made for", _listed(engine["target"])),
            ("tokens", f"{engine['tokens']:,}"),
            ("a forward takes", None if flops is None else count(flops, "FLOPs")),
            ("inputs", _shapes(program["inputs"])),
            ("calls", ", ".join(_call(call) for call in program["calls"])),
            ("attention", _attention(engine["details"])),
            ("built in", seconds(engine["build"].get("seconds"))),
            ("sampled by", f"{sampling['solver']}, {sampling['steps']} steps"),
            ("weights layout", engine["layout"][:12]),
        ],
        "proof": _proof(engine["proof"]),
        "lint": _lint(engine["lint"]),
    }


def environment() -> list[tuple[str, str]]:
    """The machine and the versions of libraries that are installed."""
    found = [
        ("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
        ("Python", platform.python_version()),
    ]
    for name in _LIBRARIES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def _origin(source: Held) -> str:
    """Where weights are from: a preset, or a checkpoint, and how it is stored."""
    named = source.get("preset") or source.get("path") or source.get("hub") or "-"
    named = f"{source['generator']} of {named}" if source.get("generator") else named
    seed = source.get("random_seed")
    words = f"random weights of {named}, seed {seed}" if seed is not None else str(named)
    loras = len(source.get("lora") or ())
    return f"{words}, with {loras} LoRA" if loras else words


def _proof(proof: Held) -> str:
    if not proof:
        return "The manifest holds no proof."
    words = f"{proof.get('method', '-')}: {proof.get('blocks', '-')} blocks at "
    words += f"{proof.get('tokens', '-')} tokens. The relative L2 error is "
    words += f"{scientific(proof.get('error'))}, the gate {scientific(proof.get('gate'))}"
    floor = proof.get("floor")
    return f"{words}, the floor {scientific(floor)}." if floor else f"{words}."


def _lint(counts: Mapping[str, int]) -> str:
    found = {kind: number for kind, number in counts.items() if number}
    words = ", ".join(f"{number} {kind}" for kind, number in found.items())
    if words:
        return words
    return f"No {', '.join(counts)}." if counts else "Nothing was counted."


def _attention(details: object) -> str:
    """The operator of attention, or the kernel of each kind."""
    chosen = details.get("attention", "") if isinstance(details, Mapping) else ""
    return _listed(chosen) if isinstance(chosen, Mapping) else str(chosen)


def _call(call: Held) -> str:
    return call["name"] + (f" x {call['repeat']}" if call["repeat"] > 1 else "")


def _shapes(inputs: Mapping[str, Held]) -> str:
    return ", ".join(f"{name} {list(spec['shape'])}" for name, spec in inputs.items())


def _listed(values: Held) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
