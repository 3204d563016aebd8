"""Official .pth files are mapped, run nothing, and fit the model or are refused in one line."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from torch import nn

from wanexport.runtime.bundle import regular_file
from wanexport.runtime.errors import BundleError, WanExportError
from wanexport.runtime.parts import torch_checkpoint
from wanexport.runtime.parts.torch_checkpoint import (
    load_converted,
    read_state_dict,
    read_stored,
)

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class RunsCode:
    """What unpickling would call a function for."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return Path.write_text, (Path("ran"), "")  # type: ignore[return-value]


def mapped_ranges(path: Path) -> list[range]:
    """The addresses where this process has mapped a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [range(int(begin, 16), int(end, 16)) for begin, end in ends]


def meta_linear() -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(3, 2)


def test_tensors_lie_in_the_mapped_file_until_the_model_computes_with_them(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(TENSORS, path)
    model = load_converted(meta_linear(), read_state_dict(path), path)
    (mapped,) = mapped_ranges(path)
    assert all(parameter.data_ptr() in mapped for parameter in model.parameters())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(torch.ones(1, 3)), torch.tensor([[4.0, 13.0]]))


def test_a_file_of_the_old_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(path)["weight"], TENSORS["weight"])
    stored = read_stored(path)["weight"]
    assert torch.equal(stored.tensor, TENSORS["weight"]) and stored.file is None


def odd_tensors() -> dict[str, torch.Tensor]:
    """Tensors that share a storage, lie amid one, have strides, no values or no rank."""
    whole = torch.arange(24.0).reshape(4, 6)
    return {
        "whole": whole,
        "rows": whole[1:3],
        "columns": whole[:, 2:4],
        "empty": torch.ones(0, 3),
        "number": torch.tensor(7, dtype=torch.int64),
        "half": torch.linspace(-1, 1, 33).half(),
        "b": torch.ones(5).bfloat16(),
        "parameter": nn.Parameter(torch.ones(3)),
    }


def test_each_tensor_lies_where_it_is_said_to(tmp_path: Path) -> None:
    path, tensors = tmp_path / "model.pth", odd_tensors()
    torch.save(tensors, path)
    content = path.read_bytes()
    for name, stored in read_stored(path).items():
        assert torch.equal(stored.tensor, tensors[name]), name
        assert not stored.tensor.requires_grad
        assert (stored.file is not None) == (name != "columns"), name
        if stored.file is not None:
            raw = stored.tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert content[stored.offset : stored.offset + len(raw)] == raw, name


def test_where_the_records_do_not_tell_no_place_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(TENSORS, path)
    with ZipFile(path, "a") as archive:
        archive.writestr("model/data/7", b"of no tensor")
    stored = read_stored(path)
    assert torch.equal(stored["weight"].tensor, TENSORS["weight"])
    assert all(each.file is None for each in stored.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read .*model.pth: No such file"),
        (b"", "no file of torch.save"),
        (b"<html>Not found</html>", "damaged or holds more than tensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "damaged or holds"),
        ([TENSORS], "no state dict: expected tensors by name"),
        ({"state_dict": TENSORS}, "no state dict: expected tensors by name"),
        ({1: torch.ones(1)}, "no state dict: expected tensors by name"),
        (nn.Linear(1, 1), "damaged or holds more than tensors"),
    ],
)
def test_what_is_no_state_dict_is_refused_in_one_line(
    tmp_path: Path, content: Any, message: str
) -> None:
    path = tmp_path / "model.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(BundleError, match=message) as refused:
        read_state_dict(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = {"pipe": tmp_path / "pipe", "folder": tmp_path, "device": Path("/dev/zero")}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(WanExportError, match=rf"{path} is no regular file"):
        read_state_dict(path)


def test_a_packed_file_is_not_unpacked(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "model.pth")
    with ZipFile(tmp_path / "model.pth") as stored, ZipFile(tmp_path / "x", "w") as packed:
        for record in stored.infolist():
            packed.writestr(record.filename, stored.read(record), ZIP_DEFLATED)
    with pytest.raises(BundleError, match=r"no file of torch\.save"):
        read_state_dict(tmp_path / "x")


def test_the_file_that_was_opened_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pth"
    torch.save(TENSORS, path)
    torch.save({"other": torch.ones(1)}, tmp_path / "y")
    opened = regular_file.open_regular

    def replaced_after(path: Path) -> int:
        descriptor = opened(path)
        (tmp_path / "y").replace(path)
        return descriptor

    monkeypatch.setattr(torch_checkpoint, "open_regular", replaced_after)
    assert set(read_state_dict(path)) == set(TENSORS)


def test_a_file_cut_short_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"weight": torch.zeros(10000)}, path)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(BundleError, match="cut short: download it again") as refused:
        read_state_dict(path)
    assert "\n" not in str(refused.value)


def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": RunsCode()}, tmp_path / "model.pth")
    torch.load(tmp_path / "model.pth", weights_only=False)
    assert Path("ran").exists()
    Path("ran").unlink()
    with pytest.raises(BundleError, match="could run code") as refused:
        read_state_dict(tmp_path / "model.pth")
    assert not Path("ran").exists()
    assert "\n" not in str(refused.value)


def test_every_tensor_must_fit_the_model() -> None:
    tensors = {"weight": torch.ones(3, 2), "biased": torch.ones(2)}
    message = "model.pth does not fit Linear: missing bias; unexpected biased; "
    message += r"weight is \[3, 2\], expected \[2, 3\]: download"
    with pytest.raises(BundleError, match=message):
        load_converted(meta_linear(), tensors, Path("model.pth"))
    with pytest.raises(BundleError, match=r"bias is torch.int64, expected float32"):
        load_converted(
            meta_linear(), {**TENSORS, "bias": torch.ones(2, dtype=torch.int64)}, Path("model.pth")
        )


def test_of_many_tensors_that_do_not_fit_four_are_named() -> None:
    tensors = {**TENSORS, **{f"extra{i}": torch.ones(1) for i in range(9)}}
    with pytest.raises(BundleError) as refused:
        load_converted(meta_linear(), tensors, Path("model.pth"))
    assert len(re.findall("unexpected", str(refused.value))) == 4
    assert "and 5 more" in str(refused.value)
