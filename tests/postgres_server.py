"""A PostgreSQL server of the distribution for tests: its own port, its own folder, no password."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

# Where Debian and its relatives keep the programs, which are not on the PATH.
_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
_USER = "serve_app"


class PostgresServer:
    """A running server. PostgreSQL refuses to run as root: for root it runs as the user postgres.

    Its folder is not below pytest's, which only its owner can enter.
    """

    def __init__(self, *options: str) -> None:
        """`options` are those of the server, for example `-c`, `max_connections=10`."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._options = options
        self._names = count()
        self._folder = Path(tempfile.mkdtemp(prefix="serve_app-postgres-"))
        self._user = pwd.getpwnam("postgres") if os.getuid() == 0 else None
        if self._user is not None:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        self._run("initdb", "--pgdata", str(self._folder / "data"), "--username", _USER, "--auth", "trust", "--no-sync")
        self.start()

    def start(self) -> None:
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._folder}"]
        command = [_program("postgres"), "-D", str(self._folder / "data"), "-p", str(self.port), *options]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options], stdout=log, stderr=subprocess.STDOUT, **self._identity()
            )
        end = time.monotonic() + 30
        while not self._answers():
            assert time.monotonic() < end, (self._folder / "log").read_text()
            time.sleep(0.05)

    def create_database(self) -> str:
        """The SQLAlchemy URL of a new, empty database."""
        name = f"test{next(self._names)}"
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql+psycopg://{_USER}@127.0.0.1:{self.port}/{name}"

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server process. The processes of its connections do not get it."""
        self._process.send_signal(number)

    def stop(self) -> None:
        """Stop the server at once. `start` recovers its data, as after a crash."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(timeout=10)

    def close(self) -> None:
        """Stop the server and remove its folder."""
        if self._process.poll() is None:
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} user={_USER} dbname=postgres connect_timeout=2"

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._conninfo).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [_program(program), *arguments], capture_output=True, text=True, check=False, **self._identity()
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _identity(self) -> dict[str, Any]:
        """The options of `subprocess` for the user of the server, whose folder is also its working directory."""
        if self._user is None:
            return {"cwd": self._folder}
        return {
            "cwd": self._folder,
            "user": self._user.pw_uid,
            "group": self._user.pw_gid,
            "extra_groups": [],
            "env": {**os.environ, "HOME": str(self._folder)},
        }


def _program(name: str) -> str:
    found = shutil.which(name) or next((str(one / name) for one in _FOLDERS if (one / name).exists()), None)
    if found is None:
        pytest.fail(f"{name} is not installed; run apt-get install -y postgresql")
    return found
