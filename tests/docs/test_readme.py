"""The README is short, and what it shows runs."""

import re
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 110
    assert max(map(len, lines)) <= 120


def test_its_code_runs_in_eight_lines():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) == 8
    names: dict = {}
    torch.manual_seed(0)
    exec(code, names)
    assert names["solution"].stats.forward_nfe == 8
    assert names["solution"].stats.backward_nfe == 8
    assert all(p.grad.norm() > 0 for p in names["f"].parameters())


def test_the_code_of_get_started_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/get-started.md").read_text(), flags=re.DOTALL)
    exec(code, {})


def test_its_links_lead_somewhere():
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_files_that_a_page_names_exist(page):
    text = page.read_text()
    commands = {
        word for line in re.findall(r"`make ([^`]+)`|^ {4}make (.+)$", text, flags=re.MULTILINE) for word in line
    }
    first = {words.split()[0] for words in commands if words}
    assert first <= TARGETS, first - TARGETS
    files = set(re.findall(r"(?:configs|examples|benchmarks|tests)/[\w/.-]+\.(?:yaml|py|sh|md|csv|png|json)", text))
    assert not [name for name in files if not (ROOT / name).is_file()]


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert [author["family-names"] for author in citation["preferred-citation"]["authors"]] == [
        "McCallum",
        "Arora",
        "Foster",
    ]
    assert "2509.12917" in citation["preferred-citation"]["url"]


def test_continuous_integration_calls_targets_of_the_makefile():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    made = {run.split()[1] for run in runs if run.startswith("make ")}
    assert {"lint", "typecheck", "test", "notebooks"} <= made <= TARGETS
    here = (ROOT / ".ci/run").read_text()
    named = {
        word
        for line in re.findall(r"^make (.+)$", here, flags=re.MULTILINE)
        for word in line.split()
        if "=" not in word
    }
    assert named == {"lint", "typecheck", "test", "test-slow", "test-pythons", "notebooks"}
