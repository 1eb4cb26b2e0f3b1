"""What a worker reports of the error that ended its training."""

from __future__ import annotations

import pytest

from cluster.child import failure
from configs.errors import Damaged, NotFound, PeerFailed, RunFailed, ShardyardError, Unreachable, UsageError
from trainer.progress import Progress


@pytest.mark.parametrize("error", [UsageError("x"), NotFound("x"), RunFailed("x"), Damaged("shard 3 fails its digest")])
def test_what_a_restart_would_meet_again_is_the_users_to_mend(error: ShardyardError) -> None:
    told = failure(error, Progress())
    assert told["user_error"] and not told["peer_failed"]
    assert told["error"] == str(error)


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), Unreachable("x"), PeerFailed("x")])
def test_what_may_pass_is_not(error: Exception) -> None:
    told = failure(error, Progress())
    assert not told["user_error"]
    assert told["peer_failed"] == isinstance(error, PeerFailed)
