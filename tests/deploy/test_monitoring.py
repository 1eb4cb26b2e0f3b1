"""deploy/prometheus, deploy/grafana, deploy/runbooks: what they name exists, and what they promise happens."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.prometheus import FAMILIES
from tests.deploy.tools import DEPLOY, ROOT, files, named, program, run

PROMETHEUS = DEPLOY / "prometheus"
RULES = files("prometheus/rules/*.yml")
DASHBOARDS = files("grafana/dashboards/*.json")
every_dashboard = pytest.mark.parametrize("path", DASHBOARDS, ids=map(named, DASHBOARDS))
PROMTOOL = "Debian: apt-get install prometheus"


def alerts() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every rule and panel, Grafana's variables filled in."""
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", re.sub(r"\$\w+", ".*", target["expr"])


@cache
def ray_metrics() -> set[str]:
    """The names in the source of the installed Ray: what its nodes report, and what its own dashboards show."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    dashboard = Path(spec.origin).parent / "dashboard" / "modules"
    reporter = ast.parse((dashboard / "reporter" / "reporter_agent.py").read_text())
    (gauges,) = [
        node.value
        for node in reporter.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Dict)
        and _name(node.targets[0]) == "METRICS_GAUGES"
    ]
    found = {f"ray_{key.value}" for key in gauges.keys if isinstance(key, ast.Constant)}
    for path in (dashboard / "metrics" / "dashboards").glob("*.py"):
        found |= set(re.findall(r"\bray_[a-z_]+", path.read_text()))
    return found


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def test_every_metric_exists() -> None:
    assert "ray_node_mem_used" in ray_metrics() and len(ray_metrics()) > 100
    unknown = {}
    for where, expression in expressions():
        bare = re.sub(r'"[^"]*"', "", expression)
        names = set(re.findall(r"\b(?:shardyard|ray)_\w+", bare))
        assert names or re.search(r"\bup\b", bare), where
        if missing := names - FAMILIES.keys() - ray_metrics():
            unknown[where] = missing
    assert unknown == {}


def test_every_metric_of_ours_is_shown_or_watched() -> None:
    text = " ".join(expression for _, expression in expressions())
    assert [name for name in FAMILIES if name not in text and name.replace("_total", "") not in text] == []


def test_statuses_that_are_named_exist() -> None:
    from typing import get_args

    from trainer.history import Status

    named_ones = {name for _, text in expressions() for name in re.findall(r'status="(\w+)"', text)}
    assert named_ones and named_ones <= {*get_args(Status), "damaged"}


def test_every_alert_has_its_page_and_every_page_its_alert() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names)) > 15
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"].endswith(".")
        page = ROOT / rule["annotations"]["runbook_url"]
        assert page == DEPLOY / "runbooks" / f"{rule['alert']}.md"
        text = page.read_text()
        assert text.startswith(f"# {rule['alert']}\n")
        assert all(f"**{part}**" in text for part in ("What it means.", "How to see it.", "What to do."))
    assert {path.stem for path in files("runbooks/*.md")} == set(names)


def test_every_alert_is_tested_to_fire_and_to_be_quiet() -> None:
    cases = yaml.safe_load((PROMETHEUS / "tests/alerts.yml").read_text())["tests"]
    tried = {True: set(), False: set()}  # type: dict[bool, set[str]]
    for case in cases:
        for test in case["alert_rule_test"]:
            tried[bool(test["exp_alerts"])].add(test["alertname"])
    names = {rule["alert"] for rule in alerts()}
    assert tried == {True: names, False: names}


@every_dashboard
def test_a_dashboard_is_whole(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] and board["title"]
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", re.sub(r"\$__\w+", "", path.read_text())))
    assert used == variables
    assert sorted(panel["id"] for panel in panels(path)) == list(range(1, len(panels(path)) + 1))
    for panel in panels(path):
        place = panel["gridPos"]
        assert panel["title"] and panel["targets"] and place["x"] >= 0 and place["x"] + place["w"] <= 24
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for first, second in combinations([panel["gridPos"] for panel in panels(path)], 2):
        apart = [first[a] + first[s] <= second[a] or second[a] + second[s] <= first[a] for a, s in ("xw", "yh")]
        assert any(apart), (first, second)


def test_grafana_finds_the_dashboards_of_compose() -> None:
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/shardyard.yml").read_text())["providers"]
    grafana = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_text())["services"]["grafana"]
    assert any(volume.endswith(f":{provider['options']['path']}:ro") for volume in grafana["volumes"])


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """Prometheus' folder with a token and targets."""
    shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    shutil.copytree(DEPLOY / "compose/targets", tmp_path / "prometheus/targets")
    (tmp_path / "prometheus/metrics_token").write_text("token")
    return tmp_path / "prometheus"


@pytest.mark.daemon
def test_prometheus_reads_its_config(configured: Path) -> None:
    run(program("promtool", PROMTOOL), "check", "config", configured / "prometheus.yml")


@pytest.mark.daemon
def test_alerts_fire_and_are_quiet(configured: Path) -> None:
    run(program("promtool", PROMTOOL), "test", "rules", configured / "tests/alerts.yml")


@pytest.mark.daemon
def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"x:{i}", "expr": expression} for i, (_, expression) in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    run(program("promtool", PROMTOOL), "check", "rules", "--lint=none", tmp_path / "rules.yml")
