"""GGUF files that gguf-py writes are read as they are; whatever is damaged, one line says so."""

import random
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.oracles.gguf_files import (
    ARRAY,
    F32,
    FLOAT32,
    INT32,
    INT64,
    Q8_0,
    STRING,
    UINT32,
    array,
    assemble,
    block_size,
    key,
    random_rows,
    second_opinion,
    tensor,
    text,
    write_gguf,
)
from wanexport.graphs import gguf_blocks
from wanexport.graphs.gguf_blocks import TYPES, UNREAD, block_of, dequantize
from wanexport.graphs.gguf_file import read_gguf
from wanexport.runtime.bundle.tensorfile import TensorEntry
from wanexport.runtime.errors import BadRequest, BundleError

READ = [name for name, _, _ in TYPES.values()]
QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"]  # what gguf-py can
ARCHITECTURE = key("general.architecture", STRING, text("wan"))
ALIGNED = key("general.alignment", UINT32, struct.pack("<I", 64))
NAMED = key("general.name", STRING, text("a Wan"))
SIZES = key("sizes", ARRAY, array(INT32, 3, bytes(12)))
NAMES = key("names", ARRAY, array(STRING, 2, text("a") + text("bc")))
PATCH = "patch_embedding.weight"
# The data of these: 96 bytes of a, 32 of padding, 68 of b, 60 of padding that may be there.
A, B = tensor("a", [8, 3], F32, 0), tensor("b", [32, 2], Q8_0, 128)
ORDERLY = assemble([ARCHITECTURE, ALIGNED, NAMED, SIZES, NAMES], [A, B], 256, alignment=64)


def opened(folder: Path, content: bytes) -> dict[str, TensorEntry]:
    """The tensors of a file with this content."""
    path = folder / "x.gguf"
    path.unlink(missing_ok=True)  # some file systems take 4 ms to write over a file
    path.write_bytes(content)
    return read_gguf(path).tensors


def orig_shape(kind: int, *shape: int) -> bytes:
    """The key that states another shape of the tensor `a`."""
    code = {INT32: "i", INT64: "q", FLOAT32: "f"}[kind]
    values = struct.pack(f"<{len(shape)}{code}", *shape)
    return key("comfy.gguf.orig_shape.a", ARRAY, array(kind, len(shape), values))


@pytest.mark.parametrize("dtype", READ)
def test_what_gguf_py_writes_is_read_as_it_is(
    dtype: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    rows = {f"blocks.{n}.w": random_rows(dtype, 3 + n, 256 * (2 - n), rng) for n in range(2)}
    path = tmp_path / "x.gguf"
    write_gguf(path, {name: (data, dtype) for name, data in rows.items()})
    header, content = read_gguf(path), path.read_bytes()
    assert header.architecture == "wan"
    assert list(header.tensors) == list(rows)
    for n, (name, entry) in enumerate(header.tensors.items()):
        assert (entry.dtype, entry.shape) == (dtype, (3 + n, 256 * (2 - n)))
        assert content[entry.offset : entry.offset + entry.size] == rows[name].tobytes()


@pytest.mark.parametrize("dtype", READ)
def test_values_are_those_of_another_reader_to_the_bit(
    dtype: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_blocks, "_PIECE", 1024)
    data = random_rows(dtype, 9, 512, rng).reshape(-1)
    found, expected = dequantize(data, dtype), second_opinion(data, dtype)
    assert found.dtype == np.float32 and found.shape == (9 * 512,)
    assert np.isfinite(expected).all() and found.std() > 0.5
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantised_values_come_back_nearly(dtype: str, rng: np.random.Generator) -> None:
    values = rng.normal(size=(4, 64)).astype(np.float32)
    data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype])
    error = np.abs(dequantize(data.reshape(-1), dtype).reshape(4, 64) - values).max()
    assert 0 < error < {"Q8_0": 0.02, "BF16": 0.02}.get(dtype, 0.4)


def test_a_scale_that_is_not_finite_gives_no_warning(rng: np.random.Generator) -> None:
    data = random_rows("Q4_0", 1, 32, rng).reshape(-1)
    data[:2] = np.array([np.inf], np.float16).view(np.uint8)
    data[2] = 0x88  # two elements of 0, the others of any
    assert np.isnan(dequantize(data, "Q4_0")[0])


