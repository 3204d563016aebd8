"""`wanexport build`: weights, then each engine with its proof, then the manifest.

Nothing counts until the manifest lists it. What is finished before that is noted in a journal of the
manifest's own form, so that a build that was killed resumes with the finished parts.
"""

import hashlib
import inspect
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir

from wanexport.exporter import to_onnx, trace
from wanexport.exporter.eager import cut_to_ends, tensors_of_cut
from wanexport.exporter.model_source import ModelSource, resolve
from wanexport.exporter.proof import MAX_TOKENS, Job, run_in_fresh_process
from wanexport.graphs import config as graph_config
from wanexport.graphs import lint, model, rope
from wanexport.graphs.checkpoint import (
    DTYPES,
    CheckpointWeights,
    SourceTensor,
    weights_layout,
    write_weights,
)
from wanexport.graphs.config import WanConfig, sampling_defaults
from wanexport.runtime import attention, onnx_engine
from wanexport.runtime.errors import WanExportError
from wanexport.runtime.geometry import Geometry, parse_resolution
from wanexport.runtime.load import RUNNABLE_DTYPES, WEIGHTS_FILE
from wanexport.runtime.manifest import (
    MANIFEST,
    EngineRecord,
    FileRecord,
    Manifest,
    TensorSpec,
    WeightsRecord,
    bundle_lock,
    check_engine_file,
    check_weights,
    file_record,
    read_manifest,
    write_durably,
    write_manifest,
)
from wanexport.runtime.tensorfile import TensorEntry, header_sha256

BACKENDS = ("onnx",)
JOURNAL = "manifest.partial.json"
_ARTEFACTS = ("weights", "engines")
_GRAPH_CODE = (graph_config, model, rope, lint, attention, trace, to_onnx)
_GRAPH_LIBRARIES = ("torch", "onnx", "onnx-ir", "onnxscript")

Progress = Callable[[str, int, int], None]  # stage, done, total (0 when the length is unknown)


