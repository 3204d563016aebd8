"""Every sample runs as its docstring says."""

import subprocess
import sys
from pathlib import Path

import pytest

from wanexport.runtime.tensorfile import load_arrays

SAMPLES = Path(__file__).parent.parent / "samples"
ARGUMENTS = {"01_text_embeddings.py": "text.safetensors"}  # the others take a folder
LAST_WORDS = {"02_build_and_sample.py": "step 3", "03_compare_recorded.py": "passed"}


@pytest.mark.parametrize("name", sorted(path.name for path in SAMPLES.glob("*.py")))
def test_the_sample_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / name), ARGUMENTS.get(name, ".")]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    if name in LAST_WORDS:
        assert child.stdout.splitlines()[-1].startswith(LAST_WORDS[name])
    else:
        assert load_arrays(tmp_path / "text.safetensors")["text"].shape == (77, 4096)
