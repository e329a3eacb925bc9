"""The W&B workspace: the panels of `qarl.dashboard` as a saved view of the project.

An online run makes it when it starts. After `wandb sync` of an offline run, `python -m qarl.workspace RUN` does. A
project has one view for one table of panels; the runs that come later find it, with whatever a person changed in it.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from qarl.dashboard import SAMPLES, SECTIONS, Chart, Section
from qarl.errors import ConfigError
from qarl.rundir import load_config

NAME = "QaRL"
TABLE = "samples"
"""Key of the responses, a `wandb.Table`."""


def build_workspace(entity: str, project: str) -> Any:
    """A `wandb_workspaces.workspaces.Workspace`, not saved yet; needs no network."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=s.title, panels=[_hints(s), *map(_panel, s.charts)], is_open=True, layout_settings=_layout(s))
        for s in SECTIONS
    ]
    sections.append(ws.Section(name=SAMPLES, panels=[wr.WeavePanelSummaryTable(table_name=TABLE)], is_open=True))
    workspace = ws.Workspace(entity=entity, project=project, name=NAME, sections=sections)
    workspace._internal_name = f"nw-{view_name()}-v"
    return workspace


def save_workspace(entity: str, project: str) -> str:
    """Make the view unless the project has it; its address. Raises what W&B's network and key checks raise."""
    import wandb_workspaces.workspaces as ws

    workspace = build_workspace(entity, project)
    address: str = workspace.url
    try:
        ws.Workspace.from_url(address)
    except ValueError as error:  # how the library says that the view, or its project, is not there
        if "not found in project" not in str(error):
            raise
        workspace.save()
    return address


def view_name() -> str:
    """The `nw=` of its address: other panels, another view."""
    return "qarl" + hashlib.sha256(repr(SECTIONS).encode()).hexdigest()[:8]


def _panel(chart: Chart) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(
        title=chart.title,
        y=list(chart.metrics),
        log_y=chart.scale == "log",
        plot_type="stacked-area" if chart.stacked else "line",
    )


def _hints(section: Section) -> Any:
    """W&B's charts have no notes, so they stand in a panel of their own."""
    import wandb_workspaces.reports.v2 as wr

    return wr.MarkdownPanel(markdown="\n\n".join(f"**{chart.title}.** {chart.hint}" for chart in section.charts))


def _layout(section: Section) -> Any:
    """Every panel of the section is in view, three in a row."""
    import wandb_workspaces.workspaces as ws

    return ws.SectionLayoutSettings(columns=3, rows=len(section.charts) // 3 + 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qarl.workspace", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that W&B has")
    parser.add_argument("--entity", help="W&B user or team; default: that of the login")
    arguments = parser.parse_args()
    if not (arguments.run / "config.yaml").exists():
        parser.error(f"{arguments.run}: no run is there (config.yaml is missing)")
    try:
        project = load_config(arguments.run).logging.project
    except ConfigError as error:
        parser.error(str(error))
    import wandb

    try:
        entity = arguments.entity or wandb.Api().default_entity
        if not entity:
            parser.error("W&B does not say whose login this is: name the user or team with --entity")
        print(save_workspace(entity, project))
    except wandb.Error as error:
        parser.error(f"W&B: {error}")


if __name__ == "__main__":
    main()
