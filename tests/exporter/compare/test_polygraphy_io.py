"""What `compare` saves is what polygraphy reads, and the command that it prints passes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from click.testing import CliRunner
from polygraphy.comparator import RunResults
from polygraphy.json import load_json

from tests.exporter.bench.test_bench import with_low_noise_expert
from tests.quick import slow_but
from wanexport.exporter.cli.main import cli
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.compare.polygraphy import SavedFiles, check_files, feed, save_calls
from wanexport.exporter.compare.rows import ComparedCall
from wanexport.runtime import load
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.denoiser import Denoiser
from wanexport.runtime.errors import BadRequest, WanExportError
from wanexport.runtime.program import Input, TensorSpec
from wanexport.runtime.wan_config import EXPERTS


def run(command: str) -> subprocess.CompletedProcess[str]:
    """Run a printed command as a user would, with the environment's own polygraphy."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )


@pytest.mark.parametrize("dtype", slow_but(["fp32", "fp16"], "fp32"))
def test_the_printed_command_passes_and_a_wrong_reference_fails(
    bundle: Path, tmp_path: Path, dtype: str
) -> None:
    inputs, outputs = tmp_path / "in puts.json", tmp_path / "outputs.json"
    result = compare(bundle, dtype=dtype, steps=1, save_inputs=inputs, save_outputs=outputs)
    assert result["polygraphy"]["files"] == [str(inputs), str(outputs)]
    assert result["polygraphy"]["note"] is None
    (command,) = result["polygraphy"]["commands"]
    child = run(command)
    assert child.returncode == 0, child.stderr
    assert "Passed: 2/2 iterations" in child.stdout
    assert child.stdout.splitlines()[-1].startswith("[I] PASSED")
    saved = RunResults.load(str(outputs))
    reference = saved["graph"]
    factor = 1.0 + 3 * result["steps"][0]["gate"]
    wrong = RunResults()
    wrong.add([{"velocity": np.float32(factor) * r["velocity"]} for r in reference])
    wrong.save(str(outputs))
    child = run(command)
    assert child.returncode == 1
    assert "Passed: 0/2 iterations" in child.stdout


def test_inputs_and_velocities_are_those_of_the_compared_calls(
    bundle: Path, tmp_path: Path
) -> None:
    inputs, outputs = tmp_path / "inputs.json", tmp_path / "outputs.json"
    result = compare(bundle, dtype="fp32", steps=2, save_inputs=inputs, save_outputs=outputs)
    feeds, runs = load_json(str(inputs)), RunResults.load(str(outputs))
    assert list(runs.keys()) == ["graph", "64x96x9/onnx-fp32"]
    denoiser = load(bundle, dtype="fp32")
    errors = []
    for values, expected, found in zip(feeds, *runs.values(), strict=True):
        assert {name: value.shape for name, value in values.items()} == {
            "latent": (1, 16, 3, 8, 12),
            "timestep": (1,),
            "text": (1, 512, 4096),
        }
        assert {str(value.dtype) for value in values.values()} == {"float32"}
        np.testing.assert_array_equal(denoiser(**values), found["velocity"])
        a, b = (array["velocity"].astype(np.float64).ravel() for array in (found, expected))
        errors.append(np.linalg.norm(a - b) / np.linalg.norm(b))
    steps = [max(errors[i : i + 2]) for i in (0, 2)]  # the worse of a guided step's calls counts
    assert steps == pytest.approx([row["error"] for row in result["steps"]])
    (command,) = result["polygraphy"]["commands"]
    norms = [np.linalg.norm(r["velocity"].astype(np.float64)) for r in runs["graph"]]
    assert float(command.rpartition(" ")[2]) == pytest.approx(1e-5 * max(norms), rel=1e-4)


