"""`python -m serve_app`: runs cli.main. Ctrl-C ends it without a traceback at any time."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # Until cli.main has installed its own handler: its imports take a moment.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from serve_app.cli import main

    sys.exit(main())
