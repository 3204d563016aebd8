"""A bundle with a VAE engine whose packages are text, and what runs in the place of packages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles.small_vae import official_file
from tests.runtime.bundle.small_bundle import GEOMETRY, small_bundle
from wanexport.exporter.backends.aoti import backend as aoti_backend
from wanexport.exporter.backends.backend import Compiled, Request, VaeRequest
from wanexport.exporter.backends.order import BuildOptions
from wanexport.exporter.build import add_engine
from wanexport.exporter.bundle.writer import BundleWriter, open_bundle
from wanexport.exporter.sets.vae import OrderedVae, add_vae_weights, order_vae
from wanexport.graphs.graph import empty_graph
from wanexport.runtime.bundle.details import VaeDetails
from wanexport.runtime.bundle.manifest import Manifest, read_manifest
from wanexport.runtime.engines.device import zero_state
from wanexport.runtime.engines.vae_clip import Clip
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import Call
from wanexport.runtime.vae_config import VaeConfig
from wanexport.runtime.wan_vae import GRAPH, parameter_shapes

PROOF = {"method": "x", "blocks": 4, "tokens": 6, "error": 1e-6, "gate": 1e-5}


def asked_for(**options: Any) -> BuildOptions:
    """A build of the small bundle's size."""
    return BuildOptions(resolution="64x96", frames=9, device="cpu", **options)


def small_request(manifest: Manifest) -> Request:
    """That of the small bundle's engine."""
    (engine, *_) = manifest.engines
    return Request(
        manifest.config, GEOMETRY, engine.sampling, "onnx", "fp32", "cpu", dict(engine.target)
    )


def stub_compiler(monkeypatch: pytest.MonkeyPatch) -> list[VaeRequest]:
    """Write text for packages, and prove nothing; the requests that were compiled."""
    compiled: list[VaeRequest] = []

    def compile_vae(folder: Path, request: VaeRequest, progress: Any) -> Compiled:
        compiled.append(request)
        files = {call.name: folder / f"{call.name}.pt2" for call in request.program.calls}
        for name, path in files.items():
            path.write_text(f"the {name} of a VAE")
        return Compiled(files, request.program, VaeDetails(request.vae, {"frame": "sdpa"}), {})

    monkeypatch.setattr(aoti_backend, "compile_vae", compile_vae)
    monkeypatch.setattr(aoti_backend, "prove_vae", lambda *_: {**PROOF, "verify": "ends"})
    return compiled


def add_vae(bundle: Path, vae: Path, **options: Any) -> list[str]:
    """Do of a build what adds the VAE; return what was reused."""
    manifest = read_manifest(bundle)
    asked = asked_for(vae=vae, **options)
    ordered = order_vae(small_request(manifest), {}, asked)
    assert ordered is not None
    with open_bundle(bundle, manifest) as writer:
        reused = put_vae(writer, ordered)
        writer.commit()
    return reused


def put_vae(writer: BundleWriter, ordered: OrderedVae) -> list[str]:
    """Its weights and its engine."""
    reused = add_vae_weights(writer, ordered, lambda *_: None)
    return reused + add_engine(writer, ordered.request, "ends", lambda *_: None)


def vae_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """A bundle with an ONNX engine and a VAE engine for it, and VAE.pth beside it."""
    stub_compiler(monkeypatch)
    bundle = small_bundle(folder / "bundle")
    add_vae(bundle, official_file("Wan2.1", folder), **options)
    return bundle


class EagerRegions:
    """In the place of VaeRegions: the graph in eager PyTorch, with the file's weights."""

    def __init__(
        self,
        files: Mapping[str, Any],
        sizes: VaeConfig,
        geometry: Geometry,
        dtype: str,
        part: str,
        kernels: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.graph = empty_graph(GRAPH, sizes, geometry, torch.float32)
        self.sizes, self.part = sizes, part

    def bind(self, tensors: Mapping[str, Tensor]) -> "EagerRegions":
        """The same with weights."""
        own = {name: tensors[name] for name in parameter_shapes(self.sizes)}
        self.graph.load_state_dict(own, assign=True)
        return self

    def clip(self) -> Clip:
        """A clip that has not begun."""
        state = zero_state(self.graph.program, torch.float32, torch.device("cpu"))

        def run(call: Call, frames: Tensor) -> Mapping[str, Tensor]:
            return self.graph.run_call(call, 0, {call.reads[0]: frames}, state)

        return Clip(self.graph.program, self.sizes, self.part, run)
