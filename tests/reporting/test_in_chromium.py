"""The page as a browser shows it: on a telephone in the dark, and on a large screen in the light."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from revdeq_lightning.report.page import write_report
from tests.reporting.run_folders import whole_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package: chromium)")

# Everything is opened, as a reader may do, then measured.
PROBE = """
<script>
document.querySelectorAll("details").forEach(d => d.open = true);
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const style = getComputedStyle(document.documentElement);
// The window is made narrower than its least width only for the picture: measure then, too.
const probe = () => console.log("PROBE " + JSON.stringify({
  inner: innerWidth, scroll: document.documentElement.scrollWidth, height: box(document.body)[3],
  plots: [...document.querySelectorAll(".plot > svg")].map(e => [e.getAttribute("aria-label"), ...box(e)]),
  pictures: [...document.images].map(e => [e.naturalWidth, ...box(e)]),
  outside: [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll") && box(e)[2] > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 80)),
  colors: [0, 1].map(i => style.getPropertyValue("--series-" + i)),
}) + " END");
probe();
addEventListener("resize", probe);
</script>
"""


def shown(folder: Path, page: Path, width: int, dark: bool) -> tuple[dict, np.ndarray, list[str]]:
    """Measures of the page, its picture, and what the console got besides."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    options = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--enable-logging=stderr", f"--user-data-dir={folder / 'user'}", f"--window-size={width},12000"),
        *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={folder / 'page.png'}"),
    )
    command = [str(CHROMIUM), *options, probed.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    lines = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    found = [match for line in lines if (match := re.search(r"PROBE (\{.*\}) END", line))]
    assert found, result.stderr
    others = [line for line in lines if "PROBE" not in line]
    return json.loads(found[-1][1]), np.asarray(Image.open(folder / "page.png").convert("RGB")).astype(int), others


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1200, False)])
def test_a_run_is_shown_whole(tmp_path, width, dark):
    page = write_report([whole_run(tmp_path / "small" / "v")])
    measures, picture, errors = shown(tmp_path, page, width, dark)
    assert errors == []
    assert (measures["inner"], measures["scroll"]) == (width, width)
    assert measures["outside"] == []
    assert measures["height"] < len(picture)
    assert (picture[5, 5].mean() < 60) == dark
    assert len(measures["plots"]) == 16
    assert len(measures["pictures"]) == 1
    assert all(natural > 0 for natural, *_ in measures["pictures"])
    curves = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in measures["colors"]]
    for title, *box in measures["plots"]:
        left, top, right, bottom = (round(edge) for edge in box)
        assert right - left > 0.25 * width, title
        pixels = picture[top:bottom, left:right]
        colored = sum(int((np.abs(pixels - curve).max(-1) < 25).sum()) for curve in curves)
        assert colored > 40, f"{title} is empty: {colored} pixels of a curve's color"
        background = picture[top + 1, left + 1]
        assert (np.abs(pixels - background).max(-1) > 100).sum() > 150, f"{title} has no text that can be read"