def test_blocks_and_numbers_are_those_of_gguf_py() -> None:
    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    for number, name in ({n: row[0] for n, row in TYPES.items()} | UNREAD).items():
        assert known.pop(number, name) == name
    assert not known
    for name in READ:
        assert block_of(name) == block_size(name)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BundleError, match=r"a GGUF file needs gguf; .*'\.\[build\]'"):
        dequantize(np.zeros(34, np.uint8), "Q8_0")


def test_a_patch_embedding_of_five_dimensions_is_read(tmp_path: Path) -> None:
    values = np.arange(16 * 3 * 4, dtype=np.float32).reshape(16, 3, 1, 2, 2)
    write_gguf(tmp_path / "x.gguf", {PATCH: (values, "F32")})
    entry = read_gguf(tmp_path / "x.gguf").tensors[PATCH]
    assert entry.shape == values.shape
    assert (tmp_path / "x.gguf").read_bytes()[entry.offset :][: entry.size] == values.tobytes()


def test_a_shape_that_the_metadata_states_is_taken(tmp_path: Path) -> None:
    values = np.zeros((16, 12), np.float32)
    write_gguf(
        tmp_path / "x.gguf",
        {PATCH: (values, "F32"), "b": (values, "F32")},
        more=lambda writer: writer.add_array(f"comfy.gguf.orig_shape.{PATCH}", [16, 3, 1, 2, 2]),
    )
    found = read_gguf(tmp_path / "x.gguf").tensors
    assert found[PATCH].shape == (16, 3, 1, 2, 2)
    assert found["b"].shape == (16, 12)
    assert opened(tmp_path, assemble([orig_shape(INT64, 4, 6)], [A], 96))["a"].shape == (4, 6)


def test_an_alignment_of_64_is_honoured(tmp_path: Path) -> None:
    rows = {name: (np.arange(3 + n, dtype=np.float32), "F32") for n, name in enumerate("abc")}
    path = tmp_path / "x.gguf"
    write_gguf(path, rows, more=lambda writer: writer.add_custom_alignment(64))
    for name, entry in read_gguf(path).tensors.items():
        assert entry.offset % 64 == 0
        assert path.read_bytes()[entry.offset :][: entry.size] == rows[name][0].tobytes()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], ""),
        ([key("general.architecture", STRING, text(""))], ""),
        ([key("general.architecture", UINT32, bytes(4))], ""),
        ([key("general.architecture", STRING, text("pig"))], "pig"),
    ],
)
def test_the_architecture_is_told_as_it_is(
    keys: list[bytes], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "x.gguf").write_bytes(assemble(keys, [A], 96))
    assert read_gguf(tmp_path / "x.gguf").architecture == expected


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("data", [196, 200, 256])
def test_padding_after_the_last_tensor_may_be_there_or_not(
    version: int, data: int, tmp_path: Path
) -> None:
    content = assemble([ALIGNED], [A, B], data, version=version, alignment=64)
    start = len(content) - data
    assert opened(tmp_path, content) == {
        "a": TensorEntry("F32", (3, 8), start, 96),
        "b": TensorEntry("Q8_0", (2, 32), start + 128, 68),
    }


def test_the_order_of_tensors_in_the_header_is_free(tmp_path: Path) -> None:
    assert list(opened(tmp_path, assemble([ALIGNED], [B, A], 196, alignment=64))) == ["b", "a"]


def test_a_scalar_and_a_file_without_tensors_are_read(tmp_path: Path) -> None:
    assert opened(tmp_path, assemble([], [tensor("a", [], F32, 0)], 4))["a"].shape == ()
    assert opened(tmp_path, assemble([ARCHITECTURE], [], 0)) == {}
    assert opened(tmp_path, assemble([ARCHITECTURE], [], 0, alignment=1)) == {}


def test_a_header_longer_than_the_first_read_is_read(tmp_path: Path) -> None:
    keys = [key("workflow", STRING, text("x" * 300_000))]
    tensors = [tensor(f"{n:0900}", [8], F32, 32 * n) for n in range(900)]
    found = opened(tmp_path, assemble(keys, tensors, 32 * 900))
    assert [entry.offset % 32 for entry in found.values()] == [0] * 900
    assert list(found)[-1].endswith("899")


def key_of_arrays(depth: int) -> bytes:
    return key("a", ARRAY, array(ARRAY, 1, b"") * depth)


