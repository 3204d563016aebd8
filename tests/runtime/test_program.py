"""A Program: its calls layer by layer, its state, the same in one call, and its faults."""

from dataclasses import replace
from typing import Any

import pytest

from wanexport.runtime.decode import decode, encode
from wanexport.runtime.program import (
    WHOLE,
    Attention,
    Call,
    Input,
    Program,
    TensorSpec,
    of_layer,
)

PLAIN = Program(
    inputs={"latent": Input((1, 4)), "text": Input((1, 8), draw="rows")},
    outputs={"velocity": TensorSpec((1, 4))},
    calls=(
        Call("embed", ("latent", "text"), ("x", "context"), ("in.weight",)),
        Call("block", ("x", "context"), ("x",), ("blocks.{i}.q", "blocks.{i}.k"), repeat=3),
        Call("head", ("x",), ("velocity",), ("out.weight",)),
    ),
    values={"x": TensorSpec((1, 4)), "context": TensorSpec((1, 8), "engine")},
    attention={"self": Attention(3, 4, 4)},
)
# Reads its text once a prompt; a block keeps two tensors a layer, the head one.
KEEPING = Program(
    inputs=PLAIN.inputs,
    outputs=PLAIN.outputs,
    calls=(
        Call("read", ("text",), ("context",), when="prompt"),
        Call("embed", ("latent",), ("x",)),
        Call("block", ("x", "context"), ("x",), state=("k.{i}", "v.{i}"), repeat=2),
        Call("head", ("x",), ("velocity",), state=("last",)),
    ),
    values=PLAIN.values,
    state={"k.{i}": TensorSpec((2, 2)), "v.{i}": TensorSpec((2, 3)), "last": TensorSpec((4,))},
)


def with_call(program: Program, place: int, **changes: Any) -> Program:
    calls = list(program.calls)
    calls[place] = replace(calls[place], **changes)
    return replace(program, calls=tuple(calls))


def test_a_repeated_call_has_parameters_and_state_of_each_layer() -> None:
    assert list(PLAIN.calls[1].layers()) == [
        (("blocks.0.q", "blocks.0.k"), ()),
        (("blocks.1.q", "blocks.1.k"), ()),
        (("blocks.2.q", "blocks.2.k"), ()),
    ]
    assert list(KEEPING.calls[2].layers()) == [((), ("k.0", "v.0")), ((), ("k.1", "v.1"))]
    assert list(PLAIN.calls[0].layers()) == [(("in.weight",), ())]
    assert of_layer(("a.{i}.{i}", "b"), 12) == ("a.12.12", "b")


def test_a_state_has_a_tensor_for_every_layer_in_the_order_it_is_stated() -> None:
    assert list(KEEPING.states().items()) == [
        ("k.0", TensorSpec((2, 2))),
        ("k.1", TensorSpec((2, 2))),
        ("v.0", TensorSpec((2, 3))),
        ("v.1", TensorSpec((2, 3))),
        ("last", TensorSpec((4,))),
    ]
    assert PLAIN.states() == {}


def test_one_call_is_the_same_from_inputs_to_outputs() -> None:
    whole = PLAIN.whole()
    assert whole.calls == (Call(WHOLE, ("latent", "text"), ("velocity",)),)
    assert (whole.inputs, whole.outputs) == (PLAIN.inputs, PLAIN.outputs)
    assert whole.values == {} and whole.attention == PLAIN.attention
    assert whole.whole() == whole and whole.fault() == ""


def test_of_several_moments_each_is_one_call() -> None:
    """What the prompt's hands on is a value; each keeps what its own calls keep."""
    kept = replace(KEEPING.calls[2], name="keep", when="commit", code="block", first=1, repeat=1)
    program = replace(KEEPING, calls=(*KEEPING.calls, replace(kept, reads=("latent", "context"))))
    whole = program.whole()
    assert whole.calls == (
        Call("prompt", ("text",), ("context",), when="prompt"),
        Call(WHOLE, ("latent", "context"), ("velocity",), state=tuple(program.states())),
        Call("commit", ("latent", "context"), (), state=("k.1", "v.1"), when="commit"),
    )
    assert whole.values == {"context": KEEPING.values["context"]}
    assert (whole.inputs, whole.states()) == (program.inputs, program.states())
    assert whole.at("commit") is whole.calls[2]
    assert whole.whole() == whole and whole.fault() == ""


