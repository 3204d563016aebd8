"""What is no LoRA file at all, or changes while it is in use, is refused; opening is cheap."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


OPENING = """
import sys
from pathlib import Path
from wanexport.runtime.lora.merge import LoraStack
LoraStack([(Path(sys.argv[1]), 1.0)], {"blocks.0.self_attn.q.weight": (8, 8)})
print("sympy" in sys.modules)
"""


def test_opening_a_lora_imports_no_compiler(tmp_path: Path) -> None:
    """PyTorch's operators on the meta device import sympy, which takes seconds."""
    layer = "blocks.0.self_attn.q"
    tensors = {
        f"{layer}.lora_down.weight": torch.ones(2, 8),
        f"{layer}.lora_up.weight": torch.ones(8, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", OPENING, str(tmp_path / "x.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"