@pytest.mark.slow
def test_each_expert_has_files_and_a_command_of_its_own(bundle: Path, tmp_path: Path) -> None:
    with_low_noise_expert(bundle)
    inputs, outputs = tmp_path / "in.json", tmp_path / "out.json"
    result = compare(bundle, steps=2, save_inputs=inputs, save_outputs=outputs)
    polygraphy = result["polygraphy"]
    names = [Path(file).name for file in polygraphy["files"]]
    assert names == [f"{k}-{e}_noise.json" for e in ("high", "low") for k in ("in", "out")]
    times = [
        {float(values["timestep"][0]) for values in load_json(str(tmp_path / name))}
        for name in names[::2]
    ]
    assert all(time >= 875 for time in times[0])
    assert all(time < 875 for time in times[1])
    assert "/weights/fp32/denoiser.onnx --onnxrt" in polygraphy["commands"][0]
    child = run(polygraphy["commands"][1])
    assert child.returncode == 0, child.stdout
    assert "low_noise-fp32" in child.stdout


def saved(
    bundle: Path,
    folder: Path,
    *,
    weights: object = None,
    file: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """What is said of one call of an engine whose record has these changes.

    weights are what a TensorRT engine holds unless they are inside of its plan, and file is where
    weights lie that are not the bundle's.
    """
    manifest = read_manifest(bundle)
    record = replace(next(e for e in manifest.engines if e.dtype == "fp32"), **changes)
    if record.backend.startswith("tensorrt"):
        plan = replace(record.files["denoiser"], path="engines/denoiser.plan")
        record = replace(record, files={"denoiser": plan})
    values = {name: np.zeros(spec.shape, np.float32) for name, spec in record.inputs.items()}
    velocity = np.ones(record.output.shape, np.float32)
    engine = Mock(weights=weights)
    (own,) = (w.file.path for w in manifest.weights.values() if w.dtype == record.dtype)
    return save_calls(
        SavedFiles(folder / "in.json", folder / "out.json"),
        [ComparedCall(values, velocity, velocity, 0.25)],
        Path("b"),
        Denoiser(record, {"": engine}),
        {"": Mock(path=Path("b") / (file or own))},
        "graph",
    )


def test_commands_for_every_kind_of_engine(tiny_bundle: Path, tmp_path: Path) -> None:
    loads = f"--load-inputs {tmp_path}/in.json --load-outputs {tmp_path}/out.json"
    ends = f"{loads} --compare l2 --l2-threshold 0.25"
    plan = "polygraphy run b/engines/denoiser.plan --trt --model-type engine"
    assert saved(tiny_bundle, tmp_path, backend="tensorrt")["commands"] == [f"{plan} {ends}"]
    rtx = saved(tiny_bundle, tmp_path, backend="tensorrt-rtx")["commands"]
    assert rtx == [f"POLYGRAPHY_USE_TENSORRT_RTX=1 {plan} {ends}"]
    (cuda,) = saved(tiny_bundle, tmp_path, target={"device": "cuda"})["commands"]
    assert cuda == (
        "cp b/engines/64x96x9/onnx-fp32/denoiser.onnx b/weights/fp32/denoiser.onnx && "
        f"polygraphy run b/weights/fp32/denoiser.onnx --onnxrt --providers cuda {ends}"
    )


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"backend": "aoti"}, "polygraphy runs no aoti engine"),
        (
            {"backend": "tensorrt", "weights": "on the device"},
            "the plan takes its weights as inputs: polygraphy runs one built with --bake-weights",
        ),
    ],
)
def test_without_a_command_one_line_says_why(
    tiny_bundle: Path, tmp_path: Path, changes: dict[str, Any], note: str
) -> None:
    told = saved(tiny_bundle, tmp_path, **changes)
    assert (told["commands"], told["note"]) == ([], note)
    assert all(Path(file).stat().st_size for file in told["files"])


def test_a_model_with_a_state_has_no_command(tiny_bundle: Path, tmp_path: Path) -> None:
    program = read_manifest(tiny_bundle).engines[0].program
    kept = replace(program, state={"memory": TensorSpec((1,))})
    told = saved(tiny_bundle, tmp_path, program=kept)
    assert told["commands"] == [] and "keeps a state" in told["note"]


