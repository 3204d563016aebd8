"""What `wanexport run` refuses before any work; the rest is in `test_run`."""

import json
import os
from pathlib import Path

import pytest

from wanexport.exporter.run.request import RunRequest, check_request, sidecar
from wanexport.runtime.errors import WanExportError


def check(output: Path, *, overwrite: bool = False) -> None:
    check_request(RunRequest(output.parent / "bundle", output, prompt="x", overwrite=overwrite))


def write_record(output: Path) -> None:
    sidecar(output).write_text(json.dumps({"command": "wanexport run", "output": str(output)}))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.safetensors"])
def test_an_output_that_exists_is_replaced_only_on_request(name: str, tmp_path: Path) -> None:
    output = tmp_path / name
    check(output)
    output.write_text("the user's")
    with pytest.raises(WanExportError, match=f"{name} exists: name another -o, or add --overwrite"):
        check(output)
    write_record(output)
    check(output, overwrite=True)
    output.unlink()
    with pytest.raises(WanExportError, match=r"json exists: name another -o, or add --overwrite$"):
        check(output)
    output.symlink_to("nowhere")
    with pytest.raises(WanExportError, match=f"{name} exists"):
        check(output)
    assert sorted(tmp_path.iterdir()) == sorted([output, sidecar(output)])


def test_a_clip_and_a_latent_of_one_name_have_a_record_each() -> None:
    assert sidecar(Path("a/clip.mp4")) == Path("a/clip.json")
    assert sidecar(Path("a/clip.safetensors")) == Path("a/clip.safetensors.json")


def test_a_record_of_another_file_is_never_replaced(tmp_path: Path) -> None:
    write_record(tmp_path / "clip.MP4")
    with pytest.raises(WanExportError, match=r"clip.json, .* is the record of clip.MP4: name anot"):
        check(tmp_path / "clip.mp4", overwrite=True)


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", '["command", "output"]', '"command output"', "[" * 10**5, "no json", None],
)
def test_a_file_that_is_no_record_is_never_replaced(content: str | None, tmp_path: Path) -> None:
    if content is None:  # reading a pipe would wait for ever
        os.mkfifo(tmp_path / "clip.json")
    else:
        (tmp_path / "clip.json").write_text(content)
    with pytest.raises(WanExportError, match=r"clip.json, .* is no record of a run: name another"):
        check(tmp_path / "clip.mp4", overwrite=True)


@pytest.mark.parametrize("name", ["weights/fp32/denoiser.safetensors", "engines/x.safetensors"])
def test_an_output_among_the_bundles_files_is_refused(tmp_path: Path, name: str) -> None:
    output = tmp_path / "bundle" / name
    output.parent.mkdir(parents=True)
    output.write_bytes(b"precious")
    request = RunRequest(tmp_path / "bundle", output, prompt="x", overwrite=True)
    with pytest.raises(WanExportError, match="among the bundle's own files: name another -o"):
        check_request(request)
    assert output.read_bytes() == b"precious"