DAMAGED = {
    "no GGUF": (b"GGML" + ORDERLY[4:], "is no GGUF file"),
    "version 1": (assemble([], [A], 96, version=1), "of version 1, which is not read"),
    "version 4": (assemble([], [A], 96, version=4), "of version 4, which is not read"),
    "big-endian": (assemble([], [A], 96, version=3 << 24), "is a big-endian GGUF file"),
    "tensors": (assemble([], [A], 96, counts=(10**12, 0)), r"\(1000000000000 tensors, more than"),
    "keys": (assemble([], [A], 96, counts=(1, 2**63)), r"\(9223372036854775808 keys, more than"),
    "too few tensors": (assemble([], [A], 4, counts=(2, 0), alignment=1), "is cut short"),
    "a long name": (assemble([], [tensor("a" * 1001, [8], F32, 0)], 32), "a name of 1001 bytes"),
    "a long key": (assemble([key(bytes(1001), UINT32, bytes(4))], [A], 96), "a name of 1001"),
    "no UTF-8": (assemble([], [tensor(b"\xff", [8], F32, 0)], 32), "a name that is no UTF-8"),
    "a key that is no UTF-8": (assemble([key(b"\xff", UINT32, bytes(4))], [A], 96), "no UTF-8"),
    "a name twice": (assemble([], [A, B, A], 196), "the tensor a is there twice"),
    "a key twice": (assemble([NAMED, NAMED], [A], 96), "the key general.name is there twice"),
    "an unknown value": (assemble([key("a", 13, b"")], [A], 96), "a is a value of the unknown"),
    "nested arrays": (assemble([key_of_arrays(99)], [A], 96), "a is an array of arrays"),
    "an array of 2^60": (
        assemble([key("a", ARRAY, array(INT32, 2**60, b""))], [A], 96),
        "a header of more than 16777216 bytes",
    ),
    "a string of 2^63": (
        assemble([key("a", STRING, struct.pack("<Q", 2**63))], [A], 96),
        "a header of more than 16777216 bytes",
    ),
    "2^60 strings": (
        assemble([key("a", ARRAY, array(STRING, 2**60, b""))], [A], 96),
        "1152921504606846976 strings in arrays",
    ),
    "an alignment of 48": (
        assemble([key("general.alignment", UINT32, struct.pack("<I", 48))], [A], 96),
        "the alignment 48, no power of two up to 65536",
    ),
    "an alignment of 0": (
        assemble([key("general.alignment", UINT32, bytes(4))], [A], 96),
        "the alignment 0, no power of two",
    ),
    "an alignment of 2^31": (
        assemble([key("general.alignment", UINT32, struct.pack("<I", 1 << 31))], [A], 96),
        "the alignment 2147483648, no power of two",
    ),
    "an alignment that is a text": (
        assemble([key("general.alignment", STRING, text("32"))], [A], 96),
        "the alignment 32, no power of two",
    ),
    "a split": (
        assemble([key("split.count", 2, struct.pack("<H", 3))], [A], 96),
        "is one of the 3 parts of a split GGUF model, which is not read: merge them",
    ),
    "9 dimensions": (assemble([], [tensor("a", [1] * 9, F32, 0)], 4), "a has 9 dimensions"),
    "2^32 - 1 dimensions": (
        assemble([], [text("a") + b"\xff" * 4], 4),
        "a has 4294967295 dimensions, more than 8",
    ),
    "a dimension of 0": (assemble([], [tensor("a", [0], F32, 0)], 0), "of a are no sizes"),
    "2^512 elements": (assemble([], [tensor("a", [2**63] * 8, F32, 0)], 0), "of a are no sizes"),
    "10^12 elements": (
        assemble([], [tensor("a", [10**12], F32, 0)], 96),
        r"is cut short: it has 160 bytes, its header describes 4000000000064; download it again",
    ),
    "an offset of 2^63": (assemble([], [tensor("a", [8], F32, 2**63)], 32), "of a are no sizes"),
    "parts of blocks": (
        assemble([], [tensor("a", [16, 2], Q8_0, 0)], 34),
        "a has rows that are no whole blocks of Q8_0",
    ),
    "a type not read": (
        assemble([], [tensor("a", [32], 20, 0)], 18),
        "has a in IQ4_NL, which is not read: take a Q4_0 to Q8_0 file",
    ),
    "an unknown type": (
        assemble([], [tensor("a", [32], 77, 0)], 18),
        "has a in the unknown type 77, which is not read: take",
    ),
    "an overlap": (
        assemble([], [A, tensor("b", [8], F32, 64)], 96),
        "b begins at byte 192, expected 224, where what lies before it ends",
    ),
    "a gap": (assemble([], [A, tensor("b", [8], F32, 128)], 160), "b begins at byte 256, expected"),
    "a gap at first": (assemble([], [tensor("a", [8], F32, 32)], 64), "a begins at byte 96"),
    "no alignment": (assemble([], [A, tensor("b", [8], F32, 97)], 160), "b begins at byte 225"),
    "the same place": (assemble([], [A, tensor("b", [24], F32, 0)], 96), "expected"),
    "a byte too many": (ORDERLY + b"\0", "it describes 576 bytes of a file that has 577"),
    "bytes without a tensor": (assemble([], [], 16), "it describes 32 bytes of a file that has 48"),
    "another count of elements": (
        assemble([orig_shape(INT32, 5, 5)], [A], 96),
        "comfy.gguf.orig_shape.a is no shape of its 24 elements",
    ),
    "negative sizes": (assemble([orig_shape(INT32, -4, -6)], [A], 96), "is no shape of its 24"),
    "a negative size": (assemble([orig_shape(INT32, 4, -1, 6)], [A], 96), "is no shape of its 24"),
    "sizes that are fractions": (assemble([orig_shape(FLOAT32, 4, 6)], [A], 96), "is no shape"),
    "a shape of 9": (assemble([orig_shape(INT64, 24, *[1] * 8)], [A], 96), "is no shape of its"),
    "a shape that is a number": (
        assemble(
            [key("comfy.gguf.orig_shape.a", INT32, struct.pack("<i", 1))],
            [tensor("a", [1], F32, 0)],
            4,
        ),
        "is no shape of its 1 elements",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named_in_one_line_and_nothing_is_allocated(damage: str, tmp_path: Path) -> None:
    content, expected = DAMAGED[damage]
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest, match=expected) as caught:
            opened(tmp_path, content)
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "x.gguf")) and line.isprintable() and len(line) < 400


