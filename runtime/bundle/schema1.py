"""Manifests of schema 1, which assumed one plain Wan, as schema 2 has them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from wanexport.runtime.bundle.details import KINDS
from wanexport.runtime.bundle.signature import program_of
from wanexport.runtime.decode import decode, encode
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.plain_wan import family_name
from wanexport.runtime.program import LAYER, Program
from wanexport.runtime.wan_config import WanConfig

_FIRST_BLOCK, _BLOCK = "blocks.0.", f"blocks.{LAYER}."
_OWN_OPERATOR = "MultiHeadAttention"  # ONNX Runtime's, in the place of ONNX's Attention


def upgrade(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same manifest in schema 2, both as parsed JSON; an engine that is none stays as it is.

    Raises KeyError, TypeError or ValueError when it is none.
    """
    sizes, experts, engines = data["config"], data["experts"], data["engines"]
    if not isinstance(sizes, dict) or not isinstance(data["weights"], dict):
        raise TypeError("config or weights are no object")
    if not isinstance(experts, list) or not isinstance(engines, list):
        raise TypeError("experts or engines are no list")
    condition = sizes["in_channels"] - sizes["out_channels"]
    family = family_name(condition, sizes["out_channels"], sizes["image_tokens"], len(experts))
    config: WanConfig = decode(WanConfig, {**sizes, "family": family}, "config")
    weights = {name: _weights(record) for name, record in data["weights"].items()}
    rows = [_engine(config, engine) for engine in engines]
    return {**data, "schema": 2, "family": family, "weights": weights, "engines": rows}


def _weights(record: Mapping[str, Any]) -> dict[str, Any]:
    """A weights record: its set was the only one."""
    rest = dict(record)
    return {"name": "base", "role": "denoiser", "layout": rest.pop("header_sha256"), **rest}


def _engine(config: WanConfig, record: Any) -> Any:
    """An engine's record, with the Program that its inputs and parameters make."""
    try:
        return _upgraded(config, record) if record["backend"] in KINDS else record
    except (AttributeError, KeyError, TypeError, ValueError):
        return record


def _upgraded(config: WanConfig, record: Mapping[str, Any]) -> dict[str, Any]:
    rest, build = dict(record), dict(record.get("build", {}))
    kind = KINDS[rest["backend"]]
    geometry: Geometry = decode(Geometry, rest["geometry"], "geometry")
    derived = program_of(config, geometry)
    program = encode(derived.whole() if kind.is_whole else derived)
    _put_recorded(program, rest.pop("inputs"), rest.pop("output"), rest.pop("parameters", {}))
    by_kind = _by_kind(derived, rest.pop("attention", {}))
    details = {"attention": _operator(build) if kind.is_whole else by_kind, **build}
    known = {spec.name for spec in fields(kind.details)}
    layout = rest.pop("weights_header_sha256")
    return {
        **rest,
        "role": "denoiser",
        "family": config.family,
        "layout": layout,
        "program": program,
        "details": {name: value for name, value in details.items() if name in known},
        "build": {name: value for name, value in build.items() if name not in known},
    }


def _put_recorded(
    program: dict[str, Any],
    inputs: Mapping[str, Any],
    output: Mapping[str, Any],
    parameters: Mapping[str, Any],
) -> None:
    """Have a Program say what the engine recorded, for `usable` to hold against the model's."""
    draws = {name: spec["draw"] for name, spec in program["inputs"].items()}
    program["inputs"] = {n: {**s, "draw": draws.get(n, "normal")} for n, s in inputs.items()}
    program["outputs"] = {name: output for name in program["outputs"]}
    program["calls"][0]["reads"] = list(inputs)
    for call in program["calls"]:
        own = parameters.get(call["name"], ())
        call["parameters"] = [name.replace(_FIRST_BLOCK, _BLOCK, 1) for name in own]


def _by_kind(program: Program, kernels: Mapping[str, Any]) -> dict[str, Any]:
    """Kernels by the number of keys, which schema 1 had, as kernels by kind of attention."""
    return {
        kind: kernels[str(spec.keys)]
        for kind, spec in program.attention.items()
        if str(spec.keys) in kernels
    }


def _operator(build: Mapping[str, Any]) -> str:
    """The operator of attention in an ONNX graph, which its nodes tell."""
    return "mha" if _OWN_OPERATOR in build.get("nodes", {}) else "native"
