"""A bundle is read and run where Python lacks what Windows lacks: in a child of a stand-in for it.

TensorRT for RTX is for GeForce cards, most of which are in machines with Windows.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.windows import AVAILABLE, SWAP, TOTAL, Kernel32
from wanexport.runtime import load, sample
from wanexport.runtime.bundle.path import check_path
from wanexport.runtime.machine.windows import windows_memory

ROOT = Path(__file__).parents[2]


def run_on_windows(code: str, *arguments: object, libraries: Sequence[str] = ("numpy",)) -> None:
    begin = f"from tests.runtime.windows import *\nbecome_windows(*{libraries!r})\nimport os\n"
    child = subprocess.run(
        [sys.executable, "-c", begin + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert child.returncode == 0, child.stderr[-3000:]


def test_the_stand_in_lacks_what_windows_lacks() -> None:
    run_on_windows(
        "from pathlib import Path\n"
        "import pytest, tempfile\n"
        "for module in MODULES:\n"
        "    with pytest.raises(ImportError): __import__(module)\n"
        "assert not set(NAMES) & set(dir(os)) and {'O_NOFOLLOW', 'preadv', 'getuid'} < set(NAMES)\n"
        "assert not Path('/proc/self').exists() and not os.path.exists('/proc/meminfo')\n"
        "with pytest.raises(FileNotFoundError): Path('/proc/self/status').read_text()\n"
        "with tempfile.NamedTemporaryFile(delete=False) as file:\n"
        "    with pytest.raises(PermissionError): Path(file.name).replace(file.name + '2')\n"
        "Path(file.name).replace(file.name + '2').unlink()\n"
    )


EVERY_MODULE = """
import importlib, pkgutil, sys
import wanexport.runtime as runtime
assert sorted(runtime.__all__) == sorted(name for name in runtime.__all__ if getattr(runtime, name))
import wanexport.runtime.load
for found in pkgutil.walk_packages(runtime.__path__, "wanexport.runtime."):
    importlib.import_module(found.name)
"""


@pytest.mark.slow
def test_every_module_of_the_runtime_imports() -> None:
    run_on_windows(EVERY_MODULE, libraries=("numpy", "torch", "diffusers"))


RUN = """
import sys
from pathlib import Path
import numpy as np
from wanexport.runtime import Pipeline, load, sample
from wanexport.runtime.bundle.manifest import read_manifest
bundle, folder = map(Path, sys.argv[1:])
assert {engine.dtype for engine in read_manifest(bundle).engines} == {"fp32", "fp16", "bf16"}
denoiser = load(str(bundle), dtype="fp32", backend="onnx")
noise = np.random.default_rng(0).standard_normal(denoiser.inputs["latent"].shape, np.float32)
text = np.ones((7, 4096), np.float32)
*_, last = sample(denoiser, noise=noise, text=text, steps=2, guidance=1)
np.save(folder / "latent.npy", last.latent)
with Pipeline(bundle, text_encoder=lambda texts: [text], dtype="fp32") as pipeline:
    assert np.isfinite(pipeline.generate("one", steps=1, guidance=1, decode=False).latent).all()
