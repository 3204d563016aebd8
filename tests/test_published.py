"""What the scripts of docs/published_optimisations.md count and compare, at small sizes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.documents import ROOT, document
from tests.tables import published_all
from tests.tables.published import helios, norms, page, persistent, summary, wan
from tests.tables.published.causal import PATCH, TEXT_DIM, CausalWan
from tests.tables.published.causal_cache import CausalSize, Host, new_caches, rope_table, rotate
from tests.tables.published.causal_chunks import STEPS, told
from tests.tables.published.clock import Times, ratio
from tests.tables.published.host_waits import causal_model, counted, digest
from tests.tables.published.rope_forms import (
    both,
    complex_reference,
    differing,
    stacked,
    strided,
    strided_helios,
)
from tests.tables.published.section import Section, each

pytest.importorskip("diffusers", reason="needs diffusers")

TINY = wan.Size(1, 1, 2, 2, torch.float32, heads=1, ffn_dim=64)
CAUSAL = CausalSize(2, 1, 32, 2, 1, 2, torch.float32, text_len=3)
PAGE = "docs/published_optimisations.md"


@pytest.fixture(scope="module")
def model() -> CausalWan:
    return causal_model(CAUSAL, "cpu")


def velocity(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(**wan.inputs(TINY, "cpu"))[0]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_forms_of_the_rotation_have_the_same_bits_and_are_the_complex_product(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(2, 5, 3, 16).to(dtype), torch.randn(1, 5, 1, 8)
    cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    assert torch.equal(stacked(x, cos, sin), strided(x, cos, sin))
    right = complex_reference(x, cos, sin)
    error = (stacked(x, cos, sin).double() - right).norm() / right.norm()
    assert error < torch.finfo(dtype).eps


def test_elements_that_differ_are_counted() -> None:
    x = torch.zeros(8)
    assert differing(x, x.clone()) == "the same bits"
    assert differing(x, x + torch.eye(8)[0]) == "12 % of elements differ"


def test_the_copy_of_the_strided_form_is_what_diffusers_computes() -> None:
    right = velocity(wan.denoiser(TINY, "cpu"))
    for form in (strided, stacked):
        assert torch.equal(velocity(wan.put(wan.denoiser(TINY, "cpu"), both(form))), right)
    wrong = both(lambda x, cos, sin: stacked(x, cos, -sin))
    assert not torch.equal(velocity(wan.put(wan.denoiser(TINY, "cpu"), wrong)), right)


def test_the_three_functions_are_what_a_block_of_diffusers_computes() -> None:
    right = velocity(wan.denoiser(TINY, "cpu"))
    put = norms.put(wan.denoiser(TINY, "cpu"), norms.Functions())
    assert torch.equal(velocity(put), right)


def test_the_eleven_cases_of_helios_hold_with_the_real_function() -> None:
    name, real = helios.function()
    assert name.startswith("diffusers ")
    said = dict(helios.cases(real, "cpu"))
    assert [int(label.partition(":")[0]) for label in said] == list(range(1, 12))
    assert all(said[label].startswith("the same bits") for label in helios.EQUAL)
    assert said["11: an odd head_dim, new and old"].startswith("RuntimeError, RuntimeError")
    given = helios.random((1, 8, 2, 32), torch.bfloat16, "cpu")
    assert torch.equal(strided_helios(*given), real(*given))


def test_a_case_of_helios_that_does_not_hold_is_seen() -> None:
    said = dict(helios.cases(lambda x, table: strided_helios(x, -table), "cpu"))
    assert all("differ" in said[label] for label in helios.EQUAL)


def test_a_diffusers_without_helios_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_helios", None)
    name, used = helios.function()
    assert name.endswith("has no Helios, 0.37 has") and used is strided_helios


def test_the_causal_forward_has_the_same_bits_wherever_its_integers_come_from(
    model: CausalWan,
) -> None:
    assert len({digest(model, host, "cpu") for host in Host}) == 1


def test_host_reads_are_those_of_the_code_line_by_line(model: CausalWan) -> None:
    """On a GPU the two `fill_` of the cache's indices read as well: 15 and 1 a layer there."""
    forwards, chunks = 2 * (len(STEPS) + 1), 2
    of_sampling = chunks * (len(STEPS) + len(STEPS) - 1)
    right = {
        Host.READ: forwards * (13 * CAUSAL.layers + 3) + of_sampling,
        Host.PASSED: forwards * 2 + of_sampling,
        Host.HOISTED: 0,
    }
    for host, reads in right.items():
        assert counted(model, host, "cpu").get("aten::item", (0, 0.0))[0] == reads, host


