"""The table of panels against what a run writes, and the W&B workspace against a server that speaks W&B's GraphQL."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qarl.dashboard import SAMPLES, SECTIONS
from qarl.metrics import METRICS, STAGES
from qarl.report_cards import COLORS, DASHES
from qarl.wandb_run import TABLE
from qarl.workspace import build_workspace, view_name

CHARTS = [chart for section in SECTIONS for chart in section.charts]
TABLE_ONLY = {"mismatch/tokens", "mismatch/dropped_share", "objective/kl"}
"""Metrics in no chart: the report's table of the newest step has them."""


def test_every_chart_draws_metrics_there_are_and_every_metric_stands_in_one_chart():
    drawn = Counter(name for chart in CHARTS for name in chart.metrics)
    assert set(drawn) <= set(METRICS)
    assert set(METRICS) - set(drawn) == TABLE_ONLY
    assert [name for name, times in drawn.items() if times > 1] == []


def test_charts_can_be_told_apart_and_say_what_healthy_looks_like():
    titles = [chart.title for chart in CHARTS] + [section.title for section in SECTIONS if len(section.charts) > 1]
    assert len(set(titles)) == len(titles)
    for chart in CHARTS:
        assert chart.hint.endswith("."), chart.title
        assert len(chart.lines) <= (COLORS if chart.stacked else DASHES), chart.title


def test_lines_of_a_chart_share_its_scale():
    for chart in CHARTS:
        units = {METRICS[name].unit for name in chart.metrics}
        assert (units == {"share"}) or chart.scale != "percent", chart.title
        assert units == {"s"} or not chart.stacked, chart.title
    (stages,) = (chart.metrics for chart in CHARTS if chart.title == "Time by stage")
    assert set(stages) == set(STAGES), "the stack is the whole step"


def test_the_workspace_has_the_panels_of_the_table_and_the_responses():
    view = build_workspace("team", "project")._to_model()
    sections = json.loads(view.spec.model_dump_json(by_alias=True))["section"]["panelBankConfig"]["sections"]
    sections = [s for s in sections if s["panels"]]
    assert [s["name"] for s in sections] == [s.title for s in SECTIONS] + [SAMPLES]
    for made, section in zip(sections, SECTIONS, strict=False):
        hints, *panels = made["panels"]
        assert all(chart.hint in hints["config"]["value"] for chart in section.charts)
        configs = [panel["config"] for panel in panels]
        assert [c["chartTitle"] for c in configs] == [chart.title for chart in section.charts]
        assert [tuple(c["metrics"]) for c in configs] == [chart.metrics for chart in section.charts]
        assert [bool(c.get("yLogScale")) for c in configs] == [chart.scale == "log" for chart in section.charts]
        assert [c["plotType"] == "stacked-area" for c in configs] == [chart.stacked for chart in section.charts]
        assert made["flowConfig"]["columnsPerPage"] * made["flowConfig"]["rowsPerPage"] >= len(made["panels"])
    assert json.dumps(sections[-1]).count(f'"{TABLE}"') == 1


class Server:
    """W&B as far as views go: it keeps what is saved and finds it again by name."""

    def __init__(self) -> None:
        self.views: dict[str, dict[str, Any]] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps(server.answer(asked["query"], asked.get("variables") or {})).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{http.server_address[1]}"

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in query:
            self.views[variables["name"]] = variables
            return {"data": {"upsertView": {"view": {"id": "1", "name": variables["name"]}, "inserted": True}}}
        if "allViews" in query:
            found = [self.views[variables["viewName"]]] if variables["viewName"] in self.views else []
            nodes = [{"node": {"id": "1", "displayName": v["displayName"], "spec": v["spec"]}} for v in found]
            return {"data": {"project": {"allViews": {"edges": nodes}}}}
        if "viewer" in query:
            return {"data": {"viewer": {"id": "1", "entity": "somebody", "username": "somebody", "flags": "{}"}}}
        return {"errors": [{"message": f"this server does not know {query[:80]}"}]}


def make_workspace(run_dir: Path, url: str, *arguments: str, key: str = "0" * 40) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env = clean | {"WANDB_BASE_URL": url, "WANDB_API_KEY": key, "WANDB_ERROR_REPORTING": "false", "HOME": str(run_dir)}
    command = [sys.executable, "-m", "qarl.workspace", str(run_dir), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_the_command_saves_one_view_for_a_project_and_later_runs_find_it(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("logging: {project: sums}\n")
    server = Server()
    done = make_workspace(tmp_path, server.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{server.url}/somebody/sums?nw={view_name()}"
    ((name, saved),) = server.views.items()
    assert name == f"nw-{view_name()}-v"
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("somebody", "sums", "QaRL")
    saved["displayName"] = "a person renamed it"
    again = make_workspace(tmp_path, server.url, "--entity", "somebody")
    assert again.returncode == 0 and again.stdout == done.stdout
    assert server.views == {name: saved}, "what a person changed is kept"


def test_the_command_refuses_a_folder_that_is_no_run(tmp_path: Path):
    done = make_workspace(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 2 and "config.yaml is missing" in done.stderr


def test_the_command_says_what_it_lacks_without_a_traceback(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("logging: {project: sums}\n")
    done = make_workspace(tmp_path, "http://127.0.0.1:9", key="")
    assert done.returncode == 2 and "error: W&B: No API key configured" in done.stderr
    (tmp_path / "config.yaml").write_text("guard: {max_mismatch: 1}\n")
    done = make_workspace(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 2 and "config.yaml: guard.max_mismatch: unknown key" in done.stderr
    assert "Traceback" not in done.stderr
