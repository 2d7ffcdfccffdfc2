"""`python -m serve_app.engines.files SOURCE`: prints the folder of a model's files, for other servers to load.

It converts or downloads the files first if necessary. With --gguf it prints the .gguf file of the embedded model, or
of a source that is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from serve_app.config import Deployment, Model
from serve_app.engines.files.disk_cache import CacheError
from serve_app.engines.files.model_files import SourceError
from serve_app.engines.files.sources import gguf_file, resolve


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve_app.engines.files", description=__doc__)
    parser.add_argument("source", help="builtin:smollm2-135m, a folder, a .gguf file or a hub id")
    parser.add_argument("--gguf", action="store_true", help="print the .gguf file")
    options = parser.parse_args(arguments)
    source = options.source
    deployment = Deployment(num_replicas=1, max_ongoing_requests=32, max_queued_requests=1)
    try:
        if options.gguf:
            found = gguf_file(source)
        else:
            found = Path(resolve(Model(name="model", source=source, deployment=deployment), _report))
    except (SourceError, CacheError) as error:
        print(error, file=sys.stderr)
        return 1
    print(found.absolute())
    return 0


def _report(stage: str) -> None:
    print(stage, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
