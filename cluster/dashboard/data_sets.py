"""The data sets of a store: what they hold, and their examples by number.

What reads them takes megabytes of memory, and is imported when somebody looks at one.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response

from cluster.dashboard.run_view import Row
from cluster.dashboard.store_view import StoreView
from configs.errors import NotFound, ShardyardError
from data_pipelines.storage import FileFacts, Store
from trainer.record import recorded_datasets

if TYPE_CHECKING:
    from data_pipelines.shards import Dataset

ON_A_PAGE = 5  # examples


def add(app: FastAPI, opened: Datasets) -> None:
    """Add the API behind the pages."""

    @app.get("/api/datasets", tags=["data sets"])
    def api() -> list[dict[str, Any]]:
        """All data sets of the store."""
        return opened.summaries()

    @app.get("/api/datasets/{name}/examples", tags=["data sets"])
    def examples(name: str, split: str, first: int = 0, count: int = ON_A_PAGE) -> list[dict[str, Any]]:
        """Examples of a split from number `first` on."""
        return opened.examples(name, split, first, min(count, 100))

    @app.get("/api/datasets/{name}/picture", tags=["data sets"], response_class=Response)
    def picture(name: str, split: str, number: int, column: str) -> Response:
        """A picture of an example, as PNG."""
        return Response(opened.picture(name, split, number, column), media_type="image/png")


class Datasets:
    """The data sets of a store, each opened once. Safe for threads."""

    def __init__(self, store: StoreView) -> None:
        self._store = store
        self._opened: dict[str, tuple[FileFacts, Dataset]] = {}
        self._lock = threading.Lock()

    @cached_property
    def _folder(self) -> Store:
        from data_pipelines.build import FOLDER

        return self._store.store.child(FOLDER)

    def names(self) -> list[str]:
        """Of those that were built, and of those that are being built."""
        return list(self._folder.list_dirs()) if self._folder.exists() else []

    def open(self, name: str) -> Dataset:
        """One of them. Raises NotFound, Damaged."""
        from data_pipelines.index import INDEX_FILE
        from data_pipelines.shards import Dataset

        if name not in self.names():  # a name comes from outside: it must not lead out of the store
            raise NotFound(f"There is no data set '{name}' in {self._folder.uri}.")
        facts = self._folder.info(f"{name}/{INDEX_FILE}")
        if facts is None:
            raise NotFound(f"The data set '{name}' has no index: it is being built, or its build was cut off.")
        with self._lock:
            known = self._opened.get(name)
            if known is None or known[0] != facts:  # the former one is let go of when nobody reads it any more
                known = self._opened[name] = (facts, Dataset.open(self._folder.child(name)))
            return known[1]

    def summaries(self) -> list[Row]:
        """{name, built_at, fingerprint, source, columns, splits, runs, error}, the newest first."""
        readers = self._readers()
        found = []
        for name in self.names():
            row: Row = {"name": name, "built_at": None, "runs": readers.get(name, []), "error": None}
            try:
                row |= self.summary(name)
            except ShardyardError as error:
                row |= {"error": str(error)}
            found.append(row)
        return sorted(found, key=lambda row: row["built_at"] or 0.0, reverse=True)

    def summary(self, name: str) -> Row:
        """What its index says: {name, built_at, fingerprint, source, columns, splits, ...}."""
        from data_pipelines.inspect import counts

        dataset = self.open(name)
        index, changed = dataset.index, self._opened[name][0].changed
        return {
            "name": name,
            "built_at": None if changed is None else changed / 1e9,
            "path": dataset.path,
            "fingerprint": dataset.fingerprint,
            "source": dict(index.source),
            "columns": [column.to_json() for column in index.columns],
            "vocab_size": index.tokenizer.vocab_size if index.tokenizer else None,
            "compression": index.compression,
            "quarantined": index.quarantined,
            "splits": {split: counts(dataset, split) for split in dataset.splits},
        }

    def examples(self, name: str, split: str, first: int, count: int) -> list[Row]:
        """Examples by number: {number, values: {column: what inspect.py shows of it}}. Raises NotFound."""
        from data_pipelines.inspect import examples_of

        dataset = self.open(name)
        rows = dataset.split(split).num_rows
        numbers = range(max(first, 0), min(max(first, 0) + count, rows))
        shown = examples_of(dataset, split, numbers)
        return [{"number": number, "values": values} for number, values in zip(numbers, shown, strict=True)]

    def picture(self, name: str, split: str, number: int, column: str) -> bytes:
        """A PNG file. Raises NotFound where there is no picture."""
        from data_pipelines.inspect import picture_of
        from data_pipelines.pictures import png

        dataset = self.open(name)
        rows = dataset.split(split).num_rows
        known = column in {each.name for each in dataset.index.columns}
        found = picture_of(dataset, split, number, column) if known and 0 <= number < rows else None
        if found is None:
            raise NotFound(f"Example {number} of '{name}' has no picture '{column}'.")
        return png(found)

    def _readers(self) -> dict[str, list[str]]:
        """Runs by the data set that they read."""
        found: dict[str, list[str]] = {}
        for run in self._store.names():
            try:
                names = recorded_datasets(self._store.store.child(run))
            except ShardyardError:
                continue
            for name in names:
                found.setdefault(name, []).append(run)
        return found