def test_wherever_a_file_is_cut_short_it_says_so(tmp_path: Path) -> None:
    opened(tmp_path, ORDERLY)
    for length in range(len(ORDERLY) - 60):
        with pytest.raises(BadRequest, match=r"is cut short.* download it again$"):
            opened(tmp_path, ORDERLY[:length])
    assert opened(tmp_path, ORDERLY[:-60])


def test_what_is_no_readable_file_is_a_bad_request(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"cannot read .*none\.gguf: No such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(BadRequest, match="is no regular file"):
        read_gguf(tmp_path)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Some bytes or a field changed, a piece doubled or cut out, or the file cut short."""
    changed, place = bytearray(content), rng.randrange(len(content))
    choice = rng.randrange(5)
    if choice == 0:
        changed[place] = rng.randrange(256)
    elif choice == 1:
        value = rng.choice([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
        changed[place : place + 8] = struct.pack("<Q", value)
    elif choice == 2:
        del changed[place:]
    elif choice == 3:
        del changed[place : place + rng.randrange(1, 40)]
    else:
        changed[place:place] = changed[place : place + rng.randrange(1, 40)]
    return bytes(changed)


def test_whatever_is_damaged_ends_in_a_header_or_one_line(tmp_path: Path) -> None:
    rng, refused, longest = random.Random(0), 0, 0.0
    for _ in range(2000):
        content = mutated(ORDERLY, rng)
        began = time.process_time()
        try:
            opened(tmp_path, content)
        except BadRequest as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 1000
        longest = max(longest, time.process_time() - began)
    assert refused > 1000
    assert longest < 0.5


def strings(count: int) -> bytes:
    """A header with an array of so many strings."""
    return assemble([key("a", ARRAY, array(STRING, count, b""))], [], 0, alignment=1)


PROMISING = {
    "strings": (strings(300_000), "it describes 2400064 bytes of"),
    "more strings": (strings(300_001), "300001 strings in arrays, more than 300000"),
    "numbers": (
        assemble([key("a", ARRAY, array(UINT32, 5 << 20, b""))], [], 0),
        "a header of more than 16777216 bytes",
    ),
    "tensors": (assemble([], [A], 0, counts=(20_000, 0)), "the tensor  is there twice"),
    "keys": (assemble([NAMED], [], 0, counts=(0, 10_000)), "the key  is there twice"),
}


@pytest.mark.parametrize("what", PROMISING)
def test_a_large_file_that_promises_much_is_refused_in_time(what: str, tmp_path: Path) -> None:
    head, expected = PROMISING[what]
    with (tmp_path / "x.gguf").open("wb") as file:
        file.write(head)
        file.truncate(100 << 20)  # zeros that take no room
    began = time.process_time()
    with pytest.raises(BadRequest, match=expected):
        read_gguf(tmp_path / "x.gguf")
    assert time.process_time() - began < 2
