"""`python -m alerts rules` writes the rules that are made from a table."""

from __future__ import annotations

import sys

from alerts import slo


def main(arguments: list[str]) -> int:
    if arguments != ["rules"]:
        print("usage: python -m alerts rules", file=sys.stderr)
        return 2
    slo.FILE.write_text(slo.text())
    print(f"wrote {slo.FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
