"""What a later version wrote costs no more than the engines that it wrote, and outlives a write."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.bundle.small_bundle import CONFIG, manifest_of, put, small_bundle
from wanexport.exporter.bundle.writer import write_manifest
from wanexport.runtime.bundle.manifest import DENOISER, Manifest, from_json, read_manifest, to_json
from wanexport.runtime.bundle.usable import why_unread, why_unusable
from wanexport.runtime.engines.choose import choose_engine
from wanexport.runtime.engines.engine import EngineOptions
from wanexport.runtime.errors import BadRequest, BundleError

LATER: dict[str, Any] = {"any": ["thing", None, {"x": 1.5}], "empty": {}}
PLAIN = {"dtype": "fp32", "draw": "normal"}
FILE = {"path": "engines/later/x", "size": 0, "sha256": "0" * 64}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """An ONNX, an AOTInductor and a TensorRT engine: 0, 1 and 2."""
    return small_bundle(tmp_path / "bundle", "onnx", "aoti", "tensorrt")


def reasons(bundle: Path) -> list[str]:
    """Why engines cannot be used, of those that cannot; none advises to throw anything away."""
    manifest = read_manifest(bundle)
    found = [why_unusable(bundle, manifest, engine) for engine in manifest.engines]
    found += [why_unread(bundle, manifest, data) for data in manifest.unread]
    for reason in filter(None, found):
        assert reason.isprintable() and len(reason) < 1000
        assert "delete" not in reason and "remove" not in reason and "damaged" not in reason
    return list(filter(None, found))


def survives(bundle: Path) -> bool:
    """Whether a write of the manifest that was read keeps everything, be it in another order."""
    stated = manifest_of(bundle)
    assert from_json(json.loads(json.dumps(to_json(read_manifest(bundle))))) == read_manifest(
        bundle
    )
    write_manifest(bundle, read_manifest(bundle))
    return in_order(manifest_of(bundle)) == in_order(stated)


def in_order(data: Any) -> Any:
    """The manifest with its engines by their own text: those that cannot be read are put last."""
    return {**data, "engines": sorted(data["engines"], key=lambda e: json.dumps(e, sort_keys=True))}


def objects(data: Any, place: str = "manifest") -> dict[str, dict[str, Any]]:
    """Every object of parsed JSON by its place; all of a list's items count as one."""
    found = {place: data} if isinstance(data, dict) else {}
    inner = data.items() if isinstance(data, dict) else ()
    for name, value in (*inner, *(("[]", v) for v in (data if isinstance(data, list) else ()))):
        for own, record in objects(value, f"{place}.{name}").items():
            found.setdefault(own, record)
    return found


# Where a name is what somebody chose: a field there is one more of them, not one of a record.
MAPPINGS = (
    "weights", "files", "inputs", "outputs", "values", "state", "attention", "target", "build",
    "lint", "proof", "parity", "source",
)  # fmt: skip


def test_a_field_at_any_depth_is_ignored_and_outlives_a_write(bundle: Path) -> None:
    data = manifest_of(bundle)
    places = [p for p in objects(data) if p.rpartition(".")[2] not in MAPPINGS]
    assert len(places) > 25
    assert {"manifest.config", "manifest.engines.[].program.calls.[]"} <= set(places)
    for place in places:
        changed = deepcopy(data)
        objects(changed)[place]["later"] = LATER
        put(bundle, changed)
        assert reasons(bundle) == [], place
        assert survives(bundle), place


def test_fields_at_all_depths_at_once_outlive_a_write(bundle: Path) -> None:
    data = manifest_of(bundle)
    for place, record in objects(data).items():
        if place.rpartition(".")[2] not in MAPPINGS:
            record["later"] = LATER
    put(bundle, data)
    assert reasons(bundle) == [] and survives(bundle)


Change = Callable[[dict[str, Any]], None]  # of one engine's record


def sets(*path: Any) -> Change:
    """Sets the value at the end of a path of names."""
    *parents, last, value = path

    def change(record: Any) -> None:
        for name in parents:
            record = record[name]
        record[last] = value

    return change


def lacks(*names: str) -> Change:
    """A record with other fields in the place of some."""

    def change(record: dict[str, Any]) -> None:
        for name in names:
            record[f"{name}_v3"] = record.pop(name)

    return change


