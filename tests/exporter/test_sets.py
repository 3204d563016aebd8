"""Weights sets of a bundle: LoRAs merged at build and after it, checkpoints added, sets removed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.oracles.quantised_files import write_scaled
from tests.oracles.wan_reference import (
    diffusers_model,
    official_state,
    small_config,
    small_geometry,
    write_official,
)
from wanexport.exporter.build import build
from wanexport.exporter.bundle.writer import open_bundle
from wanexport.exporter.cli.main import cli
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.inspection import inspect, list_bundle
from wanexport.exporter.model_source import resolve
from wanexport.exporter.reference.inputs import forward_inputs
from wanexport.exporter.reference.parity import relative_l2
from wanexport.exporter.sets.add import add
from wanexport.exporter.sets.convert import add_weights
from wanexport.exporter.sets.remove import remove
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays
from wanexport.runtime.errors import BadRequest, WanExportError, WanExportWarning

CONFIG = small_config("t2v-1.3b", num_layers=1)
TWO = small_config("t2v-a14b", num_layers=1)
GEOMETRY = small_geometry(CONFIG)
INPUTS = forward_inputs(CONFIG, GEOMETRY, 812.0, seed=2)
Q, FFN = "blocks.0.self_attn.q", "blocks.0.ffn.2"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The model's tensors under the official names; a test must not change them."""
    return official_state(diffusers_model(CONFIG))


def build_small(model: Path, bundle: Path, **options: Any) -> dict[str, Any]:
    resolution = (GEOMETRY.height, GEOMETRY.width)
    asked: dict[str, Any] = {"resolution": resolution, "frames": GEOMETRY.frames, **options}
    return build(model, output=bundle, backends=["onnx"], device="cpu", **asked)