def test_weights_of_another_name_have_no_command(tiny_bundle: Path, tmp_path: Path) -> None:
    told = saved(tiny_bundle, tmp_path, file="style.safetensors")
    assert told["commands"] == [] and "style.safetensors" in told["note"]


def test_a_feed_is_padded_and_has_a_timestep_for_each_frame() -> None:
    specs = {"timestep": Input((3,)), "text": Input((1, 4, 2), draw="rows")}
    values = feed({"timestep": 7, "text": np.ones((2, 2))}, specs)
    np.testing.assert_array_equal(values["timestep"], [7, 7, 7])
    np.testing.assert_array_equal(values["text"], [[[1, 1], [1, 1], [0, 0], [0, 0]]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in.safetensors", "polygraphy reads JSON, name a .json file"),
        ("nowhere/in.json", "cannot write in .*nowhere: name an existing folder"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_the_work(
    name: str, message: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(WanExportError, match=message):
        compare(tiny_bundle / "none", save_inputs=tmp_path / name)
    with pytest.raises(WanExportError, match=message):
        compare(tiny_bundle / "none", save_outputs=tmp_path / name)


@pytest.mark.parametrize(
    ("option", "name"),
    [("save_inputs", "in.json"), ("save_outputs", "out.json"), ("plot", "curves.svg")],
)
def test_a_file_that_is_there_is_replaced_only_when_that_is_asked_for(
    option: str, name: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Said before the bundle is looked at; a link to nothing is there too."""
    for path in (tmp_path / name, tmp_path / f"link-{name}"):
        asked: dict[str, Any] = {option: path}
        if path.name == name:
            path.write_text("the user's")
        else:
            path.symlink_to(tmp_path / "nothing")
        said = f"{re.escape(str(path))} exists: name another --{option.replace('_', '-')}, or add"
        with pytest.raises(BadRequest, match=f"{said} --overwrite$"):
            compare(tiny_bundle / "none", **asked)
        with pytest.raises(WanExportError, match=r"none"):  # which is no bundle
            compare(tiny_bundle / "none", **asked, overwrite=True)
    assert (tmp_path / name).read_text() == "the user's"


def test_the_files_of_each_expert_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "in-low_noise.json").write_text("the user's")
    files = SavedFiles(tmp_path / "in.json", None)
    check_files(files)
    with pytest.raises(BadRequest, match=r"in-low_noise\.json exists: name another --save-inputs"):
        check_files(files, EXPERTS)
    check_files(replace(files, overwrite=True), EXPERTS)


def test_without_polygraphy_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(WanExportError, match=r"needs polygraphy; pip install polygraphy$"):
        compare(tmp_path / "none", save_inputs=tmp_path / "in.json")


def test_the_command_line_prints_it_in_text_and_json(bundle: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(bundle), "--dtype", "fp32", "--steps", "1"]
    inputs, outputs = tmp_path / "in.json", tmp_path / "out.json"
    save = {"in": ["--save-inputs", str(inputs)], "out": ["--save-outputs", str(outputs)]}
    both = CliRunner().invoke(cli, [*arguments, *save["in"], *save["out"], "--json"])
    first = CliRunner().invoke(cli, [*arguments, *save["in"], "--overwrite"])
    second = CliRunner().invoke(cli, [*arguments, *save["out"], "--overwrite"])
    assert both.exit_code == first.exit_code == second.exit_code == 0
    (command,) = json.loads(both.stdout)["polygraphy"]["commands"]
    assert f" --load-inputs {inputs} --load-outputs {outputs} --compare l2 " in command
    assert f"saved {inputs}" in first.stdout.splitlines()
    (line,) = (line for line in first.stdout.splitlines() if line.startswith("cp "))
    assert line.endswith(f" --onnxrt --load-inputs {inputs}")
    assert "no polygraphy command: it needs the inputs: add --save-inputs" in second.stdout
