"""A second weights set for a bundle, as another version or tool may add one."""

from dataclasses import replace
from pathlib import Path

from wanexport.exporter.bundle.writer import file_record, write_manifest
from wanexport.runtime.bundle.manifest import read_manifest
from wanexport.runtime.bundle.tensorfile import load_arrays, save_arrays


def add_style(bundle: Path) -> None:
    """Add a set `style` in fp32, whose velocity is the base set's with another sign."""
    manifest = read_manifest(bundle)
    base = manifest.weights["fp32"]
    arrays = load_arrays(bundle / base.file.path)
    path = bundle / "weights" / "style-fp32" / "denoiser.safetensors"
    path.parent.mkdir()
    changed = {n: -arrays[n] for n in ("head.head.weight", "head.head.bias")}
    save_arrays(path, arrays | changed)
    style = replace(base, name="style", file=file_record(bundle, path))
    write_manifest(bundle, replace(manifest, weights={**manifest.weights, "style-fp32": style}))
