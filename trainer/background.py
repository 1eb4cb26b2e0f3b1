"""One call in a thread of its own, looked after from another."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """A call that runs at once. done: it has ended; error: what it raised."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._call = call
        # A daemon: a build that is no longer wanted must not keep the program alive, and leaves nothing half-made.
        threading.Thread(target=self._run, name="background", daemon=True).start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()
