from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--schedules", type=int, default=1, help="how many seeded schedules tests/chaos runs")
    parser.addoption("--first-seed", type=int, default=0, help="seed of the first schedule, to replay one that failed")
