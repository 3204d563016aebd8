"""Every sample runs as its docstring says."""

import subprocess
import sys
from pathlib import Path

import pytest

from wanexport.runtime.tensorfile import load_arrays

SAMPLES = Path(__file__).parent.parent / "samples"
ARGUMENTS = {"01_text_embeddings.py": "text.safetensors", "02_build_and_sample.py": "."}


@pytest.mark.parametrize("name", sorted(path.name for path in SAMPLES.glob("*.py")))
def test_the_sample_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / name), ARGUMENTS[name]]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    if name.startswith("01"):
        assert load_arrays(tmp_path / "text.safetensors")["text"].shape == (77, 4096)
    else:
        assert "step 3" in child.stdout