def second_chunk(model: CausalWan, host: Host, first: torch.Tensor, limit: int) -> torch.Tensor:
    """The velocity of a second chunk of ones, after a first one."""
    caches, text, t = new_caches(CAUSAL, "cpu"), torch.ones(1, 3, TEXT_DIM), torch.tensor([500])
    for number, x in enumerate((first, torch.ones(first.shape))):
        known = replace(told(CAUSAL, host, number, number), limit=limit)
        velocity = model(x, t, text, caches, known)
    return velocity


@pytest.mark.parametrize("host", Host)
def test_a_second_chunk_sees_the_first_as_far_as_it_may(model: CausalWan, host: Host) -> None:
    one, other = torch.randn(2, CAUSAL.chunk_tokens, PATCH)
    both_chunks, own = 2 * CAUSAL.chunk_tokens, CAUSAL.chunk_tokens
    seen = [second_chunk(model, host, first, both_chunks) for first in (one, other)]
    unseen = [second_chunk(model, host, first, own) for first in (one, other)]
    assert not torch.equal(*seen)
    assert torch.equal(*unseen)


def test_the_causal_rotation_continues_where_the_chunk_before_ended() -> None:
    x = torch.randn(1, 12, 2, 128, dtype=torch.float64)
    table = rope_table()
    whole = rotate(x, [[3, 2, 2]], table, 0)
    last = rotate(x[:, 8:], [[1, 2, 2]], table, 2)
    assert torch.equal(whole[:, 8:], last)
    assert not torch.equal(whole[:, 8:], rotate(x[:, 8:], [[1, 2, 2]], table, 0))


def test_the_profiler_counts_one_read_for_each_item() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        assert torch.ones(3).sum().item() == 3
    counts = {e.key: e.count for e in profiler.key_averages()}
    assert counts["aten::item"] == counts["aten::_local_scalar_dense"] == 1


KERNELS = """
import torch
from tests.tables.published.inplace_kernels import rotate_in_place, rotate_new
from tests.tables.published.rope_forms import stacked

torch.manual_seed(0)
q, k = torch.randn(2, 1, 4, 3, 32)
angles = torch.randn(1, 4, 1, 16)
cos, sin = angles.cos(), angles.sin()
wide = [table.repeat_interleave(2, -1) for table in (cos, sin)]
right = [stacked(x, *wide) for x in (q, k)]
new = [rotate_new(x, cos, sin) for x in (q, k)]
made = rotate_in_place(q, k, cos, sin)
assert made[0] is q and made[1] is k
for one in (new, made):
    for a, b in zip(one, right):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
"""