def build(
    model: str | None = None,
    *,
    resolution: str,
    frames: int,
    output: str | Path | None = None,
    backends: Sequence[str] = BACKENDS,
    dtype: str = "fp32",
    random_weights: int | None = None,
    verify: str = "ends",
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Build a bundle, or add to one, and return the record of what was done.

    model is a folder, a hub id, or with random_weights (a seed) a preset; resolution is `480x832` or
    `832*480`; dtype is fp32, bf16 or fp16; output defaults to ./<model>; verify is `ends` (the proof
    runs the first and last block) or `full` (all of them).
    Raises WanExportError for whatever the caller can put right.
    """
    started = time.monotonic()
    height, width = parse_resolution(resolution)
    progress("checkpoint", 0, 0)
    source = resolve(model, random_weights)
    geometry = Geometry(height, width, frames, source.config.spatial_stride)
    bundle = Path(output) if output is not None else Path(source.name)
    with _open_bundle(bundle, source) as work:
        work.add_weights(source, dtype, progress)
        engines = [
            work.add_engine(source, geometry, backend, dtype, verify, progress)
            for backend in backends
        ]
        work.commit()
    return {
        "bundle": str(bundle),
        "model": work.manifest.model,
        "geometry": geometry.name,
        "tokens": geometry.num_tokens,
        "weights": {
            name: asdict(w.file) for name, w in work.manifest.weights.items() if w.dtype == dtype
        },
        "engines": [{"name": engine.name, **asdict(engine)} for engine in engines],
        "reused": work.reused,
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_bytes": peak_rss(),
    }


def peak_rss() -> int:
    """Largest resident memory of this process and of any finished child, in bytes."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) * 1024


@contextmanager
def _open_bundle(bundle: Path, source: ModelSource) -> Iterator["_Work"]:
    """Lock the bundle; when the build fails with nothing finished, leave no trace of it."""
    is_new = not bundle.exists()
    if not is_new and not bundle.is_dir():
        raise WanExportError(f"{bundle} is a file: name a folder with -o")
    marks = {MANIFEST, JOURNAL, ".lock"}
    if not is_new and any(bundle.iterdir()) and not any((bundle / m).exists() for m in marks):
        raise WanExportError(f"{bundle} exists and is no bundle: name another folder with -o")
    bundle.mkdir(parents=True, exist_ok=True)
    with bundle_lock(bundle):
        work = _Work(bundle, source)
        try:
            yield work
        except BaseException:
            if is_new and not work.has_finished_parts():
                shutil.rmtree(bundle)
            raise


class _Work:
    """A bundle being added to: the manifest as it will be, and what the last try left finished."""

    def __init__(self, bundle: Path, source: ModelSource) -> None:
        self.bundle = bundle
        empty = Manifest(
            model=source.name,
            config=asdict(source.config),
            experts=source.experts,
            weights={},
            engines=(),
            wanexport=version("wanexport"),
        )
        self.committed = self._read(MANIFEST) or empty
        self.journal = self._read(JOURNAL) or empty
        self.manifest = self.committed
        self.reused: list[str] = []
        for found in (self.committed, self.journal):
            if (found.config, found.experts) != (empty.config, empty.experts):
                raise WanExportError(
                    f"{bundle} holds {found.model}, not a {source.name} of this size: "
                    f"name another folder with -o"
                )
        self._sweep()

    def _read(self, name: str) -> Manifest | None:
        return read_manifest(self.bundle, name) if (self.bundle / name).exists() else None

    def has_finished_parts(self) -> bool:
        """Whether a manifest or a journal lists anything."""
        return (self.bundle / MANIFEST).exists() or (self.bundle / JOURNAL).exists()

    def add_weights(self, source: ModelSource, dtype: str, progress: Progress) -> None:
        """Convert each expert's checkpoint unless the bundle holds its conversion."""
        for expert, weights in source.weights.items():
            name = f"{expert}-{dtype}" if expert else dtype
            known = self._known_weights(name)
            record = None
            if known:
                progress(f"weights {name}: checking", 0, 0)
                key = _key(weights.digest(), dtype, asdict(source.config))
                record = next((w for w in known if w.key == key and self._is_whole(w)), None)
            if record:
                self.reused.append(f"weights {name}")
            else:
                record = self._convert(source, expert, name, dtype, progress)
            self.manifest = replace(self.manifest, weights={**self.manifest.weights, name: record})
            self._note()

    def _known_weights(self, name: str) -> list[WeightsRecord]:
        found = (m.weights.get(name) for m in (self.committed, self.journal))
        return [record for record in found if record]

    def _is_whole(self, record: WeightsRecord) -> bool:
        try:
            check_weights(self.bundle, record)
        except WanExportError:
            return False
        return True

    def _convert(
        self, source: ModelSource, expert: str, name: str, dtype: str, progress: Progress
    ) -> WeightsRecord:
        weights, config = source.weights[expert], source.config
        path = self._free_folder(Path("weights") / name) / WEIGHTS_FILE
        digest = write_weights(
            path,
            config,
            dtype,
            weights,
            lambda done, total: progress(f"weights {name}", done, total),
        )
        relative = path.relative_to(self.bundle).as_posix()
        return WeightsRecord(
            dtype=dtype,
            expert=expert,
            file=FileRecord(relative, path.stat().st_size, digest),
            header_sha256=header_sha256(path),
            key=_key(weights.digest(), dtype, asdict(config)),
            source=source.record,
        )

    def add_engine(
        self,
        source: ModelSource,
        geometry: Geometry,
        backend: str,
        dtype: str,
        verify: str,
        progress: Progress,
    ) -> EngineRecord:
        """Compile and prove one engine unless the bundle holds it."""
        key = engine_key(source.config, geometry, backend, dtype, verify)
        engine = self._reusable_engine(key)
        if engine:
            self.reused.append(f"engine {engine.name}")
        else:
            engine = self._compile(source, geometry, backend, dtype, verify, key, progress)
        others = [e for e in self.manifest.engines if e.name != engine.name]
        self.manifest = replace(self.manifest, engines=(*others, engine))
        self._note()
        return engine

    def _reusable_engine(self, key: str) -> EngineRecord | None:
        for engine in (*self.committed.engines, *self.journal.engines):
            if engine.key == key:
                try:
                    for file in engine.files.values():
                        check_engine_file(self.bundle, file)
                except WanExportError:
                    continue
                return engine
        return None

    def _compile(
        self,
        source: ModelSource,
        geometry: Geometry,
        backend: str,
        dtype: str,
        verify: str,
        key: str,
        progress: Progress,
    ) -> EngineRecord:
        started = time.monotonic()
        config = source.config
        folder = self._free_folder(Path("engines") / geometry.name / f"{backend}-{dtype}")
        path = folder / "denoiser.onnx"
        header, entries = weights_layout(config, dtype)
        progress(f"{backend}-{dtype}: tracing and lowering", 0, 0)
        graph, counts = lower(config, geometry, dtype, entries)
        write_durably(path, onnx_ir.to_proto(graph).SerializeToString())
        compiled = time.monotonic()
        progress(f"{backend}-{dtype}: proving in a fresh process", 0, 0)
        proof = self._prove(config, geometry, dtype, verify, path, entries)
        return EngineRecord(
            backend=backend,
            dtype=dtype,
            geometry=geometry,
            inputs={n: TensorSpec(s) for n, s in model.input_shapes(config, geometry).items()},
            output=TensorSpec(model.input_shapes(config, geometry)["latent"]),
            sampling=_sampling(source, geometry),
            files={"denoiser": file_record(self.bundle, path)},
            weights_header_sha256=hashlib.sha256(header).hexdigest(),
            key=key,
            target=onnx_engine.versions(),
            build={
                "seconds": round(compiled - started, 2),
                "proof_seconds": round(time.monotonic() - compiled, 2),
                "nodes": dict(sorted(to_onnx.node_counts(graph).items())),
                "flops_per_forward": model.forward_flops(config, geometry),
                **{library: version(library) for library in _GRAPH_LIBRARIES},
            },
            lint=counts,
            proof=proof,
        )

    def _prove(
        self,
        config: WanConfig,
        geometry: Geometry,
        dtype: str,
        verify: str,
        engine: Path,
        entries: dict[str, TensorEntry],
    ) -> dict[str, Any]:
        """Lower the cut and hand it to a fresh process, with each expert's weights."""
        cut = cut_to_ends(config) if verify == "ends" else config
        small = geometry.reduced(MAX_TOKENS)
        tensors = tensors_of_cut(list(model.parameter_shapes(cut)), config)
        runs_here = dtype in RUNNABLE_DTYPES
        files = {
            w.expert: self.bundle / w.file.path
            for w in self.manifest.weights.values()
            if w.dtype == dtype
        }
        with tempfile.TemporaryDirectory(prefix="wanexport-proof-") as name:
            folder = Path(name)
            if runs_here:
                placed = {cut_name: entries[full_name] for cut_name, full_name in tensors.items()}
            else:
                placed = weights_layout(cut, "fp32")[1]
                for expert, file in files.items():
                    _write_twin(folder / (expert or "twin"), cut, file, entries, tensors)
            graph, _ = lower(cut, small, dtype if runs_here else "fp32", placed)
            (folder / "cut.onnx").write_bytes(onnx_ir.to_proto(graph).SerializeToString())
            job = Job(
                engine=str(engine.resolve()),
                engine_runs_here=runs_here,
                cut=str(folder / "cut.onnx"),
                dtype=dtype,
                config=asdict(cut),
                geometry=asdict(small),
                weights={expert: str(file.resolve().parent) for expert, file in files.items()},
                tensors=tensors,
            )
            return run_in_fresh_process(job, folder)

    def _free_folder(self, relative: Path) -> Path:
        """Create the folder of this name, or a numbered one where the committed manifest uses it."""
        used = {str(Path(file.path).parent) for file in self.committed.files()}
        used |= {str(Path(file.path).parent) for file in self.manifest.files()}
        candidate, number = relative, 2
        while str(candidate) in used:
            candidate, number = relative.with_name(f"{relative.name}.{number}"), number + 1
        folder = self.bundle / candidate
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _note(self) -> None:
        """Journal what is finished, for a rerun after a kill."""
        write_manifest(self.bundle, self.manifest, JOURNAL)

    def commit(self) -> None:
        """Make the new manifest the bundle's, and remove what it does not list."""
        write_manifest(self.bundle, self.manifest)
        (self.bundle / JOURNAL).unlink()
        self.committed = self.journal = self.manifest
        self._sweep()

    def _sweep(self) -> None:
        """Remove artefacts that neither the manifest nor the journal lists."""
        listed = {file.path for m in (self.committed, self.journal) for file in m.files()}
        for folder in _ARTEFACTS:
            paths = sorted((self.bundle / folder).rglob("*"), reverse=True)
            for path in paths:
                if path.is_dir():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.bundle).as_posix() not in listed:
                    path.unlink()


