"""Fixtures of the tests of pages, by a client and in a browser."""

from tests.cluster.dashboard.browser import browser, page
from tests.cluster.dashboard.page_store import client, store

__all__ = ["browser", "client", "page", "store"]
