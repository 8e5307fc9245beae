"""Put the dashboard of `configs/wandb/dashboard.yaml` into a W&B project, or draw it.

    python examples/wandb/dashboard.py --entity NAME --project revdeq     save it as a view of the project (needs a key)
    python examples/wandb/dashboard.py --json                             print what would be saved
    python examples/wandb/dashboard.py --picture FILE RUN [RUN ...]       draw its panels from run folders, without W&B

The first two need W&B's library: pip install '.[dashboard]'.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

TEMPLATE = Path(__file__).resolve().parents[2] / "configs" / "wandb" / "dashboard.yaml"
X_AXIS = "trainer/global_step"
COLUMNS = 3


def workspace(template: dict[str, Any], entity: str, project: str) -> Any:
    """Convert the template to W&B's own objects."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(
            name=section["name"],
            panels=[panel(settings) for settings in section["panels"]],
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=COLUMNS, rows=-(-len(section["panels"]) // COLUMNS)),
        )
        for section in template["sections"]
    ]
    settings = ws.WorkspaceSettings(x_axis=X_AXIS, group_by_prefix="first")
    return ws.Workspace(name=template["name"], entity=entity, project=project, sections=sections, settings=settings)


def panel(settings: dict[str, Any]) -> Any:
    """Convert one panel.

    Raises:
        ValueError: If it is of no known kind.
    """
    import wandb_workspaces.reports.v2 as wr

    title = settings["title"]
    if "lines" in settings:
        return wr.LinePlot(title=title, x=X_AXIS, y=settings["lines"], log_y=settings.get("log_y"))
    if "chart" in settings:
        # As `wandb.plot.line_series` makes it, from the table that it logs beside the chart.
        return wr.CustomChart(
            query={"summaryTable": {"tableKey": f"{settings['chart']}_table"}},
            chart_name="wandb/lineseries/v0",
            chart_fields={"step": "step", "lineKey": "lineKey", "lineVal": "lineVal"},
            chart_strings={"title": title},
        )
    if "table" in settings:
        return wr.WeavePanelSummaryTable(table_name=settings["table"])
    if "pictures" in settings:
        return wr.MediaBrowser(title=title, media_keys=settings["pictures"])
    raise ValueError(f"a panel must have lines, chart, table or pictures, got {settings}")


def keys(template: dict[str, Any]) -> dict[str, list[str]]:
    """Logged keys that the panels show, by the kind of panel."""
    found: dict[str, list[str]] = {"lines": [], "chart": [], "table": [], "pictures": []}
    for section in template["sections"]:
        for settings in section["panels"]:
            for kind, names in found.items():
                value = settings.get(kind, [])
                names += value if isinstance(value, list) else [value]
    return found


def main() -> None:
    """Save, print or draw the dashboard."""
    description, epilog = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", help="user or team on W&B")
    parser.add_argument("--project", default="revdeq")
    parser.add_argument("--json", action="store_true", help="print the view instead of saving it")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the panels instead")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs, for the picture")
    arguments = parser.parse_args()
    template = yaml.safe_load(TEMPLATE.read_text())
    if arguments.picture:
        from picture import draw  # beside this file

        if not arguments.runs:
            parser.error("--picture needs the folder of at least one run")
        return draw(template, arguments.runs, arguments.picture)
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        sys.exit("error: W&B's library is needed: pip install '.[dashboard]'")
    if not (arguments.json or arguments.entity):
        parser.error("the owner of the project is missing: --entity NAME (or --json to print the view)")
    made = workspace(template, arguments.entity or "entity", arguments.project)
    if arguments.json:
        return print(json.dumps(made._spec, indent=1))
    made.save()
    return print(made.url)


if __name__ == "__main__":
    main()