@pytest.fixture(scope="module")
def model(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of it."""
    return write_official(tmp_path_factory.mktemp("model"), state, CONFIG)


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of it in fp32."""
    bundle = tmp_path_factory.mktemp("bundles") / "bundle"
    build_small(model, bundle)
    return bundle


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRA files by name: two of the model, and others."""
    folder, rng = tmp_path_factory.mktemp("loras"), torch.Generator().manual_seed(5)

    def low_rank(layer: str, rows: int, columns: int, rank: int = 4) -> dict[str, Tensor]:
        draw = [torch.randn(shape, generator=rng) / 8 for shape in ((rank, columns), (rows, rank))]
        return {f"{layer}.lora_down.weight": draw[0], f"{layer}.lora_up.weight": draw[1]}

    def prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}

    style = low_rank(Q, 256, 256) | low_rank(FFN, 256, 1024)
    style |= {f"{Q}.alpha": torch.tensor(2.0), f"{FFN}.alpha": torch.tensor(8)}
    style["blocks.0.diff_m"] = torch.randn(1, 6, 256, generator=rng) / 20
    style["head.head.diff_b"] = torch.randn(64, generator=rng) / 20
    files = {
        "style": prefixed(style),
        "other": low_rank(Q, 256, 256, 8),
        "deep": prefixed(style | low_rank("blocks.7.ffn.0", 1024, 256)),
        "wide": prefixed(low_rank(Q, 512, 512)),
        "image": prefixed(low_rank("blocks.0.cross_attn.k_img", 256, 256)),
    }
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in files}


def merged64(state: dict[str, Tensor], file: Path, strength: float) -> dict[str, Tensor]:
    """The tensors with one of the two LoRAs merged, in plain fp64."""
    lora = {n.removeprefix("diffusion_model."): t.double() for n, t in load_file(file).items()}
    found = {name: tensor.double() for name, tensor in state.items()}
    for layer in (Q, FFN):
        if f"{layer}.lora_up.weight" in lora:
            up, down = lora[f"{layer}.lora_up.weight"], lora[f"{layer}.lora_down.weight"]
            alpha = lora.get(f"{layer}.alpha", torch.tensor(float(len(down))))
            found[f"{layer}.weight"] = found[f"{layer}.weight"] + strength * alpha / len(down) * (
                up @ down
            )
    for name, key in (
        ("blocks.0.modulation", "blocks.0.diff_m"),
        ("head.head.bias", "head.head.diff_b"),
    ):
        if key in lora:
            found[name] = found[name] + strength * lora[key]
    return {name: tensor.float() for name, tensor in found.items()}


def velocity(bundle: Path, **options: Any) -> np.ndarray:
    found: np.ndarray = load(bundle, **options)(**INPUTS)
    return found


def velocity_of(state: dict[str, Tensor], folder: Path) -> np.ndarray:
    """That of a bundle built from these tensors."""
    build_small(write_official(folder / "model", state, CONFIG), folder / "bundle")
    return velocity(folder / "bundle")


@pytest.fixture(scope="module")
def expected(
    state: dict[str, Tensor], loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> np.ndarray:
    """The velocity of the model with `style` at 0.8, merged in fp64 and built anew."""
    folder = tmp_path_factory.mktemp("expected")
    return velocity_of(merged64(state, loras["style"], 0.8), folder)


def test_a_lora_at_build_after_it_and_in_memory_is_that_of_fp64(
    model: Path, own: Path, loras: dict[str, Path], expected: np.ndarray, tmp_path: Path
) -> None:
    given = f"{loras['style']}:0.8"
    plain = velocity(own)
    record = build_small(model, tmp_path / "built", lora=[given])
    add(own, "style", lora=[given])
    denoiser = load(own)
    denoiser.use(lora=[(loras["style"], 0.8)])
    found = {
        "built": velocity(tmp_path / "built"),
        "added": velocity(own, weights="style"),
        "in memory": denoiser(**INPUTS),
    }
    assert denoiser.weights == f"base + {loras['style']}:0.8"
    assert relative_l2(plain, expected) > 1e-2
    for what, result in found.items():
        assert relative_l2(result, expected) < 1e-6, what
    denoiser.use("base")
    np.testing.assert_array_equal(denoiser(**INPUTS), plain)
    np.testing.assert_array_equal(velocity(own), plain)
    (source,) = record["sources"].values()
    assert source["lora"][0]["changes"] == {"diff_b": 1, "diff_m": 1, "low rank": 2}
    assert source["lora"][0]["strength"] == 0.8


def test_loras_are_stacked_in_order_with_their_strengths(
    state: dict[str, Tensor], own: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    stacked = merged64(merged64(state, loras["style"], 0.5), loras["other"], -1.5)
    expected = velocity_of(stacked, tmp_path / "expected")
    add(own, "both", lora=[f"{loras['style']}:0.5", f"{loras['other']}:-1.5"])
    assert relative_l2(velocity(own, weights="both"), expected) < 1e-6
    denoiser = load(own, weights="both")
    denoiser.use(lora=[f"{loras['style']}:0.5", (loras["other"], -1.5)])
    assert relative_l2(denoiser(**INPUTS), expected) < 1e-6
    denoiser.use("both", lora=[f"{loras['style']}:-0.5", (loras["other"], 1.5)])
    assert relative_l2(denoiser(**INPUTS), velocity(own)) < 1e-6  # taken out again


def test_a_set_is_compared_with_its_own_tensors(own: Path, loras: dict[str, Path]) -> None:
    add(own, "style", lora=[loras["style"]])
    assert compare(own, weights="style", steps=1)["passed"]


def test_a_merged_set_is_not_held_against_a_checkpoint(
    own: Path, model: Path, loras: dict[str, Path]
) -> None:
    add(own, "style", lora=[loras["style"]])
    with pytest.raises(BadRequest, match="LoRAs were merged into weights set style, and -m has"):
        compare(own, model=model, weights="style", steps=1)
    assert compare(own, model=model, steps=1)["passed"]


def test_a_bundle_of_several_precisions_gets_a_file_for_each(
    model: Path, state: dict[str, Tensor], loras: dict[str, Path], tmp_path: Path
) -> None:
    for dtype in ("fp32", "bf16"):
        build_small(model, tmp_path / "bundle", dtype=dtype)
    record = add(tmp_path / "bundle", "style", lora=[loras["style"]])
    assert set(record["weights"]) == {"style-fp32", "style-bf16"}
    (path,) = [w["file"]["path"] for k, w in record["weights"].items() if k == "style-bf16"]
    found = load_arrays(tmp_path / "bundle" / path)[f"{Q}.weight"]
    rounded = {n: t.bfloat16().float() if n == f"{Q}.weight" else t for n, t in state.items()}
    expected = merged64(rounded, loras["style"], 1)[f"{Q}.weight"].bfloat16().float().numpy()
    ulp = np.maximum(np.abs(expected), np.abs(rounded[f"{Q}.weight"].numpy())) / 128
    assert (np.abs(found - expected) <= ulp).all() and (found == expected).mean() > 0.999
    again = add(tmp_path / "bundle", "style", lora=[loras["style"]])
    assert set(again["reused"]) == {"weights style-fp32", "weights style-bf16"}


def test_a_quantised_checkpoint_is_built_compared_and_added(
    state: dict[str, Tensor], own: Path, tmp_path: Path
) -> None:
    file = tmp_path / "wan.safetensors"
    write_scaled(file, state, extra={"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)})
    record = build_small(file, tmp_path / "quantised")
    (source,) = record["sources"].values()
    assert (
        source["stored"].startswith("F16, ") and "fp8 e4m3, one scale a tensor" in source["stored"]
    )
    assert compare(tmp_path / "quantised", model=file, steps=1)["passed"]
    add(own, "fp8", model=file)
    np.testing.assert_array_equal(velocity(own, weights="fp8"), velocity(tmp_path / "quantised"))
    shown = CliRunner().invoke(cli, ["ls", str(own)]).output
    assert "set fp8" in shown and "fp8 e4m3" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"nothing to add: pass -m a checkpoint, or --lora FILE\[:STRENGTH\]"),
        ({"lora": ["deep"]}, r"7.*block"),
        ({"lora": ["wide"]}, "512"),
        ({"lora": ["image"]}, "an image branch"),
        ({"lora": ["gone"]}, "gone"),
        ({"lora_high": ["style"]}, "--lora-high and --lora-low are for a model of two experts"),
        ({"lora": ["style"], "recipe": "lightning-4"}, "this recipe is for t2v-a14b, i2v-a14b"),
        ({"lora": ["style"], "low_noise": "x"}, "--low-noise is the second expert of -m: pass the"),
        ({"model": "other"}, "is another model"),
        ({"model": "lora"}, "is a LoRA, no model: pass -m the model"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_leaves_the_bundle_as_it_was(
    options: dict[str, Any], message: str, own: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    for key in options.keys() & {"lora", "lora_high"}:
        options = {**options, key: [loras.get(name, tmp_path / name) for name in options[key]]}
    if options.get("model") == "other":
        wider = small_config("i2v-14b", 1)
        other = write_official(tmp_path / "m", official_state(diffusers_model(wider)), wider)
        options = {"model": other}
    if options.get("model") == "lora":
        options = {"model": loras["style"]}
    with pytest.raises(WanExportError, match=message) as refused:
        add(own, "style", **options)
    assert "\n" not in str(refused.value)
    assert {p: p.stat().st_mtime_ns for p in own.rglob("*") if not p.name.startswith(".lock")} == {
        p: t for p, t in before.items() if not p.name.startswith(".lock")
    }


@pytest.mark.parametrize("name", ["base", "high_noise", "a/b", "", "..", "x" * 65, "a b"])
def test_a_name_that_no_set_may_have_is_refused(
    name: str, own: Path, loras: dict[str, Path]
) -> None:
    with pytest.raises(BadRequest):
        add(own, name, lora=[loras["style"]])


def test_what_of_a_lora_has_no_place_is_left_out_when_asked(
    own: Path, loras: dict[str, Path]
) -> None:
    add(own, "whole", lora=[loras["style"]])
    with pytest.warns(WanExportWarning, match=r"2 tensors without a place .*blocks\.7\.ffn\.0"):
        record = add(own, "part", lora=[loras["deep"]], lora_partial=True)
    (part,) = record["weights"].values()
    assert part["source"]["lora"][0]["unused"] == 2
    np.testing.assert_array_equal(velocity(own, weights="part"), velocity(own, weights="whole"))
    denoiser = load(own)
    with pytest.raises(BadRequest, match="deep"):
        denoiser.use(lora=[loras["deep"]])
    assert denoiser.weights == "base"
    with pytest.warns(WanExportWarning, match="2 tensors without a place"):
        denoiser.use(lora=[loras["deep"]], lora_partial=True)
    np.testing.assert_allclose(
        denoiser(**INPUTS), velocity(own, weights="whole"), rtol=1e-5, atol=1e-6
    )


def test_a_set_and_an_engine_are_removed_whole(
    own: Path, model: Path, loras: dict[str, Path]
) -> None:
    add(own, "style", lora=[loras["style"]])
    add(own, "other", lora=[loras["other"]])
    build_small(model, own, dtype="fp16")
    listed = list_bundle(own)
    assert [s["name"] for s in listed["sets"]] == ["base", "style", "other"]
    gone = remove(own, "style")
    assert gone["bytes"] > 0 and not any((own / path).exists() for path in gone["files"])
    engine = next(e["name"] for e in list_bundle(own)["engines"] if "fp16" in e["name"])
    remove(own, engine)
    left = list_bundle(own)
    assert [s["name"] for s in left["sets"]] == ["base", "other"]
    assert [e["name"] for e in left["engines"]] == [e["name"] for e in listed["engines"][:1]]
    assert inspect(own, verify=True)["problems"] == []
    assert velocity(own, weights="other").shape == INPUTS["latent"].shape
    for name, message in (("style", "expected one of other"), ("base", "base is the set that")):
        with pytest.raises(BadRequest, match=message):
            remove(own, name)


def test_what_another_build_had_finished_stays_for_it(
    own: Path, model: Path, loras: dict[str, Path]
) -> None:
    add(own, "style", lora=[loras["style"]])
    source, manifest = resolve(str(model), None), read_manifest(own)

    def untold(*_: object) -> None:
        """Progress that nobody watches."""

    with pytest.raises(KeyboardInterrupt), open_bundle(own, manifest) as writer:
        add_weights(writer, source, "", "fp32", untold, name="later")
        raise KeyboardInterrupt
    remove(own, "style")
    add(own, "other", lora=[loras["other"]])
    assert {s["name"] for s in list_bundle(own)["sets"]} == {"base", "other"}
    assert add(own, "later", model=model)["reused"] == ["weights later-fp32"]
    assert not any(own.glob("manifest.*.json"))


def test_a_recipe_is_kept_with_a_set_and_used_with_it(own: Path, loras: dict[str, Path]) -> None:
    add(own, "fast", lora=[loras["style"]], recipe="lightx2v-4")
    assert read_manifest(own).weights["fast-fp32"].recipe == "lightx2v-4"
    assert load(own).sampling.timesteps is None
    sampling = load(own, weights="fast").sampling
    assert sampling.timesteps == pytest.approx((1000, 937.5, 2500 / 3, 625))
    assert (sampling.guidance, sampling.solver) == ((1.0, 1.0), "euler")
    assert next(s for s in list_bundle(own)["sets"] if s["name"] == "fast")["recipe"]
    denoiser = load(own)
    denoiser.use("fast")
    assert denoiser.sampling.steps == 4


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, dict[str, dict[str, Tensor]]]:
    """A bundle of two experts from two files, their folder, and their tensors."""
    folder = tmp_path_factory.mktemp("pair")
    states = {
        name: official_state(diffusers_model(TWO, seed))
        for seed, name in enumerate(("high", "low"))
    }
    save_file(states["high"], folder / "a.safetensors")
    write_scaled(folder / "b.safetensors", states["low"])
    build_small(
        folder / "a.safetensors", folder / "bundle", low_noise=folder / "b.safetensors"
    )  # fmt: skip
    return folder / "bundle", folder, states


def test_two_files_are_two_experts(pair: tuple[Path, Path, Any], tmp_path: Path) -> None:
    bundle, folder, _ = pair
    manifest = read_manifest(bundle)
    assert manifest.experts == ("high_noise", "low_noise") and manifest.config == TWO
    options: dict[str, Any] = {
        "model": folder / "a.safetensors",
        "low_noise": folder / "b.safetensors",
    }
    assert compare(bundle, steps=4, **options)["passed"]
    own = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    add(own, "again", **options)
    np.testing.assert_array_equal(velocity(own, weights="again"), velocity(own))


def test_each_expert_gets_its_own_loras(
    pair: tuple[Path, Path, Any], loras: dict[str, Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(pair[0], tmp_path / "bundle"))
    style, other = loras["style"], loras["other"]
    add(bundle, "two", lora_high=[style], lora_low=[f"{other}:0.5"])
    add(bundle, "same", lora=[style])
    base, two, same = (load(bundle, weights=name) for name in ("base", "two", "same"))
    high, low = ({**INPUTS, "timestep": np.full(1, t, np.float32)} for t in (950.0, 500.0))
    np.testing.assert_array_equal(two(**high), same(**high))
    assert relative_l2(two(**low), same(**low)) > 1e-3 < relative_l2(two(**low), base(**low))
    base.use(lora={"high_noise": [style], "low_noise": [(other, 0.5)]})
    for inputs in (high, low):
        assert relative_l2(base(**inputs), two(**inputs)) < 1e-6
    records = read_manifest(bundle).sets_named("two")
    assert [r.source["lora"][0]["strength"] for r in records] == [1.0, 0.5]
    base.use(lora={"high_noise": str(style)})
    np.testing.assert_array_equal(base(**low), load(bundle)(**low))
    with pytest.raises(BadRequest, match="no expert 'middle' has a LoRA here"):
        base.use(lora={"middle": [style]})
    named = Path(shutil.copy(style, tmp_path / "style_high_noise.safetensors"))
    for given in ([named], {"low_noise": named}):
        with pytest.raises(BadRequest, match="is named as of high_noise and given to low_noise"):
            base.use(lora=given)  # type: ignore[arg-type]
    wrong: list[dict[str, Any]] = [{"lora": [named]}, {"lora_low": [named]}]
    for options in wrong:
        with pytest.raises(BadRequest, match="is named as of the high-noise expert: pass it with"):
            add(bundle, "wrong", **options)


def test_one_expert_twice_and_the_two_exchanged_are_refused(
    pair: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    high = pair[1] / "a.safetensors"
    with pytest.raises(BadRequest, match=r"a\.safetensors is given as both experts"):
        build_small(high, tmp_path / "x", low_noise=high)
    for name, source in (("HIGH", "a"), ("LOW", "b")):
        shutil.copy(pair[1] / f"{source}.safetensors", tmp_path / f"wan_{name}_14B.safetensors")
    files = [tmp_path / f"wan_{name}_14B.safetensors" for name in ("LOW", "HIGH")]
    with pytest.raises(BadRequest, match="given as the high-noise expert, and is named as the oth"):
        build_small(files[0], tmp_path / "x", low_noise=files[1])
    for name, source in (("high_noise_model", "a"), ("low_noise_model", "b")):
        (tmp_path / name).mkdir()
        shutil.copy(pair[1] / f"{source}.safetensors", tmp_path / name / "wan.safetensors")
    folders = [tmp_path / f"{name}_noise_model" for name in ("low", "high")]
    with pytest.raises(BadRequest, match="given as the high-noise expert, and is named as the oth"):
        build_small(folders[0], tmp_path / "x", low_noise=folders[1])
    with pytest.raises(BadRequest, match="--low-noise is the second expert of an A14B: pass -m"):
        build_small(None, tmp_path / "x", low_noise=files[0])  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_the_commands_take_the_same(own: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    run = CliRunner().invoke
    given = ["--lora", f"{loras['style']}:0.8", "--recipe", "causvid", "--json"]
    record = json.loads(run(cli, ["add", str(own), "style", *given]).stdout)
    assert record["name"] == "style" and record["recipe"] == "causvid"
    listed = json.loads(run(cli, ["ls", str(own), "--json"]).stdout)
    assert [s["name"] for s in listed["sets"]] == ["base", "style"]
    shown = run(cli, ["ls", str(own)]).output
    assert "LoRA" in shown and "at 0.8 (1 diff_b, 1 diff_m, 2 low rank)" in " ".join(shown.split())
    text = tmp_path / "text.safetensors"
    save_file({"text": torch.zeros(3, 4096), "negative": torch.zeros(3, 4096)}, text)
    ran = run(
        cli,
        ["run", str(own), "--text", str(text), "--weights", "style", "-o",
         str(tmp_path / "x.safetensors"), "--json"],
    )  # fmt: skip
    record = json.loads(ran.stdout)
    assert (record["steps"], record["shift"], record["solver"]) == (12, 7.0, "unipc")
    assert set(record["guidance"]) == {1.0}
    ran_words = ["run", str(own), "--text", str(text), "-o", str(tmp_path / "y.safetensors")]
    ran = run(cli, [*ran_words, "--recipe", "lightx2v-4", "--json"])
    record = json.loads(ran.stdout)
    assert (record["steps"], record["solver"]) == (4, "euler")
    wrong = run(cli, [*ran_words, "--recipe", "lightning-4", "--overwrite"])
    assert isinstance(wrong.exception, BadRequest) and "this recipe is for" in str(wrong.exception)
    assert record["timesteps"] == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert "removed style" in run(cli, ["remove", str(own), "style"]).output
