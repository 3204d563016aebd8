"""Geometry is checked against the table of shapes in Wan's own documentation."""

from typing import Any

import numpy as np
import pytest

from wanexport.runtime.decode import decode, encode
from wanexport.runtime.errors import BadRequest
from wanexport.runtime.geometry import Geometry, parse_resolution


@pytest.mark.parametrize(
    ("size", "stride", "latent", "tokens"),
    [
        ((480, 832, 81), 8, (21, 60, 104), 32760),
        ((720, 1280, 81), 8, (21, 90, 160), 75600),
        ((704, 1280, 121), 16, (31, 44, 80), 27280),
        ((480, 832, 1), 8, (1, 60, 104), 1560),
    ],
)
def test_latent_and_tokens_are_wans(
    size: tuple[int, int, int], stride: int, latent: tuple[int, int, int], tokens: int
) -> None:
    geometry = Geometry(*size, stride)
    assert geometry.latent == latent
    assert geometry.num_tokens == tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [("480x832", (480, 832)), ("480X832", (480, 832)), ("832*480", (480, 832))],
)
def test_both_spellings_of_a_resolution(text: str, expected: tuple[int, int]) -> None:
    assert parse_resolution(text) == expected


@pytest.mark.parametrize("sides", [(480, 832), [480, 832], tuple(np.array([480, 832]))])
def test_a_resolution_is_a_pair_of_height_and_width_too(sides: Any) -> None:
    assert repr(parse_resolution(sides)) == "(480, 832)"


@pytest.mark.parametrize(
    "sides",
    [(), (480,), (480, 832, 81), (480.0, 832), (True, 832), (-480, 832), ("480", "832"),
     {480, 832}, np.array([480, 832]), None, ((480, 832), 81)],
)  # fmt: skip
def test_what_is_no_pair_of_whole_numbers_is_no_resolution(sides: Any) -> None:
    with pytest.raises(BadRequest, match=r"is not understood: .* or \(height, width\)") as error:
        parse_resolution(sides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["480", "480x", "x832", "480x832x81", "-480x832", "480 832"])
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="HEIGHTxWIDTH"):
        parse_resolution(text)


def test_illegal_side_names_the_nearest_legal_ones() -> None:
    with pytest.raises(BadRequest, match="multiples of 16; nearest: 480x832 or 48"):
        Geometry(480, 833, 81)
    with pytest.raises(BadRequest, match="multiples of 32; nearest: 704x1280 or"):
        Geometry(720, 1280, 121, 16)
    with pytest.raises(BadRequest, match="nearest: 16x16"):
        Geometry(8, 8, 1)


@pytest.mark.parametrize(
    ("frames", "near"), [(80, "77 or 81"), (82, "81 or 85"), (0, "1 or 5"), (-3, "1 or 5")]
)
def test_illegal_frames_name_the_nearest_legal_ones(frames: int, near: str) -> None:
    with pytest.raises(BadRequest, match=f"nearest: {near}"):
        Geometry(480, 832, frames)


def test_reduced_fits_and_stays_legal() -> None:
    reduced = Geometry(480, 832, 81).reduced(1000)
    assert reduced.grid == (10, 7, 13)
    assert Geometry(704, 1280, 121, 16).reduced(1000).num_tokens <= 1000
    assert Geometry(64, 96, 9).reduced(1000) == Geometry(64, 96, 9)


@pytest.mark.parametrize("numbers", [(16, 16, 4 * 10**9 + 1), (160000, 160000, 1), (64, 96, 9.0)])
def test_what_no_video_has_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(BadRequest, match=r"beyond any Wan|is no video"):
        Geometry(*numbers)


@pytest.mark.parametrize("text", ["9" * 5000 + "x64", 480, "9999999999x16"])
def test_what_is_no_resolution_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="is not understood"):
        parse_resolution(text)


CHUNKS = Geometry(480, 832, 81, chunk=3, cache=21)


def test_a_video_in_chunks_has_the_sizes_of_a_chunk() -> None:
    assert CHUNKS.name == "480x832x81-chunk3-cache21" and CHUNKS.clip_frames == 21
    assert (CHUNKS.latent, CHUNKS.grid) == ((3, 60, 104), (3, 30, 52))
    assert (CHUNKS.num_tokens, CHUNKS.frame_tokens) == (4680, 1560)
    assert CHUNKS.options == "--resolution 480x832 --frames 81 --chunk 3 --cache 21"


def test_the_slots_of_a_cache_have_one_for_what_fills_a_chunk_up() -> None:
    assert CHUNKS.slots == 22
    assert Geometry(480, 832, 81, chunk=1, cache=7).slots == 7


@pytest.mark.parametrize(("chunk", "cache"), [(0, 3), (3, 0), (3, 2), (-1, 3), (-3, -3)])
def test_a_cache_that_holds_no_chunk_is_refused(chunk: int, cache: int) -> None:
    with pytest.raises(
        BadRequest, match=f"a chunk of {chunk} latent frames and a cache of {cache}"
    ):
        Geometry(480, 832, 81, chunk=chunk, cache=cache)


def test_reduced_keeps_the_chunk_and_a_cache_of_more_than_two() -> None:
    small = CHUNKS.reduced(1000)
    assert small.num_tokens <= 1000 and (small.chunk, small.cache) == (3, 7)
    assert Geometry(480, 832, 81, chunk=3, cache=3).reduced(1000).cache == 3
    assert Geometry(16, 16, 81, chunk=20, cache=20).reduced(9).chunk == 5


def test_chunks_are_written_only_where_there_are_any() -> None:
    plain = Geometry(480, 832, 81)
    assert encode(plain) == {"height": 480, "width": 832, "frames": 81, "spatial_stride": 8}
    for geometry in (plain, CHUNKS):
        assert decode(Geometry, encode(geometry), "geometry") == geometry
