"""Put pages that live outside of docs/ into the site: notebooks, examples, and benchmarks with their results.

Pages link to them as files of the repository (`../benchmarks/paper.md`), so that the links work in both places.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "notebooks", "examples")
ENDINGS = (".md", ".ipynb", ".csv", ".json", ".png")


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add the files of the other folders.

    Raises:
        ValueError: If two pages would have the same place.
    """
    taken = {file.dest_uri: file.src_uri for file in files}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in ENDINGS or "__pycache__" in path.parts:
                continue
            name = path.relative_to(ROOT).as_posix()
            file = File(name, str(ROOT), config["site_dir"], config["use_directory_urls"])
            if "results" in path.parts:  # reached by links, not by the menu
                file.inclusion = InclusionLevel.NOT_IN_NAV
            if file.dest_uri in taken:
                raise ValueError(f"{name} and {taken[file.dest_uri]} both become {file.dest_uri}: rename one")
            taken[file.dest_uri] = name
            files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links between docs/ and the other folders lead to their places in the site."""
    if page.file.src_uri.split("/")[0] in FOLDERS:
        return markdown.replace("](../docs/", "](../")
    return re.sub(rf"\]\(\.\./({'|'.join(FOLDERS)})/", r"](\1/", markdown)
