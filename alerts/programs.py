"""Finds, checks, starts and stops Prometheus and Alertmanager, and sends HTTP requests to programs on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ALERTMANAGER = ("prometheus-alertmanager", "alertmanager")
# Program name -> (names of its executable, Debian's first; name of the Debian package).
PROGRAMS = {
    "Prometheus": (("prometheus",), "prometheus"),
    "promtool": (("promtool",), "prometheus"),
    "Alertmanager": (ALERTMANAGER, "prometheus-alertmanager"),
    "amtool": (("amtool",), "prometheus-alertmanager"),
}

_PR_SET_PDEATHSIG = 1
_STOP_S = 10.0
# urllib uses the proxies of the environment by default. A proxy cannot reach the loopback interface of this machine.
_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ProgramError(Exception):
    """A program cannot be used. The message contains the reason and a solution."""


class ProgramEnded(ProgramError):
    """A started program has ended or does not become ready."""


def find(*names: str) -> dict[str, str]:
    """Paths of the executables by program name. Raises ProgramError that lists all missing programs."""
    found = {name: next(filter(None, map(shutil.which, PROGRAMS[name][0])), None) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        packages = dict.fromkeys(PROGRAMS[name][1] for name in missing)
        raise ProgramError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. On Debian or Ubuntu: "
            f"apt-get install -y {' '.join(packages)}. On other systems, download them from "
            "https://prometheus.io/download/ into a folder of the PATH."
        )
    return {name: path for name, path in found.items() if path is not None}


def available_port(number: int, option: str, program: str) -> int:
    """`number`, or a free port if `number` is 0. Raises ProgramError if the port is in use."""
    try:
        with socket.create_server(("127.0.0.1", number)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ProgramError(
            f"{program} cannot listen on 127.0.0.1:{number}: {reason}. Choose another port with {option} (0 takes a "
            f"free port), or stop the program that uses the port. {_system_service(program)}"
        ) from None


def _system_service(program: str) -> str:
    package = PROGRAMS[program][1] if program in PROGRAMS else None
    return f"Debian's package starts it as a service: systemctl disable --now {package}" if package else ""


def check(command: Sequence[str]) -> None:
    """Run a command that validates a file. Raises ProgramError with its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise ProgramError(f"{Path(command[0]).name} rejects the configuration:\n{done.stdout}{done.stderr}".rstrip())


class Child:
    """A child process that writes to the file `log`. On Linux it also ends when this process ends for any reason."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches this process only, which stops its children in order
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def raise_if_ended(self) -> None:
        """Raises ProgramEnded with the last lines of the log."""
        code = self._process.poll()
        if code is not None:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
            raise ProgramEnded(f"{self.name} ended with exit code {code}. The last lines of {self._log}:\n{last}")

    def wait_until_ready(self, url: str, within_s: float = 30) -> None:
        """Wait until `url` answers. Raises ProgramEnded."""
        deadline = time.monotonic() + within_s
        while not answers(url):
            self.raise_if_ended()
            if time.monotonic() > deadline:
                raise ProgramEnded(f"{self.name} has not answered at {url} within {within_s:.0f} s; see {self._log}")
            time.sleep(0.1)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def get(url: str, timeout_s: float) -> bytes:
    """The body of a URL on this machine, requested without a proxy. Raises OSError."""
    with _WITHOUT_PROXY.open(url, timeout=timeout_s) as response:
        return bytes(response.read())


def answers(url: str) -> bool:
    try:
        get(url, 2)
    except OSError:
        return False
    return True


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
