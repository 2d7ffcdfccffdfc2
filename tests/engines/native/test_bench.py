"""The benchmark's short form of the comparison with other servers."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_comparison_names_the_program_that_is_missing() -> None:
    command = [sys.executable, "-m", "serve_app.engines.native.bench", "--compare", "llama.cpp", "--isa", "avx2"]
    done = subprocess.run(
        command, env={**os.environ, "PATH": ""}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "perf.engines: error: llama.cpp needs the program llama-server" in done.stderr
