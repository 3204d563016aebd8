"""Manifests of schema 1, which assumed one plain Wan, as schema 2 has them."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from wanexport.runtime.bundle.details import KINDS
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.decode import decode
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.plain_wan import family_name
from wanexport.runtime.program import LAYER, Program
from wanexport.runtime.wan_config import WanConfig

_FIRST_BLOCK, _BLOCK = "blocks.0.", f"blocks.{LAYER}."


def upgrade(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same manifest in schema 2, both as parsed JSON.

    Raises KeyError, TypeError or ValueError when it is none.
    """
    sizes = dict(data["config"])
    condition = sizes["in_channels"] - sizes["out_channels"]
    family = family_name(
        condition, sizes["out_channels"], sizes["image_tokens"], len(data["experts"])
    )
    config: WanConfig = decode(WanConfig, {**sizes, "family": family}, "config")
    weights = {name: _weights(record) for name, record in data["weights"].items()}
    engines = [_engine(config, engine) for engine in data["engines"]]
    return {**data, "schema": 2, "family": family, "weights": weights, "engines": engines}


def _weights(record: Mapping[str, Any]) -> dict[str, Any]:
    """A weights record: its set was the only one."""
    rest = dict(record)
    return {"name": "base", "role": "denoiser", "layout": rest.pop("header_sha256"), **rest}


def _engine(config: WanConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    """An engine's record, with the Program that its inputs and parameters make."""
    if record.get("backend") not in KINDS:
        return dict(record)
    rest = dict(record)
    geometry: Geometry = decode(Geometry, rest["geometry"], "geometry")
    recorded = rest.pop("inputs"), rest.pop("output"), rest.pop("parameters", {})
    program = program_of(config, geometry)
    kernels = rest.pop("attention", {})
    build = dict(rest.get("build", {}))
    layout = rest.pop("weights_header_sha256")
    return {
        **rest,
        "role": "denoiser",
        "family": config.family,
        "layout": layout,
        "program": _program(program, *recorded),
        "details": {
            "attention": _by_kind(program, kernels) or _operator(build),
            **{name: build[name] for name in _DECIDING if name in build},
        },
        "build": {name: value for name, value in build.items() if name not in _DECIDING},
    }


_DECIDING = ("attention_score_bytes", "hardware_compatible", "version_compatible")


def _program(
    derived: Program,
    inputs: Mapping[str, Any],
    output: Mapping[str, Any],
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """The Program with what the engine recorded in it, for `usable` to hold against the model's."""
    program = asdict(derived if parameters else derived.whole())
    draws = {name: spec.draw for name, spec in derived.inputs.items()}
    program["inputs"] = {n: {**s, "draw": draws.get(n, "normal")} for n, s in inputs.items()}
    program["outputs"] = {name: output for name in program["outputs"]}
    for call in program["calls"]:
        call["reads"] = list(inputs) if call is program["calls"][0] else list(call["reads"])
        if call["name"] in parameters:
            names = parameters[call["name"]]
            call["parameters"] = [name.replace(_FIRST_BLOCK, _BLOCK, 1) for name in names]
    return as_parsed(program)


def as_parsed(value: Any) -> Any:
    """Records of Python as JSON would have them: lists in the place of tuples."""
    if isinstance(value, dict):
        return {name: as_parsed(inner) for name, inner in value.items()}
    return [as_parsed(inner) for inner in value] if isinstance(value, list | tuple) else value


def _by_kind(program: Program, kernels: Mapping[str, Any]) -> dict[str, Any]:
    """Kernels by the number of keys, which schema 1 had, as kernels by kind of attention."""
    return {
        kind: kernels[str(spec.keys)]
        for kind, spec in program.attention.items()
        if str(spec.keys) in kernels
    }


def _operator(build: Mapping[str, Any]) -> str:
    """The operator of attention in an ONNX graph, which its nodes tell."""
    return "mha" if "MultiHeadAttention" in build.get("nodes", {}) else "native"
