"""The documentation builds, and a broken link or a missing reference ends the build."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import revdeq_lightning

pytestmark = pytest.mark.xdist_group("site")

pytest.importorskip("mkdocs", reason="needs the extra `docs`")
ROOT = Path(__file__).resolve().parents[2]


def build(config: Path, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT / "mkdocs.yml", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_page_is_built(site):
    pages = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) >= 16
    assert not [page for page in pages if page.name != "index" and not (site / page / "index.html").is_file()]
    assert len(list((site / "notebooks").glob("*/index.html"))) == 6
    assert (site / "benchmarks/results/core/index.html").is_file()


def test_pages_of_other_folders_do_not_hide_pages_of_docs(tmp_path):
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/hooks.py").write_text((ROOT / "docs/hooks.py").read_text())
    (tmp_path / "docs/benchmarks.md").write_text("# A page\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/README.md").write_text("# Another page\n")
    (tmp_path / "mkdocs.yml").write_text(settings.split("\nnav:")[0])
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode == 1
    assert "benchmarks/README.md and benchmarks.md both become benchmarks/index.html" in result.stderr


def test_pages_need_no_other_host(site):
    for page in ("index.html", "how-it-works/index.html", "notebooks/1_an_equilibrium_in_five_lines/index.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^\" >]+)", (site / page).read_text())
        assert not loaded, page


def test_the_reference_has_every_name_of_the_core(site):
    named = re.findall(r"^::: revdeq_lightning\.(\w+)$", (ROOT / "docs/api/core.md").read_text(), flags=re.MULTILINE)
    assert sorted(named) == sorted(revdeq_lightning.__all__)
    page = (site / "api/core/index.html").read_text()
    assert not [name for name in named if f'id="revdeq_lightning.{name}"' not in page]


@pytest.mark.parametrize(
    ("text", "warnings"),
    [
        ("[a](missing.md) [b](index.md#missing) ![c](missing.png)", ("'missing.md'", "#missing", "'missing.png'")),
        ("::: revdeq_lightning.Missing", ("revdeq_lightning.Missing",)),
    ],
)
def test_what_is_broken_ends_the_build(tmp_path, text, warnings):
    settings = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[0]
    settings = re.sub(r"(?m)^(hooks|extra_css|docs_dir):.*\n", "", settings)
    settings = re.sub(r"(?s)  - mkdocs-jupyter:.*?(?=  - mkdocstrings)", "", settings)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# A page\n\n{text}\n")
    (tmp_path / "mkdocs.yml").write_text(settings.replace("paths: [.]", f"paths: [{ROOT}]"))
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode == 1
    assert not [warning for warning in warnings if warning not in result.stdout + result.stderr]
