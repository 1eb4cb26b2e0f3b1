"""Record the saves anew that tests replay where strace is missing: `python -m tests.crash`."""

import tempfile
from pathlib import Path

from tests.crash.disk import write_calls
from tests.crash.own_saves import GOLDEN, save
from tests.crash.recorder import record

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_calls(GOLDEN, record(save, 2, Path(folder, "work")))