def test_plain_is_what_runs_anew_at_every_step() -> None:
    assert PLAIN.is_plain and not KEEPING.is_plain
    assert not replace(KEEPING, state={}).is_plain  # for its call of the prompt
    assert not with_call(KEEPING, 0, when="step").is_plain  # for its state
    assert not KEEPING.whole().is_plain and PLAIN.whole().is_plain


def test_a_sound_program_has_no_fault() -> None:
    assert PLAIN.fault() == KEEPING.fault() == PLAIN.unfamiliar == KEEPING.unfamiliar == ""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (with_call(PLAIN, 0, reads=("latent", "image")), "embed reads image, which nothing"),
        (with_call(PLAIN, 1, reads=("x", "velocity")), "block reads velocity, which nothing"),
        (with_call(PLAIN, 0, writes=("x",)), "block reads context, which nothing before it"),
        (with_call(PLAIN, 2, writes=("speed",)), "no call writes velocity"),
        (replace(PLAIN, calls=()), "no call writes velocity"),
        (replace(PLAIN, calls=PLAIN.calls[::-1]), "head reads x, which nothing before it writes"),
        (replace(PLAIN, inputs={}), "embed reads latent, which nothing"),
        (replace(KEEPING, state={}), "block keeps k.{i}, which is no state"),
        (with_call(KEEPING, 3, state=("first",)), "head keeps first, which is no state"),
        (
            replace(KEEPING, calls=(*KEEPING.calls, Call("more", ("x",), ("y",), when="prompt"))),
            "more reads x, which only calls of step write",
        ),
    ],
)
def test_a_name_that_nothing_gives_is_a_fault(program: Program, said: str) -> None:
    assert said in program.fault()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (with_call(PLAIN, 1, when="chunk"), "a call at each chunk"),
        (replace(PLAIN, inputs={"latent": Input((1,), draw="noise")}), "latent drawn as noise"),
        (replace(PLAIN, attention={"camera": Attention(1, 1, 1)}), "attention of kind camera"),
    ],
)
def test_what_this_version_does_not_know_is_named(program: Program, said: str) -> None:
    assert said in program.unfamiliar


# A commit runs two blocks of the step again, and for the last layer a call of its own.
COMMITTING = replace(
    KEEPING,
    calls=(
        *KEEPING.calls,
        Call("again", ("latent",), ("x",), when="commit", code="embed"),
        Call(
            "more", ("x", "context"), ("x",), state=("k.{i}", "v.{i}"), when="commit", code="block"
        ),
        Call("keep", ("x",), (), state=("k.{i}", "v.{i}"), when="commit", first=3),
    ),
)


def test_a_call_may_run_the_code_of_another_from_a_layer_on() -> None:
    assert COMMITTING.fault() == COMMITTING.unfamiliar == ""
    assert COMMITTING.functions == ("read", "embed", "block", "head", "keep")
    *_, again, more, keep = COMMITTING.calls
    assert (again.function, more.function, keep.function) == ("embed", "block", "keep")
    assert list(keep.numbers) == [3] and list(keep.layers()) == [((), ("k.3", "v.3"))]
    assert [n for n in COMMITTING.states() if n.startswith("k")] == ["k.0", "k.1", "k.2", "k.3"]
    assert [n for n in KEEPING.states() if n.startswith("k")] == ["k.0", "k.1"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"code": "blok"}, "more cannot run the code of blok"),
        ({"code": "again"}, "more cannot run the code of again"),
        ({"code": "head"}, "more cannot run the code of head"),
        ({"reads": ("x", "velocity")}, "more reads velocity, which only calls of step write"),
    ],
)
def test_a_code_that_does_not_fit_is_a_fault(changes: Any, said: str) -> None:
    assert said in with_call(COMMITTING, 5, **changes).fault()


def test_what_a_commit_writes_no_step_reads() -> None:
    calls = COMMITTING.calls
    assert "which nothing before it writes" in replace(COMMITTING, calls=calls[4:]).fault()


@pytest.mark.parametrize("program", [PLAIN, KEEPING])
def test_calls_of_one_code_alone_are_written_as_ever(program: Program) -> None:
    fields = ["name", "reads", "writes", "parameters", "state", "repeat", "when"]
    assert all(list(call) == fields for call in encode(program)["calls"])


@pytest.mark.parametrize("program", [PLAIN, KEEPING, COMMITTING, PLAIN.whole(), KEEPING.whole()])
def test_a_program_is_data(program: Program) -> None:
    data = encode(program)
    assert isinstance(data["calls"], list) and decode(Program, data, "program") == program
