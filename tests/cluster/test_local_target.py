"""A Ray that runs already on this machine, joined by `auto` or by its address: on hosts where no other Ray is seen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.namespaces import Network, missing
from tests.cluster.ray_site import DAEMON, SETTINGS, START_S
from tests.cluster.target_user import TRAIN_S, User
from tests.cluster.waiting import wait_for

pytestmark = [pytest.mark.daemon, pytest.mark.skipif(bool(missing()), reason=f"no hosts here: {missing()}")]

BUSY, EMPTY = "busy", "empty"
TOKEN = "5" * 64
ONE, TWO = {"resources": {"workers": 1}}, {"resources": {"workers": 2}}


class Hosts:
    """One with a Ray of one CPU, and one without."""

    def __init__(self, folder: Path) -> None:
        self._network = Network(folder, (BUSY, EMPTY))
        self.address = f"{self._network.addresses[BUSY]}:6379"
        (folder / "token").write_text(TOKEN)
        # Ray looks for what runs here in its temporary folder, too; /mnt is a host's own.
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        self.environment |= {"RAY_TMPDIR": "/mnt", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(Path.home())}
        self._folder = folder

    def start(self) -> None:
        self._network.start()
        for name in (BUSY, EMPTY):
            (self._folder / f"{name}.ray").mkdir()
        ray, address = Path(sys.executable).with_name("ray"), self._network.addresses[BUSY]
        options = "--head --num-cpus=1 --include-dashboard=false"
        script = DAEMON.format(folder=self._folder, name=BUSY, ray=ray, address=address, options=options)
        self._network.start_host(BUSY, script, self.environment | SETTINGS)
        self._network.start_host(EMPTY, f"mount --bind {self._folder}/{EMPTY}.ray /mnt", self.environment)
        said = self._folder / f"{BUSY}.out"
        wait_for(lambda: "Ray runtime started" in said.read_text(), "a Ray", START_S)

    def run(self, name: str, user: User, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit code of a command on a host, and what it said."""
        whole = [sys.executable, "-m", "cluster.cli", *arguments]
        command = ["env", f"--chdir={user.folder}", *whole]
        done = self._network.run(name, *command, environment={**user.environment, **environment}, timeout_s=TRAIN_S)
        return done.returncode, done.stdout + done.stderr

    def close(self) -> None:
        self._network.close()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        made.start()
        yield made
    finally:
        made.close()


def user_of(hosts: Hosts, folder: Path, **changes: Any) -> User:
    return User(folder, hosts.environment, "here: {type: local, address: auto}\n", 20, **changes)


@pytest.mark.parametrize("how", [("--on", "here"), ("--address", "auto"), ("--address", "ADDRESS")])
def test_it_trains_in_the_ray_that_is_there(hosts: Hosts, tmp_path: Path, how: tuple[str, str]) -> None:
    given = [word.replace("ADDRESS", hosts.address) for word in how]
    code, said = hosts.run(BUSY, user_of(hosts, tmp_path, **ONE), "train", "run.yaml", *given)
    assert code == 0 and "has finished after step 20" in said, said


def test_it_has_no_more_room_than_that_one(hosts: Hosts, tmp_path: Path) -> None:
    code, said = hosts.run(BUSY, user_of(hosts, tmp_path, **TWO), "train", "run.yaml", "--on", "here")
    assert code == 3 and "which is more than the whole cluster has: it has 1 CPU" in said, said


def test_where_no_ray_runs(hosts: Hosts, tmp_path: Path) -> None:
    user = user_of(hosts, tmp_path, **ONE)
    for how in (("--on", "here"), ("--address", "auto")):
        code, said = hosts.run(EMPTY, user, "train", "run.yaml", *how)
        assert code == 3 and "No Ray runs on this machine" in said and "or leave --address out" in said, said


def test_where_the_one_that_ran_is_gone(hosts: Hosts, tmp_path: Path) -> None:
    gone = hosts.address.replace(":6379", ":6380")
    code, said = hosts.run(BUSY, user_of(hosts, tmp_path, **ONE), "train", "run.yaml", "--on", "here", RAY_ADDRESS=gone)
    assert code == 3 and f"No Ray answers at {gone}: " in said and "Start one there with" in said, said


def test_from_a_machine_that_is_no_node(hosts: Hosts, tmp_path: Path) -> None:
    code, said = hosts.run(EMPTY, user_of(hosts, tmp_path, **ONE), "train", "run.yaml", "--address", hosts.address)
    assert code == 3 and f"no node of the Ray cluster at {hosts.address}" in said and "a target of type ray" in said, (
        said
    )


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "wrong"}, "InvalidAuthToken"),
        ({"RAY_AUTH_TOKEN_PATH": "nothing"}, "cannot be opened or is empty: nothing"),
        ({"RAY_AUTH_MODE": "disabled"}, "InvalidAuthToken"),
    ],
)
def test_a_token_that_is_refused(hosts: Hosts, tmp_path: Path, environment: dict[str, str], cause: str) -> None:
    user = user_of(hosts, tmp_path, **ONE)
    (tmp_path / "wrong").write_text("6" * 64)
    code, said = hosts.run(BUSY, user, "train", "run.yaml", "--on", "here", **environment)
    assert (
        code == 3 and cause in said and "the same token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH) as here" in said
    ), said
    assert said.count("gcs_client") <= 1, "it is not tried again and again"
