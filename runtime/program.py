"""What an engine is, as data: its inputs, the calls it is made of, and the values between them.

Calls read and write values by name. `{i}` in a name stands for the number of a layer: a call that
repeats runs once a layer, with that layer's parameters and state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated

from wanexport.runtime.decode import SPARSE, Line, Name, Range, Size, Text

ENGINE_DTYPE = "engine"  # of a value: whatever precision the engine has
# When a call runs: once for a prompt, at every step, or to keep a finished chunk of a causal video;
# of a VAE, for its first frame or the next.
MOMENTS = ("prompt", "step", "commit", "first", "next")
DRAWS = ("normal", "rows", "masked", "place")  # how a seeded input is made
# Of the video to itself, to text, to image tokens, of a chunk to the frames that are kept; in a VAE
# of the pixels of a frame.
ATTENTION_KINDS = ("self", "text", "image", "cache", "frame")
LAYER = "{i}"
NEXT = ".next"  # after a state's name: what a graph, which writes nothing in place, makes it
# After a state's name: what of it a graph makes anew, as many rows of each as `slots` has entries.
ROWS = ".rows"
PLACE_OF_ROWS = "slots"  # the input that says where in the state these lie
NUMBER_OF_KEYS = "keys"  # the input that says how many tokens of a cache are attended to
WHOLE = "denoiser"  # the call of the steps, where a graph is all of a moment
_MOST_LAYERS = 1024
_Templated = Annotated[str, Text(r"[A-Za-z0-9][A-Za-z0-9._+{}-]*", 64)]
_NameOrNone = Annotated[str, Text(r"([A-Za-z0-9][A-Za-z0-9._+-]*)?", 64)]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[Size, ...]
    dtype: Name = "fp32"


@dataclass(frozen=True)
class Input(TensorSpec):
    """An input of an engine; `draw` says how a seeded one is made, `normal` by default.

    `rows` are fewer rows than the shape has, zero-padded, as text embeddings are; `masked` begins
    with 4 channels that are 1 in the first latent frame and 0 in the others; `place` says where in
    a causal video a chunk lies, which follows from the chunk's number.
    """

    draw: Name = "normal"


@dataclass(frozen=True)
class Attention:
    """The attention operators of one kind: how many a forward has, of how many tokens to which."""

    count: Size
    queries: Size
    keys: Size


@dataclass(frozen=True)
class Call:
    """One compiled function, called as `name(parameters, reads, state) -> writes`.

    parameters are names of the weights, in order; state is written in place. A call with `repeat`
    runs for that many layers from `first` on, each time reading what the one before wrote. `code`
    names the call whose compiled function it is; empty where it has one of its own.
    """

    name: Name
    reads: tuple[Name, ...]
    writes: tuple[Name, ...]
    parameters: tuple[Line, ...] = ()
    state: tuple[_Templated, ...] = ()
    repeat: Annotated[int, Range(1, _MOST_LAYERS)] = 1
    when: Name = "step"
    code: _NameOrNone = field(default="", metadata=SPARSE)
    first: Annotated[int, Range(0, _MOST_LAYERS - 1)] = field(default=0, metadata=SPARSE)

    @property
    def function(self) -> str:
        """The name of the call whose compiled function it runs."""
        return self.code or self.name

    @property
    def numbers(self) -> range:
        """The numbers of its layers."""
        return range(self.first, self.first + self.repeat)

    def layers(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """The names of the parameters and of the state of each layer."""
        for index in self.numbers:
            yield of_layer(self.parameters, index), of_layer(self.state, index)


@dataclass(frozen=True)
class Program:
    """Calls in order, from `inputs` and earlier calls' `values` to `outputs`.

    `state` lives as long as a session, begins as zeros, and is named per layer. The dtype `engine`
    of a value is the engine's precision. `attention` has the operators by their kind: `self`, of
    the video's tokens to one another, `text` and `image`, to those tokens.
    """

    inputs: dict[Name, Input]
    outputs: dict[Name, TensorSpec]
    calls: tuple[Call, ...]
    values: dict[Name, TensorSpec] = field(default_factory=dict)
    state: dict[_Templated, TensorSpec] = field(default_factory=dict)
    attention: dict[Name, Attention] = field(default_factory=dict)

    @property
    def output(self) -> TensorSpec:
        """The one output of a denoiser: the velocity."""
        (spec,) = self.outputs.values()
        return spec

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of the calls that have a compiled function of their own, in order."""
        return tuple(call.name for call in self.calls if not call.code)

    @property
    def is_plain(self) -> bool:
        """Whether every call runs at every step and nothing is kept between steps."""
        return not self.state and all(call.when == "step" for call in self.calls)

    def states(self) -> dict[str, TensorSpec]:
        """Every tensor of the state by its own name, that of a layer with the layer's number."""
        ends = {
            name: max(call.numbers.stop for call in self.calls if name in call.state)
            for name in {name for call in self.calls for name in call.state}
        }
        return {
            name.replace(LAYER, str(index)): spec
            for name, spec in self.state.items()
            for index in range(ends.get(name, 1) if LAYER in name else 1)
        }

    def whole(self) -> "Program":
        """The same as one call a moment, as ONNX graphs or TensorRT plans are.

        That of the steps is `denoiser`, the others have their moment's name. A call reads what its
        moment needs, and knows its parameters by their names, so it lists none.
        """
        moments = dict.fromkeys(call.when for call in self.calls)
        calls = tuple(self._joined(moment) for moment in moments)
        handed = {name for call in calls for name in call.reads} - set(self.inputs)
        values = {name: spec for name, spec in self.values.items() if name in handed}
        return replace(self, calls=calls, values=values, state=self.states())

    def at(self, moment: str) -> Call:
        """The one call of a moment; for a Program that is whole."""
        (call,) = (call for call in self.calls if call.when == moment)
        return call

    def _joined(self, moment: str) -> Call:
        """The calls of a moment as one."""
        own = [call for call in self.calls if call.when == moment]
        others = {n for call in self.calls if call.when != moment for n in call.reads}
        read, written, kept = set[str](), set[str](), set[str]()
        for call in own:
            read |= {name for name in call.reads if name not in written}
            written |= set(call.writes)
            kept |= {name for _, names in call.layers() for name in names}
        given = written & (others if moment == "prompt" else set(self.outputs))
        return Call(
            WHOLE if moment == "step" else moment,
            tuple(name for name in (*self.inputs, *self.values) if name in read),
            tuple(name for name in {**self.values, **self.outputs} if name in given),
            state=tuple(name for name in self.states() if name in kept),
            when=moment,
        )

    @property
    def unfamiliar(self) -> str:
        """What of it this version does not know, in words; empty when it knows all."""
        unknown = [f"a call at each {call.when}" for call in self.calls if call.when not in MOMENTS]
        for name, spec in self.inputs.items():
            unknown += [f"input {name} drawn as {spec.draw}"] if spec.draw not in DRAWS else []
        unknown += [f"attention of kind {k}" for k in self.attention if k not in ATTENTION_KINDS]
        return next(iter(unknown), "")

    def fault(self) -> str:
        """What is wrong with the order of calls and names, in words; empty when nothing is."""
        of_prompt, written = set(self.inputs), dict[str, set[str]]()
        for call in self.calls:
            own = written.setdefault(call.when, set())
            known = of_prompt | own
            if missing := [name for name in call.reads if name not in known]:
                others = [when for when, names in written.items() if missing[0] in names]
                reason = (
                    f"only calls of {others[0]} write" if others else "nothing before it writes"
                )
                return f"call {call.name} reads {missing[0]}, which {reason}"
            if missing := [name for name in call.state if name not in self.state]:
                return f"call {call.name} keeps {missing[0]}, which is no state"
            own |= set(call.writes)
            of_prompt |= set(call.writes) if call.when == "prompt" else set()
        known = set(self.inputs).union(*written.values())
        missing = [name for name in self.outputs if name not in known]
        return f"no call writes {missing[0]}" if missing else self._unlike_its_function()

    def _unlike_its_function(self) -> str:
        """Which call does not fit the function that it runs, in words; empty when all do."""
        own = {call.name: call for call in self.calls if not call.code}
        for call in self.calls:
            model = own.get(call.function)
            if model is None or _form(call) != _form(model):
                return f"call {call.name} cannot run the code of {call.function}"
        return ""


def _form(call: Call) -> tuple[object, ...]:
    """How a compiled function is called: by how many parameters, reads and so on."""
    return call.parameters, len(call.reads), len(call.writes), len(call.state)


def of_layer(names: tuple[str, ...], index: int) -> tuple[str, ...]:
    """Templated names as they are for one layer."""
    return tuple(name.replace(LAYER, str(index)) for name in names)