"""


def test_an_onnx_engine_gives_what_it_gives_here(tiny_bundle: Path, tmp_path: Path) -> None:
    run_on_windows(RUN, tiny_bundle, tmp_path, libraries=("numpy", "onnxruntime"))
    denoiser = load(tiny_bundle, dtype="fp32", backend="onnx")
    noise = np.random.default_rng(0).standard_normal(denoiser.inputs["latent"].shape, np.float32)
    text = np.ones((7, 4096), np.float32)
    *_, last = sample(denoiser, noise=noise, text=text, steps=2, guidance=1)
    np.testing.assert_array_equal(np.load(tmp_path / "latent.npy"), last.latent)


WEIGHTS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, torch
from wanexport.runtime.bundle.check import check_weights
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.regular_file import read_into
from wanexport.runtime.bundle.tensorfile import load_arrays, read_header
from wanexport.runtime.engines.device_weights import DeviceWeights
from wanexport.runtime.parts.torch_checkpoint import read_state_dict
bundle, folder = map(Path, sys.argv[1:])
torch.save({"a": torch.ones(3)}, folder / "a.pth")
assert read_state_dict(folder / "a.pth")["a"].sum() == 3
record = read_manifest(bundle).weights["fp32"]
pinned = check_weights(bundle, record)
whole, arrays = pinned.path.read_bytes(), load_arrays(pinned.path)
weights = DeviceWeights(pinned, torch.device("cpu"))
for name, entry in read_header(pinned.path).items():
    raw = whole[entry.offset : entry.offset + entry.size]
    assert arrays[name].tobytes() == raw == weights.tensors[name].numpy().tobytes()
with pinned.opened() as descriptor:
    assert read_header(descriptor) == read_header(pinned.path)
    os.lseek(descriptor, 5, os.SEEK_SET)
    def read(start):
        buffer = bytearray(1000)
        count = read_into(descriptor, memoryview(buffer), start)
        return bytes(buffer[:count]) == whole[start : start + 1000]
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(0, len(whole) + 1000, 997)))
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 5
"""


@pytest.mark.slow
def test_weights_are_read_whole_by_any_number_of_threads(tiny_bundle: Path, tmp_path: Path) -> None:
    run_on_windows(WEIGHTS, tiny_bundle, tmp_path, libraries=("numpy", "torch"))


WRITE = """
import sys
from pathlib import Path
import numpy as np
from wanexport.runtime import write_video
from wanexport.runtime.bundle.durable import remove_partials, write_durably
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays
from wanexport.runtime.engines.cache_folder import cache_folder
from wanexport.runtime.engines.processor import level_here, runs_here
from wanexport.runtime.machine import memory
from wanexport.runtime.machine.temporary import check_temporary_folder
folder = Path(sys.argv[1])
write_durably(folder / "kernels", b"old")
write_durably(folder / "kernels", b"new")
assert (folder / "kernels").read_bytes() == b"new"
save_arrays(folder / "latent.safetensors", {"latent": np.ones(3, np.float32)})
assert load_arrays(folder / "latent.safetensors")["latent"].sum() == 3
write_video(folder / "clip.mp4", np.zeros((5, 32, 32, 3), np.uint8), 16)
remove_partials(folder)
assert sorted(os.listdir(folder)) == ["clip.mp4", "kernels", "latent.safetensors"]
assert cache_folder().is_dir()
assert level_here() == "" and not runs_here("x86-64-v3")
assert (memory.physical_bytes(), memory.available_bytes()) == (TOTAL, AVAILABLE)
assert (memory.limit_bytes(), memory.peak_rss()) == (TOTAL + SWAP, 0)
os.makedirs(folder / "temporary" / "wanexport-mine")
os.environ["TMPDIR"] = str(folder / "temporary")
check_temporary_folder(runs_code=True)
"""


def test_files_are_written_and_memory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    run_on_windows(WRITE, tmp_path / "files", libraries=("numpy", "av", "platformdirs"))


def test_memory_that_windows_does_not_tell_is_an_error() -> None:
    assert windows_memory(Kernel32()) == {
        "MemTotal": TOTAL,
        "MemAvailable": AVAILABLE,
        "SwapTotal": SWAP,
    }
    with pytest.raises(OSError, match="GlobalMemoryStatusEx"):
        windows_memory(Kernel32(answers=0))


@pytest.mark.parametrize("path", ["C:/x", "C:x", "weights/a:b", r"weights\a", "weights/a::$DATA"])
def test_a_path_that_windows_would_read_otherwise_is_none_of_a_bundle(path: str) -> None:
    with pytest.raises(ValueError, match="no path of a file in the bundle"):
        check_path(path)
    check_path("weights/fp32/denoiser.safetensors")


def test_this_process_is_not_changed() -> None:
    assert hasattr(os, "preadv") and Path("/proc/self/status").exists()
