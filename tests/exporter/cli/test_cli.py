"""The command line: what it prints, its exit codes, and one line for every mistake."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import helper

from tests.tables import faults
from wanexport.exporter.cli.main import cli, main
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.errors import WanExportError


def wanexport(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a process of its own."""
    command = [sys.executable, "-m", "wanexport.exporter.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "text.safetensors"
    rows = rng.standard_normal((2, 9, 4096)).astype(np.float32)
    save_arrays(path, {"text": rows[0], "negative": rows[1]})
    return path


def test_run_writes_the_latent_and_says_how(tiny_bundle: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "latents.safetensors"
    options = ("--text", text, "-o", output, "--steps", 3, "--seed", 7)
    result = invoke("run", tiny_bundle, *options, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["seed"] == 7
    assert record["timesteps"] == [999, 908, 713]
    latent = load_arrays(output)["latent"]
    assert latent.shape == (1, 16, 3, 8, 12)
    assert "exists: name another -o" in str(invoke("run", tiny_bundle, *options).exception)
    again = ("run", tiny_bundle, "--overwrite", *options)
    assert invoke(*again).exit_code == 0
    np.testing.assert_array_equal(load_arrays(output)["latent"], latent)
    assert invoke(*again[:-1], 8).exit_code == 0
    assert not np.array_equal(load_arrays(output)["latent"], latent)


def test_run_takes_distilled_timesteps_and_its_own_noise(
    tiny_bundle: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    noise = rng.standard_normal((1, 16, 3, 8, 12)).astype(np.float32)
    text = np.ones((3, 4096), np.float32)
    save_arrays(tmp_path / "in.safetensors", {"text": text, "noise": noise})
    arguments = ("--text", tmp_path / "in.safetensors", "-o", tmp_path / "out.safetensors")
    result = invoke("run", tiny_bundle, *arguments, "--timesteps", "1000,500", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["solver"], record["timesteps"]) == ("euler", [1000, 500])
    assert set(record["guidance"]) == {1}


def test_compare_prints_a_table_and_passes(bundle: Path) -> None:
    result = invoke("compare", bundle, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "64x96x9/onnx-fp32: passed" in result.stdout
    assert json.loads(invoke("compare", bundle, "--steps", 1, "--json").stdout)["passed"]


def test_compare_fails_with_exit_code_one(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanexport.exporter.reference.parity.FP32_GATE", 1e-9)
    result = invoke("compare", bundle, "--steps", 1, "--json")
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["passed"]


def test_build_prints_its_record(tmp_path: Path) -> None:
    model = ("-m", "TINY", "--random-weights", 3, "--resolution", "96*64", "--frames", 9)
    result = invoke("build", *model, "-o", tmp_path / "b", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["engines"][0]["name"] == "64x96x9/onnx-fp32"
    result = invoke("build", *model, "-o", tmp_path / "b")
    assert "height 64, width 96, 9 frames, 72 tokens" in result.stdout
    assert "reused: weights fp32, engine 64x96x9/onnx-fp32" in result.stdout


BUILD = ("build", "--resolution", "64x96", "--frames", "9")
TINY = ("-m", "tiny", "--random-weights", "0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "-m", "tiny", "--random-weights", "0", "--resolution", "64x97", "--frames", "9"),
         "multiples of 16; nearest: 64x96 or 64x112"),
        (("build", "-m", "ti2v-5b", "--random-weights", "0", "--resolution", "720x1280",
          "--frames", "121"), "multiples of 32; nearest: 704x1280 or 736x1280"),
        (("build", "-m", "tiny", "--random-weights", "0", "--resolution", "64x96", "--frames", "8"),
         "expected 4k+1; nearest: 5 or 9"),
        ((*BUILD, "-m", "tiny"), "is a preset, not a checkpoint: add --random-weights"),
        ((*BUILD, "--backend", "vulkan"), "Invalid value for '--backend': 'vulkan' is not one of"),
        ((*BUILD, "--dtype", "int4"), "Invalid value for '--dtype': 'int4' is not one of"),
        ((*BUILD, "--random-weights", "-1"), "Invalid value for '--random-weights': -1"),
        ((*BUILD, "--colour"), "No such option"),
        (("build", "--frames", "9"), "Missing option '--resolution'"),
        (("paint",), "No such command 'paint'"),
        ((*BUILD, "-m", "nowhere/at/all"), "nowhere/at/all does not exist"),
        ((*BUILD, "-m", "huge", "--random-weights", "0"), "'huge' is no preset"),
        (("run", "{tmp}", "--text", "x", "-o", "y.safetensors"), "is no bundle"),
        (("run", "{bundle}", "--text", "{tmp}/no", "-o", "y.safetensors"), "cannot read"),
        (("run", "{bundle}", "--text", "{text}", "-o", "{tmp}/no/y.safetensors"),
         "cannot write"),
        (("run", "{bundle}", "--text", "{text}", "-o", "{tmp}/y.safetensors", "--guidance", "a"),
         "--guidance 'a': expected numbers"),
        (("run", "{bundle}", "--text", "{text}", "-o", "{tmp}/y.safetensors", "--timesteps", "1,2"),
         "timesteps must fall"),
        (("run", "{bundle}", "--text", "{nan}", "-o", "{tmp}/y.safetensors"),
         "text has NaN or Inf: expected finite values"),
        (("run", "{bundle}", "--text", "{long}", "-o", "{tmp}/y.safetensors"),
         "text has 513 rows, the model takes at most 512"),
        (("compare", "{bundle}", "--resolution", "480x832"), "no such engine"),
        (("compare", "{bundle}", "-m", "tiny"), "tiny is a preset"),
        (("compare", "{bundle}", "--outputs", "{text}"), "pass the file of these calls too"),
        (("compare", "{bundle}", "--inputs", "{tmp}/no"), "cannot read"),
        (("compare", "{bundle}", "--calls", "{text}"), "loop go to --inputs"),
        (("inspect", "{tmp}"), "is no bundle"),
        (("lint", "{text}"), "name a bundle, an .onnx or a .pt2 file"),
        (("lint", "{tmp}"), "is no bundle"),
        (("run", "{bundle}", "--text", "{text}", "-o", "{tmp}/y.gif"), "a .safetensors file"),
        (("run", "{bundle}", "--text", "{text}", "-o", "{tmp}"), "a .safetensors file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_two(
    arguments: tuple[str, ...],
    message: str,
    tiny_bundle: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    files = {"tmp": tmp_path, "bundle": tiny_bundle, "text": text}
    for name, rows in (("nan", 9), ("long", 513)):
        files[name] = tmp_path / f"{name}.safetensors"
        array = np.ones((rows, 4096), np.float32)
        array[0, 0] = np.nan if name == "nan" else 1
        save_arrays(files[name], {"text": array, "negative": array})
    before = sorted(tmp_path.iterdir())
    filled = [argument.format(**files) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["wanexport", *filled])
    with pytest.raises(SystemExit) as caught:
        main()
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wanexport.exporter.sets.convert.write_weights", full)
    options = ["--random-weights", "0", "--resolution", "64x96", "--frames", "9"]
    argv = ["wanexport", "build", "-m", "tiny", *options, "-o", str(tmp_path / "b")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.slow  # test_disk_faults has full disks
def test_a_disk_that_fills_leaves_nothing(tmp_path: Path) -> None:
    limit = f"ulimit -f 4096; exec {sys.executable} -m wanexport.exporter.cli.main"  # 4 MiB a file
    command = " ".join(map(str, (limit, *BUILD, *TINY, "-o", tmp_path / "b")))
    child = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert child.returncode == 2
    assert child.stderr.startswith("error: ")
    assert child.stderr.count("\n") == 1
    assert "File too large" in child.stderr
    assert not (tmp_path / "b").exists()


def test_a_disk_too_small_is_refused_before_the_work(tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**7)
    with patch("wanexport.exporter.sets.convert.shutil.disk_usage", return_value=usage):
        result = invoke(*BUILD, *TINY, "-o", tmp_path / "b")
    assert isinstance(result.exception, WanExportError)
    assert "needs 0.02 GB for weights, its disk has 0.01 GB free" in str(result.exception)
    assert not (tmp_path / "b").exists()


def test_control_c_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wanexport.exporter.cli.main", *BUILD, *TINY]
    child = subprocess.Popen(
        [*command, "-o", str(tmp_path / "b")], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "b" / "engines").exists():  # the weights are finished by then
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate()
    # Either is 130 to a shell: Python kills itself where the interrupt came inside an exec.
    assert child.returncode in (130, -signal.SIGINT)
    assert error.strip() == "interrupted: run the same command again to go on"
    files = {p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*.*")}
    assert files == {"weights/fp32/denoiser.safetensors", "manifest.partial.json", ".lock"}


@pytest.mark.parametrize(
    ("command", "line"),
    [("build", "interrupted: run the same command again to go on"), ("compare", "interrupted")],
)
def test_only_a_command_that_resumes_says_so_when_it_is_interrupted(
    command: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def press(**_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "argv", ["wanexport", command])
    monkeypatch.setattr("wanexport.exporter.cli.main.cli", press)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (caught.value.code, capsys.readouterr().err) == (130, line + "\n")


def test_a_result_that_is_not_finite_is_not_written(bundle: Path, text: Path) -> None:
    faults.alter_weight(bundle, "head.head.bias", lambda array: array.fill(np.nan))
    output = bundle / "y.safetensors"
    result = invoke("run", bundle, "--dtype", "fp32", "--text", text, "-o", output, "--steps", 3)
    assert isinstance(result.exception, WanExportError)
    assert "gave NaN or Inf in step 0" in str(result.exception)
    assert not output.exists()


def test_lint_lists_what_it_finds(tiny_bundle: Path, tmp_path: Path) -> None:
    result = invoke("lint", tiny_bundle)
    assert result.exit_code == 0, result.output
    assert result.output.count(": clean") == 3
    nodes = [helper.make_node("NonZero", ["x"], [f"y{i}"], name=f"node{i}") for i in range(7)]
    x = helper.make_tensor_value_info("x", 1, [4])
    outputs = [helper.make_tensor_value_info(f"y{i}", 7, [1, 4]) for i in range(7)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], outputs)), tmp_path / "g.onnx")
    result = invoke("lint", tmp_path / "g.onnx")
    assert result.exit_code == 1
    assert "host_sync 7: node0 (NonZero)" in result.output
    assert "node5" not in result.output
    counts = json.loads(invoke("lint", tmp_path / "g.onnx", "--json").stdout)["graphs"]["g.onnx"]
    assert counts["counts"]["host_sync"] == len(counts["findings"]) == 7


def test_inspect_describes_and_verifies(bundle: Path) -> None:
    result = invoke("inspect", bundle, "--verify")
    assert result.exit_code == 0, result.output
    assert "engine 64x96x9/onnx-fp32: 72 tokens" in result.output
    assert "every hash verified" in result.output
    assert json.loads(invoke("inspect", bundle, "--json").stdout)["problems"] == []
    path = bundle / "weights" / "fp32" / "denoiser.safetensors"
    path.unlink()
    (bundle / "engines/64x96x9/onnx-fp32/denoiser.onnx").write_bytes(b"")
    for option in ("--verify", "--json"):
        result = invoke("inspect", bundle, option)
        assert result.exit_code == 1
        assert [line[:7] for line in result.stderr.splitlines()] == ["error: "] * 2
        assert f"{path} is missing" in result.stderr
    assert len(json.loads(result.stdout)["problems"]) == 2


def test_doctor_says_what_works_and_fails_when_nothing_does() -> None:
    requirements = ["numpy>=1.26", 'onnxruntime>=1.27; extra == "cpu"']
    with patch("wanexport.exporter.doctor.requires", return_value=requirements):
        result = invoke("doctor")
        assert result.exit_code == 0, result.output
        assert "run on a CPU: yes" in result.output
        requirements.append('no-such-library>=3; extra == "cpu"')
        result = invoke("doctor")
    assert result.exit_code == 1
    assert "-m pip install 'no-such-library>=3'" in result.output


def test_help_names_every_command() -> None:
    result = invoke("--help")
    names = ("build", "run", "compare", "bench", "lint", "inspect", "doctor")
    assert all(name in result.output for name in names)
    assert "wanexport, version" in invoke("--version").output
