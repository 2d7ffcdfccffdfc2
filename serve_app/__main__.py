"""`python -m serve_app`: start.py, reached without a traceback whenever Ctrl-C comes."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # Until it has its own handler; what it imports takes a moment.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from serve_app.cli import main

    sys.exit(main())
