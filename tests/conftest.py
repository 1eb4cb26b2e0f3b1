from __future__ import annotations

import os

import pytest

# Before torch is imported anywhere: with few cores, threads that wait for each other cost more than they do.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--schedules", type=int, default=1, help="how many seeded schedules tests/chaos runs")
    parser.addoption("--first-seed", type=int, default=0, help="seed of the first schedule, to replay one that failed")
