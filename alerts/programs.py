"""Other people's programs: whether they are there, started so that nothing is left over, and stopped."""

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

# By what they are: the names that they have as packages (Debian's first), and Debian's package.
ALERTMANAGER = ("prometheus-alertmanager", "alertmanager")
PROGRAMS = {
    "Prometheus": (("prometheus",), "prometheus"),
    "promtool": (("promtool",), "prometheus"),
    "Alertmanager": (ALERTMANAGER, "prometheus-alertmanager"),
    "amtool": (("amtool",), "prometheus-alertmanager"),
}

_PR_SET_PDEATHSIG = 1
_STOP_S = 10.0


class ProgramError(Exception):
    """A program cannot be used; the text says why and what would work."""


class Ended(ProgramError):
    """A program that had started has ended, or does not come to life."""


def find(*wanted: str) -> dict[str, str]:
    """Their paths, by what they are. Raises ProgramError that names all that is missing."""
    found = {name: next(filter(None, map(shutil.which, PROGRAMS[name][0])), None) for name in wanted}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        packages = dict.fromkeys(PROGRAMS[name][1] for name in missing)
        raise ProgramError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; on Debian or Ubuntu: "
            f"apt-get install -y {' '.join(packages)}   (elsewhere: https://prometheus.io/download/, put on the PATH)"
        )
    return {name: path for name, path in found.items() if path is not None}


def port(asked: int, option: str, what: str) -> int:
    """`asked`, or for 0 one that is free. Raises ProgramError when somebody has it."""
    try:
        with socket.create_server(("127.0.0.1", asked)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ProgramError(
            f"{what} cannot listen on 127.0.0.1:{asked}: {reason}; choose another port with {option} (0 takes a free "
            f"one), or stop who has it. {_service(what)}"
        ) from None


def _service(what: str) -> str:
    package = PROGRAMS[what][1] if what in PROGRAMS else None
    return f"Debian's package starts one of its own: systemctl disable --now {package}" if package else ""


def check(command: Sequence[str]) -> None:
    """Have a program judge a file. Raises ProgramError with what it says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise ProgramError(f"{Path(command[0]).name} refuses the configuration:\n{done.stdout}{done.stderr}".rstrip())


class Child:
    """A program that runs until `stop`, or until we end, however that happens (on Linux). It writes to `log`."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C in a terminal is for us; we stop them in their order
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )

    def ended(self) -> None:
        """Raises Ended if it has."""
        code = self._process.poll()
        if code is not None:
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-5:])
            raise Ended(f"{self.name} ended with {code}; the end of {self._log}:\n{last}")

    def ready(self, url: str, within_s: float = 30) -> None:
        """Wait until it answers there. Raises Ended."""
        deadline = time.monotonic() + within_s
        while not answers(url):
            self.ended()
            if time.monotonic() > deadline:
                raise Ended(f"{self.name} does not answer at {url} after {within_s:.0f} s; see {self._log}")
            time.sleep(0.1)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
