"""`python -m serve_app`: runs cli.main. Ctrl-C ends it at any time without a traceback."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    # For the time of the imports, until cli.main installs its handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from serve_app.cli import main

    sys.exit(main())
