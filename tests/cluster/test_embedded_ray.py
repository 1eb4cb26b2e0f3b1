"""Where the Ray of this machine keeps its files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import embedded_ray

# As Ray 2.60 said it of a folder in which it could not start.
SOCKET = "session_2026-11-28_12-42-02_214597_{pid}/sockets/plasma_store"


@given(st.integers(1, 60), st.sampled_from("aß"))
def test_sockets_have_paths_that_the_system_allows(length: int, letter: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="t") as above, pytest.MonkeyPatch.context() as patch:
        base = Path(above, letter * length)
        base.mkdir()
        patch.setattr(tempfile, "tempdir", str(base))
        folder = embedded_ray._new_folder()
        folder.rmdir()
        fits = [
            len(os.fsencode(f"{each / folder.name}/{SOCKET.format(pid=os.getpid())}")) <= 107
            for each in (base, Path("/tmp"))
        ]
        assert fits[1] and folder.parent == (base if fits[0] else Path("/tmp"))
