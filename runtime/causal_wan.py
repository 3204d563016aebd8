"""Causal Wan, chunk by chunk: the Program of a graph that keeps keys and values of earlier frames.

Tensors and their names are plain Wan2.1's. The engine has slots of one latent frame each, and knows
neither a window nor which frame is in which slot: its inputs `slots` and `keys` say where a chunk
goes and how much is attended. Source: guandeh17/Self-Forcing, `wan/modules/causal_model.py`.
"""

from wanexport.runtime import plain_wan
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry
from wanexport.runtime.program import (
    ENGINE_DTYPE,
    LAYER,
    Attention,
    Call,
    Input,
    Program,
    TensorSpec,
)
from wanexport.runtime.wan_config import WanConfig

MAX_FRAMES = 1024  # latent ones of a video: the official code's table of angles has so many

_CACHE = tuple(f"cache_{name}.{LAYER}" for name in "kv")
_TEXT = tuple(f"text_{name}.{LAYER}" for name in "kv")
_BLOCK = f"blocks.{LAYER}."
_OF_TEXT = tuple(f"{_BLOCK}cross_attn.{name}." for name in ("k", "v", "norm_k"))
_TO_KEEP = (f"{_BLOCK}modulation", *(f"{_BLOCK}self_attn.{name}." for name in ("k", "v", "norm_k")))
_PLACE = {"position": 1, "slots": 0, "keys": 1}  # and how many numbers each has, 0: one a frame


def program(config: WanConfig, geometry: Geometry) -> Program:
    """Text once a prompt, a step of a chunk, and a commit, which keeps a finished chunk's K and V.

    Inputs beside plain Wan's are whole numbers: `position` [1], the number of the chunk's first
    latent frame in the video, `slots` [chunk], where each of its frames is kept, and `keys` [1],
    how many tokens of the cache are attended to, from its first on. A step writes its chunk's keys
    and values too, before it attends. Raises BadRequest for a geometry without chunks.
    """
    if not geometry.chunk:
        raise BadRequest(
            f"a causal model computes a video chunk by chunk, and {geometry.name} has none: build "
            f"an engine with --chunk"
        )
    inputs = _inputs(config, geometry)
    values = plain_wan.values(config, geometry, per_frame=True)
    return Program(
        inputs=inputs,
        outputs={"velocity": TensorSpec(inputs["latent"].shape)},
        calls=(*_of_prompt(config), *_of_step(config), *_of_commit(config)),
        values=values,
        state=_state(config, geometry),
        attention={
            "cache": Attention(
                config.num_layers, geometry.num_tokens, geometry.cache * geometry.frame_tokens
            ),
            "text": Attention(config.num_layers, geometry.num_tokens, config.text_len),
        },
    )


def _inputs(config: WanConfig, geometry: Geometry) -> dict[str, Input]:
    inputs = plain_wan.inputs(config, geometry, per_frame=True)
    place = {
        name: Input((length or geometry.chunk,), "I64", draw="place")
        for name, length in _PLACE.items()
    }
    return {**inputs, **place}


def _state(config: WanConfig, geometry: Geometry) -> dict[str, TensorSpec]:
    """Keys and values of every slot and of the text; K after its norm and rotation."""
    heads = (config.num_heads, config.head_dim)
    kept = TensorSpec((1, geometry.slots * geometry.frame_tokens, *heads), ENGINE_DTYPE)
    text = TensorSpec((1, config.text_len, *heads), ENGINE_DTYPE)
    return {**dict.fromkeys(_CACHE, kept), **dict.fromkeys(_TEXT, text)}


_EMBEDDED = ("x", "time", "modulation", "cos", "sin")
_EMBED_READS = ("latent", "timestep", "position")
_KEEP_READS = ("x", "modulation", "cos", "sin", "slots")


def _of_prompt(config: WanConfig) -> tuple[Call, ...]:
    embed, block = (plain_wan.call_parameters(config)[name] for name in ("embed", "block"))
    of_text = tuple(name for name in embed if name.startswith("text_embedding."))
    of_blocks = tuple(name for name in block if name.startswith(_OF_TEXT))
    return (
        Call("text", ("text",), ("context",), of_text, when="prompt"),
        Call(
            "text_block", ("context",), (), of_blocks, _TEXT, config.num_layers, when="prompt"
        ),
    )  # fmt: skip


def _of_step(config: WanConfig) -> tuple[Call, ...]:
    parameters = plain_wan.call_parameters(config)
    own = {
        "embed": [n for n in parameters["embed"] if not n.startswith("text_embedding.")],
        "block": [n for n in parameters["block"] if not n.startswith(_OF_TEXT)],
    }
    return (
        Call("embed", _EMBED_READS, _EMBEDDED, tuple(own["embed"])),
        Call(
            "block", (*_KEEP_READS, "keys"), ("x",), tuple(own["block"]), (*_CACHE, *_TEXT),
            config.num_layers,
        ),
        Call("head", ("x", "time"), ("velocity",), parameters["head"]),
    )  # fmt: skip


def _of_commit(config: WanConfig) -> tuple[Call, ...]:
    """The step's calls, and of the last layer what its keys and values need."""
    embed, block, _ = _of_step(config)
    last = config.num_layers - 1
    keep = tuple(name for name in block.parameters if name.startswith(_TO_KEEP))
    calls = [
        Call(
            "commit_embed", embed.reads, embed.writes, embed.parameters, when="commit",
            code=embed.name,
        ),
        Call(
            "commit_block", block.reads, block.writes, block.parameters, block.state, last,
            when="commit", code=block.name,
        ),
        Call("commit_keep", _KEEP_READS, (), keep, _CACHE, when="commit", first=last),
    ]  # fmt: skip
    return tuple(call for call in calls if call.repeat)
