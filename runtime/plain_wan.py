"""Plain Wan, Wan2.1 and Wan2.2, by its sizes: the Program of its graph, and its parameters.

Names and shapes are the official code's (Wan-Video/Wan2.1 `wan/modules/model.py`).
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import PATCH, Geometry
from wanexport.runtime.program import (
    ENGINE_DTYPE,
    LAYER,
    Attention,
    Call,
    Input,
    Program,
    TensorSpec,
)
from wanexport.runtime.wan_config import IMAGE_DIM, WanConfig

_TI2V_CHANNELS = 48  # of the latent of Wan2.2's own VAE
_BLOCK = f"blocks.{LAYER}."  # how the parameters of one block are named

_Shapes = Iterator[tuple[str, tuple[int, ...]]]


def program(config: WanConfig, geometry: Geometry, *, per_frame: bool) -> Program:
    """Embedding, a block for every layer, head; per_frame gives each latent frame a timestep."""
    parameters = call_parameters(config)
    embedded = values(config, geometry, per_frame)
    conditioning = tuple(name for name in embedded if name not in ("x", "time"))
    taken = inputs(config, geometry, per_frame)
    return Program(
        inputs=taken,
        outputs={"velocity": TensorSpec(taken["latent"].shape)},
        calls=(
            Call("embed", tuple(taken), tuple(embedded), parameters["embed"]),
            Call(
                "block", ("x", *conditioning), ("x",), parameters["block"],
                repeat=config.num_layers,
            ),
            Call("head", ("x", "time"), ("velocity",), parameters["head"]),
        ),
        values=embedded,
        attention=_attentions(config, geometry),
    )  # fmt: skip


def _attentions(config: WanConfig, geometry: Geometry) -> dict[str, Attention]:
    """One of each kind a layer; that to image tokens is there where the model has them."""
    keys = {"self": geometry.num_tokens, "text": config.text_len, "image": config.image_tokens}
    return {
        kind: Attention(config.num_layers, geometry.num_tokens, length)
        for kind, length in keys.items()
        if length
    }


def inputs(config: WanConfig, geometry: Geometry, per_frame: bool) -> dict[str, Input]:
    """Every graph input, in the order of `WanModel.embed`; all are fp32."""
    latent = geometry.latent
    inputs = {
        "latent": Input((1, config.out_channels, *latent)),
        "timestep": Input((latent[0] if per_frame else 1,)),
        "text": Input((1, config.text_len, config.text_dim), draw="rows"),
    }
    if config.condition_channels:
        shape = (1, config.condition_channels, *latent)
        inputs["condition"] = Input(shape, draw="masked")
    if config.image_tokens:
        inputs["image"] = Input((1, config.image_tokens, IMAGE_DIM))
    return inputs


def values(config: WanConfig, geometry: Geometry, per_frame: bool) -> dict[str, TensorSpec]:
    """What the embedding gives: the residual stream, the time for the head, and the conditioning.

    With a timestep for each latent frame, the rows of x are the frames.
    """
    rows = geometry.latent[0] if per_frame else 1
    tokens = geometry.num_tokens
    table = TensorSpec((1, tokens, 1, config.head_dim // 2))
    values = {
        "x": TensorSpec((rows, tokens // rows, config.dim)),
        "time": TensorSpec((rows, config.dim)),
        "modulation": TensorSpec((rows, 6, config.dim)),
        "context": TensorSpec((1, config.text_len, config.dim), ENGINE_DTYPE),
        "cos": table,
        "sin": table,
    }
    if config.image_tokens:
        values["image_context"] = TensorSpec((1, config.image_tokens, config.dim))
    return values


def call_parameters(config: WanConfig) -> dict[str, tuple[str, ...]]:
    """The names of each call's parameters, in the order it takes them."""
    names: dict[str, list[str]] = {"embed": [], "block": [], "head": []}
    first = _BLOCK.replace(LAYER, "0")
    for name in parameter_shapes(config):
        if name.startswith("head."):
            names["head"].append(name)
        elif name.startswith(first):
            names["block"].append(_BLOCK + name.removeprefix(first))
        elif not name.startswith("blocks."):
            names["embed"].append(name)
    return {call: tuple(own) for call, own in names.items()}


@lru_cache(maxsize=16)
def parameter_shapes(config: WanConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter by its official name, in the order that `WanModel` has them."""
    dim, patch = config.dim, (config.in_channels, 1, PATCH, PATCH)
    shapes = dict(_affine("patch_embedding", dim, *patch))
    shapes |= _affine("text_embedding.0", dim, config.text_dim)
    shapes |= _affine("text_embedding.2", dim, dim)
    shapes |= _affine("time_embedding.0", dim, config.freq_dim)
    shapes |= _affine("time_embedding.2", dim, dim)
    shapes |= _affine("time_projection.1", 6 * dim, dim)
    shapes |= _image_embedding(config)
    block = dict(_block(config))
    for index in range(config.num_layers):
        prefix = _BLOCK.replace(LAYER, str(index))
        shapes |= {prefix + name: shape for name, shape in block.items()}
    shapes["head.modulation"] = (1, 2, dim)
    shapes |= _affine("head.head", PATCH * PATCH * config.out_channels, dim)
    return MappingProxyType(shapes)


def _affine(name: str, rows: int, *columns: int) -> _Shapes:
    """Weight and bias of a matrix, or where there are no columns of a norm."""
    yield f"{name}.weight", (rows, *columns)
    yield f"{name}.bias", (rows,)


def _image_embedding(config: WanConfig) -> _Shapes:
    if config.image_tokens == 514:
        yield "img_emb.emb_pos", (1, 514, IMAGE_DIM)
    if config.image_tokens:
        yield from _affine("img_emb.proj.0", IMAGE_DIM)
        yield from _affine("img_emb.proj.1", IMAGE_DIM, IMAGE_DIM)
        yield from _affine("img_emb.proj.3", config.dim, IMAGE_DIM)
        yield from _affine("img_emb.proj.4", config.dim)


def _block(config: WanConfig) -> _Shapes:
    """The parameters of one block, by their names within it."""
    dim = config.dim
    yield "modulation", (1, 6, dim)
    yield from _attention("self_attn", dim)
    yield from _affine("norm3", dim)
    yield from _attention("cross_attn", dim)
    if config.image_tokens:
        yield from _affine("cross_attn.k_img", dim, dim)
        yield from _affine("cross_attn.v_img", dim, dim)
        yield "cross_attn.norm_k_img.weight", (dim,)
    yield from _affine("ffn.0", config.ffn_dim, dim)
    yield from _affine("ffn.2", dim, config.ffn_dim)


def _attention(name: str, dim: int) -> _Shapes:
    for projection in "qkvo":
        yield from _affine(f"{name}.{projection}", dim, dim)
    for norm in ("norm_q", "norm_k"):
        yield f"{name}.{norm}.weight", (dim,)


def family_name(condition_channels: int, out_channels: int, image_tokens: int, experts: int) -> str:
    """The family of a plain Wan by its channels and branches, for what does not state it.

    experts is how many there are, 0 for a model that is one. One expert of the A14B by itself has
    the tensors of Wan2.1's T2V and is taken for it.
    Raises BadRequest for two experts of a model that has one.
    """
    is_ti2v = out_channels == _TI2V_CHANNELS
    if experts and (is_ti2v or image_tokens):
        raise BadRequest("two experts with an image branch or 48 channels are no known Wan")
    if is_ti2v:
        return "ti2v"
    if not condition_channels:
        return "t2v-a14b" if experts else "t2v"
    return {0: "i2v-a14b", 257: "i2v", 514: "flf2v"}[image_tokens]
