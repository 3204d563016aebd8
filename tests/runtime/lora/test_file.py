"""What is no LoRA file at all, or changes while it is in use, is refused."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.runtime.lora.tiny import FFN, SHAPES, base, pair, write
from wanexport.runtime.errors import BundleError, WanExportError
from wanexport.runtime.lora.merge import LoraStack

GOOD = pair(FFN)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04" + b"x" * 100, b"\x10\0\0\0\0\0\0\0{}", b"<html>" * 10]
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"is not a safetensors file|has a header of"):
        LoraStack([(file, 1)], SHAPES)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read .*no\.safetensors"):
        LoraStack([(tmp_path / "no.safetensors", 1)], SHAPES)


@pytest.mark.parametrize("how", ["rewritten", "replaced", "removed"])
def test_a_file_that_changes_after_it_was_opened_is_refused(how: str, tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    lora = LoraStack([(file, 1)], SHAPES)
    if how == "replaced":
        save_file(GOOD, tmp_path / "other")
        (tmp_path / "other").replace(file)
    elif how == "rewritten":
        file.write_bytes(file.read_bytes() + b"x")
    else:
        file.unlink()
    for call in (lambda: lora.merge(f"{FFN}.weight", base(f"{FFN}.weight")), lora.describe):
        with pytest.raises(WanExportError, match=r"was changed since|cannot read"):
            call()