def without(name: str, **stated: Any) -> Change:
    """A record that lacks a field, or with no name all of them, and states others."""

    def change(record: dict[str, Any]) -> None:
        for own in list(record) if not name else [name]:
            del record[own]
        record.update(stated)

    return change


UNKNOWN: dict[str, tuple[int, Change, str]] = {  # of which engine, what, and what is said
    "dtype": (0, sets("dtype", "fp8"), "has dtype fp8, which this wanexport does not know"),
    "role": (1, sets("role", "upscaler"), "has role upscaler, which"),
    "backend": (0, sets("backend", "quantum"), "has backend quantum, which"),
    "device": (0, sets("target", "device", "npu"), "has device npu, which"),
    "family": (1, sets("family", "helios"), "it is of family helios, the model of t2v"),
    "file": (0, sets("files", "tokens", FILE), "has file tokens, which"),
    "file of a package": (1, sets("files", "kernels", FILE), "has file kernels, which"),
    "kind of attention": (
        1,
        sets("program", "attention", "camera", {"count": 2, "queries": 72, "keys": 9}),
        "has attention of kind camera, which",
    ),
    "moment": (1, sets("program", "calls", 0, "when", "chunk"), "has a call at each chunk, which"),
    "draw": (0, sets("program", "inputs", "text", "draw", "noise"), "text drawn as noise, which"),
    "input": (
        1,
        sets("program", "inputs", "camera", {"shape": [1, 6, 3, 8, 12], **PLAIN}),
        "camera [1, 6, 3, 8, 12] fp32 normal, the model takes",
    ),
    "call": (1, sets("program", "calls", 0, "name", "prepare"), "has file embed, which"),
    "state": (
        1,
        sets("program", "state", "k.{i}", {"shape": [1, 2], "dtype": "fp32"}),
        "calls are not the model's",
    ),
    "details": (0, sets("details", ["native"]), "has details of another form, which"),
    "details of plans": (2, sets("details", {"version_compatible": "11"}), "details of another"),
    "kernels by layer": (1, sets("details", {"attention": ["fa5"]}), "has details of another form"),
    "program": (1, lacks("program"), "its record has no program"),
    "several fields": (0, lacks("geometry", "layout", "files"), "has no files, geometry, layout"),
    "geometry": (2, sets("geometry", [64, 96, 9]), "its record.geometry is [64, 96, 9]"),
    "steps": (1, sets("sampling", "steps", "few"), "its record.sampling.steps is 'few'"),
    "fields of another kind": (
        0,
        without("sampling", dtype="fp8"),
        "has dtype fp8, which",
    ),
    "nothing that is known": (
        1,
        without("", role="text", format=3),
        "engine ?-? has role text, which",
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_unknown_costs_the_one_engine_that_has_it(bundle: Path, what: str) -> None:
    number, change, said = UNKNOWN[what]
    data = manifest_of(bundle)
    change(data["engines"][number])
    put(bundle, data)
    (reason,) = reasons(bundle)
    assert reason.startswith("engine ") and said in reason
    assert "install " in reason or "build it again" in reason
    assert survives(bundle)
    if number:
        assert choose_engine(bundle, read_manifest(bundle), EngineOptions(device="cpu"))


def test_an_engine_that_cannot_be_read_is_no_reason_to_change_device_silently(bundle: Path) -> None:
    data = manifest_of(bundle)
    gpu = {"device": "cuda", "arch": "sm90"}
    data["engines"][1] = {**data["engines"][1], "dtype": "bf16", "target": gpu}
    del data["engines"][1]["program"]
    del data["engines"][2]
    manifest = read_manifest(put(bundle, data))
    with pytest.warns(UserWarning, match=r"aoti-bf16-sm90 cannot .* has no program.* runs on cpu"):
        choose_engine(bundle, manifest, EngineOptions())
    for options in (EngineOptions(device="cpu"), EngineOptions(dtype="fp32")):
        choose_engine(bundle, manifest, options)  # who asked for this is told nothing


def test_a_bundle_of_later_engines_alone_says_why_each_cannot_be_used(bundle: Path) -> None:
    data = manifest_of(bundle)
    data["engines"][0]["backend"] = "quantum"
    data["engines"][1]["role"] = "upscaler"
    del data["engines"][2]["program"]
    manifest = read_manifest(put(bundle, data))
    with pytest.raises(BadRequest) as refused:
        choose_engine(bundle, manifest, EngineOptions())
    for said in ("has backend quantum", "has role upscaler", "tensorrt-fp32-sm89 cannot be used: "):
        assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_engine_of_another_role_neither_competes_nor_adds_a_shape(bundle: Path) -> None:
    data = manifest_of(bundle)
    vae = {**data["engines"][0], "role": "vae", "target": {"device": "cuda"}}
    vae["geometry"] = {**vae["geometry"], "height": 128}
    data["engines"].append(vae)
    manifest = read_manifest(put(bundle, data))
    chosen = choose_engine(bundle, manifest, EngineOptions(device="cpu"))
    assert chosen.record.role == DENOISER and chosen.record.geometry.height == 64


@pytest.mark.parametrize(
    "weights",
    [
        {"upscaler": {"role": "upscaler", "name": "base"}},
        {"fp8": {"dtype": "fp8", "layout": "1" * 64}},
        {"style": {"name": "style", "layout": "1" * 64}},
        {"middle": {"expert": "middle_noise"}},
        {"scales": {"later": LATER}},
    ],
)
def test_weights_of_a_later_version_are_nobodys_obstacle(bundle: Path, weights: Any) -> None:
    data = manifest_of(bundle)
    for name, changes in weights.items():
        data["weights"][name] = {**data["weights"]["fp32"], **changes}
    put(bundle, data)
    assert reasons(bundle) == [] and survives(bundle)


@pytest.mark.parametrize("field", ["role", "dtype", "name"])
def test_weights_of_another_kind_do_not_serve_an_engine(bundle: Path, field: str) -> None:
    data = manifest_of(bundle)
    data["weights"]["fp32"][field] = "later"
    if field == "dtype":
        data["weights"]["fp32"]["layout"] = "1" * 64
    put(bundle, data)
    manifest = read_manifest(bundle)
    engine = manifest.engines[0]
    reason = why_unusable(bundle, manifest, engine)
    assert ("lacks weights" in reason) is (field != "name")
    assert manifest.weights_of(engine.layout) == []


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (["first", "second"], "has experts first and second, which"),
        (["high_noise", "low_noise"], "boundary None does not fit 2 experts"),
    ],
)
def test_other_experts_than_the_known_are_no_damage(
    bundle: Path, experts: list[str], said: str
) -> None:
    put(bundle, {**manifest_of(bundle), "experts": experts})
    assert len(reasons(bundle)) == 3 and all(said in reason for reason in reasons(bundle))


