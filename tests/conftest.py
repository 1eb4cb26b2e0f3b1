from __future__ import annotations

import os

import pytest

# Before torch is imported anywhere: with few cores, threads that wait for each other cost more than they do.
os.environ["OMP_NUM_THREADS"] = "1"

# Files without processes of their own that still take many seconds together; `make check` leaves them out.
LONGER = (
    "cluster/test_mlflow_copy.py",
    "contract/test_models.py",
    "data_pipelines/test_build.py",
    "data_pipelines/test_near_duplicates.py",
    "data_pipelines/test_sources.py",
    "test_docs.py",
    "trainer/test_checkpoint_files.py",
    "trainer/test_huggingface.py",
    "trainer/test_initialization.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.as_posix().endswith(LONGER):
            item.add_marker(pytest.mark.longer)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--schedules", type=int, default=1, help="how many seeded schedules tests/chaos runs")
    parser.addoption("--first-seed", type=int, default=0, help="seed of the first schedule, to replay one that failed")
