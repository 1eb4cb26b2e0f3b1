"""The last save of an attempt failed on some rank: rank 0 tells why, the others leave it to rank 0."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import PeerFailed, RunFailed
from trainer import session


@pytest.mark.parametrize("error", [None, "The checkpoint of step 5 was not saved: the disk is full."])
def test_rank_0_reports_the_cause(error: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "all_sum", lambda _: [1.0])
    checkpointer = SimpleNamespace(wait=lambda: None, last_error=error)
    for rank, kind in ((0, RunFailed), (1, PeerFailed)):
        found: Any = SimpleNamespace(checkpointer=checkpointer, world=SimpleNamespace(rank=rank))
        with pytest.raises(kind, match=error or "step 5"):
            session.Session.wait_until_saved(found, 5)
