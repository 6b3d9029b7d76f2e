"""`python -m tests.benchmarks [--gpu] [FIGURE]`: measure the figures and print them as a table."""

from __future__ import annotations

import sys

from tests.benchmarks.measuring import Row, machine


def main() -> int:
    arguments = [a for a in sys.argv[1:] if a != "--gpu"]
    if "--gpu" in sys.argv:
        from tests.benchmarks.gpu import FIGURES
    else:
        from tests.benchmarks.figures import FIGURES
    names = arguments or list(FIGURES)
    unknown = [n for n in names if n not in FIGURES]
    if unknown:
        print(f"no figure {unknown[0]}; there are {', '.join(FIGURES)}")
        return 2
    rows: list[Row] = []
    for name in names:
        print(f"... {name}: {FIGURES[name].__doc__}", file=sys.stderr, flush=True)
        rows += FIGURES[name]()
    print("| figure | ours | against | ratio | wanted | |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        verdict = {True: "reached", False: "MISSED", None: ""}[row.ok]
        cells = (row.figure, row.ours, row.against, row.ratio, row.wanted, verdict)
        print(f"| {' | '.join(cells)} |")
    print(f"\n{machine()}")
    return 1 if any(row.ok is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