@pytest.mark.slow
def test_the_kernels_rotate_and_the_one_in_place_writes_over_its_input() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(
        [sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert child.returncode == 0, child.stderr


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    slow, fast = Times((2.0, 40.0, 3.0)), Times((1.0, 10.0, 2.0))
    assert ratio(slow, fast) == "2.000 (1.500 to 4.000)"
    assert str(Times((1.0, 1234.5, 20.0))) == "20 (1 to 1234)"


def process(requests: int, seconds: float) -> dict[str, Any]:
    stages = {"opening": 2.0, "prewarm": 1.0} | {f"request {n}": 3.0 for n in (1, 2, 3)}
    return {"process": seconds, "stages": stages, "latents": ["a", "b", "c"][:requests]}


def test_three_processes_are_held_against_one_for_three_requests() -> None:
    alone, together = [process(1, 10), process(1, 12)], [process(3, 15), process(3, 12)]
    said = dict(persistent.cells(alone, together))
    assert said["three processes / one process"] == "2.5 (2 to 3)"
    assert said["prewarm, s"] == "1 (1 to 1)"
    assert said["latents of a prompt, over all processes"] == "the same bits"
    alone[0]["latents"] = ["b"]
    assert dict(persistent.cells(alone, together))[list(said)[-1]] == "differ"


MADE = Section("made", {"time, ms": "1.5", "only here": "", "never": ""}, lambda place: ())
TEXT = "before\n\n<!-- published: made -->\n<!-- end of published -->\n\nafter\n"


def test_a_run_fills_its_column_and_leaves_the_other() -> None:
    first = {"device": "cpu", "sections": {"made": {"cells": {"time, ms": "7", "only here": "x"}}}}
    second = {"device": "cuda", "sections": {"made": {"cells": {"time, ms": "2"}}}}
    known = {"made": MADE}
    text = page.filled(page.filled(TEXT, known, first), known, second)
    assert "| time, ms | 1.5 | 7 | 2 |" in text
    assert "| only here | | x | |" in text
    assert "never" not in text
    assert page.filled(text, known, {}) == text
    assert page.filled(text, known, {"device": "cpu", "sections": {}}) == text


def test_the_summary_has_what_the_other_tables_say() -> None:
    known = {name: published_all.section(name) for name in published_all.NAMES}
    marks = "".join(
        f"<!-- published: {name} -->\n<!-- end of published -->\n" for name in ("summary", "rope")
    )
    cells = {"strided / stack + flatten": "1.234 (1.1 to 1.3)"}
    record = {"device": "cuda", "sections": {"rope": {"cells": cells}}}
    text = page.filled(marks, known, record)
    assert "| RoPE as stack + flatten: by itself | | | 1.234 |" in text
    assert page.filled(text, known, {}) == text
    assert all(row in known[name].rows for name, row in summary.PICKED.values())


def test_a_cell_of_no_row_is_refused() -> None:
    wrong = Section("made", MADE.rows, lambda place: [("time, s", "1")])
    with pytest.raises(ValueError, match="has no row for 'time, s'"):
        list(wrong.cells(None))  # type: ignore[arg-type]


def test_a_step_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    steps = (lambda: [("a", "1")], lambda: [(str(1 // 0), "2")], lambda: [("c", "3")])
    said: list[tuple[str, str]] = []
    with pytest.raises(ZeroDivisionError):
        said.extend(each(*steps))
    for cell in (("a", "1"), ("c", "3")):
        assert cell in said
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_page_has_every_section_and_its_rows() -> None:
    text = document(PAGE).text
    assert sorted(page.names_in(text)) == sorted([*published_all.NAMES, summary.NAME])
    known = {name: published_all.section(name) for name in published_all.NAMES}
    assert page.filled(text, known, {}) == text
    assert all(known[name].name == name for name in known)


def test_a_section_that_takes_too_long_is_cut(tmp_path: Path) -> None:
    told = published_all.run("machine", "cpu", tmp_path, 0.05)
    assert told["cells"] == {} and told["ended"].startswith("cut after")


def test_a_run_is_saved_and_written_into_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"cells": {"processor": "a GPU"}, "seconds": 1.0, "ended": "done"}
    monkeypatch.setattr(published_all, "run", lambda *_: told)
    file, copy = tmp_path / "run.json", tmp_path / "page.md"
    with pytest.raises(SystemExit) as ended:
        published_all.main(["machine", "--device", "cuda", "--out", str(file)])
    assert ended.value.code == 0 and "| processor | | a GPU |" in capsys.readouterr().out
    assert json.loads(file.read_text())["sections"]["machine"] == told
    copy.write_text("<!-- published: machine -->\n<!-- end of published -->\n")
    published_all.main(["--write", str(file), str(copy)])
    assert "| processor | | a GPU |" in copy.read_text()


def test_a_section_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        published_all.main(["rotary"])
    assert ended.value.code == 2 and "no section is called rotary" in capsys.readouterr().err


def test_what_a_library_prints_is_no_cell() -> None:
    assert published_all._pair('["a", "b"]\n') == ("a", "b")
    assert published_all._pair("USDT: profiler_start\n") is None
    assert published_all._pair("3\n") is None
