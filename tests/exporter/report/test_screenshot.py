"""The page in headless Chromium: light, dark, and on a phone. Outside the quick tests."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.exporter.report.saved_figures import BENCH, PROFILE
from wanexport.exporter.compare.compare import compare
from wanexport.exporter.report.report import report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: install the package chromium"),
]
DARK = "--blink-settings=preferredColorScheme=0"
MEASURE = "<script>document.title = document.documentElement.scrollWidth</script>"


@pytest.fixture
def page(bundle: Path) -> Path:
    compare(bundle, dtype="fp32", steps=2, bisect=True)
    for name, figures in (("bench-x", BENCH), ("profile-x", PROFILE)):
        (bundle / "reports" / f"{name}.json").write_text(json.dumps(figures))
    return Path(report(bundle)["page"])


def chromium(*arguments: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    child = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    return child.stdout


def pixels(page: Path, width: int, *arguments: str) -> np.ndarray:
    picture = page.with_suffix(".png")
    chromium(*arguments, f"--window-size={width},1600", f"--screenshot={picture}", page.as_uri())
    return np.asarray(Image.open(picture).convert("L")).astype(float)


def test_it_is_light_or_dark_as_the_reader_likes_and_readable_in_both(page: Path) -> None:
    light, dark = pixels(page, 1100), pixels(page, 1100, DARK)
    assert np.median(light) > 240 and np.median(dark) < 30
    for picture in (light, dark):  # text, of much contrast to what lies behind
        contrast = np.abs(picture - np.median(picture))
        assert 0.005 < np.mean(contrast > 150) < 0.3


@pytest.mark.parametrize("width", [500, 1100])
def test_it_is_as_wide_as_its_window(page: Path, width: int) -> None:
    """A browser scrolls sideways where anything is wider; tables scroll in themselves."""
    measured = page.with_name("measured.html")
    measured.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    shown = chromium(f"--window-size={width},1600", "--dump-dom", measured.as_uri())
    (title,) = re.findall(r"<title>(\d+)</title>", shown)
    assert int(title) <= width