def test_a_family_of_a_later_version_is_named(bundle: Path) -> None:
    put(bundle, {**manifest_of(bundle), "family": "helios"})
    assert all("has family helios, which" in reason for reason in reasons(bundle))
    assert len(reasons(bundle)) == 3 and survives(bundle)


@pytest.mark.parametrize(
    "config", [{"channels": 3}, {"dim": "large"}, {"in_channels": 52}, {"num_layers": 10**6}]
)
def test_the_sizes_of_a_family_that_is_not_known_are_no_damage(bundle: Path, config: Any) -> None:
    data = manifest_of(bundle)
    sizes = config if "channels" in config else {**data["config"], **config}
    put(bundle, {**data, "family": "helios", "config": sizes})
    with pytest.raises(BundleError, match=r"'helios' is not known to this wanexport.*: install"):
        read_manifest(bundle)
    put(bundle, {**data, "config": sizes})
    with pytest.raises(BundleError, match="is damaged"):
        read_manifest(bundle)


def test_an_engine_is_served_by_any_set_that_is_whole(bundle: Path) -> None:
    """Two halves of different sets are none."""
    data = manifest_of(bundle)
    own = data["weights"].pop("fp32")
    for engine in data["engines"]:
        engine["sampling"]["boundary"] = 0.9
    data["experts"] = ["high_noise", "low_noise"]
    halves = {"high_noise": "base", "low_noise": "style"}
    data["weights"] = {e: {**own, "expert": e, "name": name} for e, name in halves.items()}
    put(bundle, data)
    assert ["lacks weights of an expert" in reason for reason in reasons(bundle)] == [True] * 3
    data["weights"]["other"] = {**own, "expert": "high_noise", "name": "style"}
    put(bundle, data)
    assert reasons(bundle) == []
    manifest: Manifest = read_manifest(bundle)
    layout = manifest.engines[0].layout
    assert [w.expert for w in manifest.weights_of(layout, "style")] == ["high_noise", "low_noise"]
    assert manifest.config == CONFIG
