"""Tiny VAEs of both kinds: official files, the graph with their weights, and a clip through it."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.oracles.official_vae import GOLDEN, STRIDES, weights
from wanexport.graphs.vae import WanVae
from wanexport.graphs.vae_checkpoint import VaeWeights, open_vae_checkpoint, with_chunks
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import ENGINE_DTYPE
from wanexport.runtime.wan_vae import parameter_shapes

VERSIONS = ("Wan2.1", "Wan2.2")
OFFICIAL: dict[str, Any] = json.loads(GOLDEN.read_text())


def official_file(version: str, folder: Path) -> Path:
    """The official file with the tensors that the golden values are of."""
    path = folder / f"{version}_VAE.pth"
    torch.save(weights(OFFICIAL[version]["tiny"]), path)
    return path


def graph_of(
    path: Path, height: int, width: int, *, k: int, dtype: torch.dtype = torch.float32
) -> WanVae:
    """The graph of a checkpoint with its weights, in chunks of k."""
    checkpoint = open_vae_checkpoint(path)
    config = with_chunks(checkpoint.config, decode=k, encode=k, tf32=False)
    graph = WanVae(config, Geometry(height, width, 9, config.spatial_stride), dtype)
    source = VaeWeights(checkpoint)
    graph.load_state_dict(
        {
            name: torch.cat(list(source.chunks(name))).view(shape)
            for name, shape in parameter_shapes(config).items()
        }
    )
    return graph


def zero_state(graph: WanVae) -> dict[str, Tensor]:
    """The state of a clip that has not begun."""
    specs = graph.program.states()
    dtypes = {ENGINE_DTYPE: graph.dtype, "fp32": torch.float32}
    return {n: torch.zeros(spec.shape, dtype=dtypes[spec.dtype]) for n, spec in specs.items()}


def through(
    graph: WanVae, part: str, clip: Tensor, state: dict[str, Tensor] | None = None
) -> Tensor:
    """A latent [f, h, w, C] decoded to pixels, or a video [F, H, W, 3] encoded to means.

    The last chunk is filled with copies of the last frame, and what it gives for them is dropped.
    """
    state = zero_state(graph) if state is None else state
    calls = {call.name: call for call in graph.program.calls}
    k = graph.config.decode_chunk if part == "decode" else 4 * graph.config.encode_chunk
    pieces = [("first", clip[:1]), *(("next", piece) for piece in clip[1:].split(k))]
    results = []
    for when, piece in pieces:
        if not len(piece):
            continue
        call = calls[f"{part}_{when}"]
        missing = 0 if when == "first" else k - len(piece)
        given = torch.cat([piece, piece[-1:].expand(missing, *piece.shape[1:])])
        with torch.no_grad():
            written = graph.run_call(call, 0, {call.reads[0]: given}, state)
        kept = len(piece) if when == "first" else len(piece) * 4
        kept = kept if part == "decode" else -(-len(piece) // 4)
        results.append(written[call.writes[0]][:kept])
    return torch.cat(results)


def stride_of(version: str) -> int:
    """Pixels of a side for one of the latent."""
    return STRIDES[version]
