"""The table of what works names a test on each line."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_line_of_what_works_has_a_test():
    page = (ROOT / "docs" / "solvers-and-adjoints.md").read_text()
    section = page.split("## What works around a solve, and inside f")[1].split("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in section.splitlines() if row.startswith("| ")]
    rows = [row for row in rows if row[-1] not in ("test", "---")]
    assert len(rows) > 25
    for row in rows:
        names = re.findall(r"`(test_\w+)::(test_\w+)`", row[-1])
        assert names, row
        for module, test in names:
            tree = ast.parse((ROOT / "tests" / "equilibrium" / f"{module}.py").read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (module, test)