def lower(
    config: WanConfig, geometry: Geometry, dtype: str, weights: dict[str, TensorEntry]
) -> tuple[onnx_ir.Model, dict[str, int]]:
    """Trace, lint and translate the graph; return it with the lint counts.

    Raises RuntimeError when the graph is not clean or lost an attention operator: a fault of ours.
    """
    program = trace.trace(config, geometry, DTYPES[dtype])
    counts = lint.lint_program(program)
    graph = to_onnx.to_onnx(program, weights)
    expected = model.attention_count(config)
    found = to_onnx.node_counts(graph)["Attention"]
    if any(counts.values()) or found != expected:
        raise RuntimeError(f"unclean graph: {counts}, {found} Attention nodes of {expected}")
    return graph, counts


def engine_key(config: WanConfig, geometry: Geometry, backend: str, dtype: str, verify: str) -> str:
    """Hash of all that decides an engine's bytes and proof; the weights are not among it."""
    code = [inspect.getsource(module) for module in _GRAPH_CODE]
    libraries = {name: version(name) for name in _GRAPH_LIBRARIES}
    return _key(asdict(config), asdict(geometry), backend, dtype, verify, code, libraries)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sampling(source: ModelSource, geometry: Geometry) -> Any:
    defaults = sampling_defaults(source.config, source.experts, geometry)
    return defaults if source.boundary is None else replace(defaults, boundary=source.boundary)


def _write_twin(
    folder: Path,
    cut: WanConfig,
    file: Path,
    entries: dict[str, TensorEntry],
    tensors: dict[str, str],
) -> None:
    """Write the cut's weights widened to fp32."""
    folder.mkdir()
    source = CheckpointWeights({n: SourceTensor(file, entries[t]) for n, t in tensors.items()})
    write_weights(folder / WEIGHTS_FILE, cut, "fp32", source)
