"""What `run` writes, and what it says when only a part of it could be written."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.exporter.bundle.disk_faults import full_after
from wanexport.exporter.run import run as generate
from wanexport.exporter.run.request import RunRequest, check_request, sidecar
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.errors import WanExportError

LATENT = np.arange(64, dtype=np.float32)


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRequest:
    """A run whose sampling is done."""
    result = SimpleNamespace(latent=LATENT)
    monkeypatch.setattr(generate, "_from_text", lambda *_: result)
    monkeypatch.setattr(generate, "run_record", lambda *_: {"command": "wanexport run"})
    (tmp_path / "out").mkdir()
    return RunRequest(tmp_path, tmp_path / "out" / "x.safetensors", text_file=tmp_path / "text")


def run(request: RunRequest) -> None:
    generate.run(request, show=lambda *_: None, tell=lambda _: None)


def test_a_record_that_finds_no_room_does_not_hide_the_result(request_: RunRequest) -> None:
    save_arrays(request_.bundle / "same", {"latent": LATENT})
    room = (request_.bundle / "same").stat().st_size
    with full_after(room), pytest.raises(WanExportError) as caught:
        run(request_)
    output, record = request_.output, sidecar(request_.output)
    assert str(caught.value).startswith(f"{output} is written, but not its record: {record}")
    assert "No space left on device: free space" in str(caught.value)
    assert os.listdir(request_.output.parent) == ["x.safetensors"]
    assert (load_arrays(request_.output)["latent"] == LATENT).all()


def test_a_result_that_finds_no_room_is_named(request_: RunRequest) -> None:
    with full_after(100), pytest.raises(OSError, match="No space left") as caught:
        run(request_)
    assert caught.value.filename == str(request_.output)
    assert not os.listdir(request_.output.parent)


def test_an_output_that_is_a_link_is_replaced_and_its_target_left(request_: RunRequest) -> None:
    folder = request_.output.parent
    precious = '{"command": "precious", "output": "x.safetensors"}'
    names = ("x.safetensors", "x.safetensors.json")
    for name in names:
        (folder.parent / name).write_text(precious)
        (folder / name).symlink_to(folder.parent / name)
    run(replace(request_, overwrite=True))
    assert (load_arrays(request_.output)["latent"] == LATENT).all()
    assert json.loads((folder / names[1]).read_text()) == {"command": "wanexport run"}
    for name in names:
        assert (folder.parent / name).read_text() == precious
        assert not (folder / name).is_symlink()


def test_an_output_of_the_longest_name_is_taken(request_: RunRequest) -> None:
    output = request_.output.with_name("x" * 238 + ".safetensors")
    check_request(RunRequest(request_.bundle, output, text_file=request_.text_file))
    assert not os.listdir(output.parent)
    with pytest.raises(WanExportError, match=r"cannot write .*File name too long"):
        check_request(RunRequest(request_.bundle, output.with_name("x" * 239 + ".safetensors"),
                                 text_file=request_.text_file))  # fmt: skip


def test_a_pipe_where_the_record_goes_is_refused_and_not_waited_for(request_: RunRequest) -> None:
    os.mkfifo(sidecar(request_.output))
    with pytest.raises(WanExportError, match="is no record of a run: name another -o"):
        check_request(request_)
