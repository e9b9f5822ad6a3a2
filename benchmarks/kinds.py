"""Try every kind of fault that the tests know, and count faces and right results.

    python -m benchmarks.kinds [--only WORDS]

A test marked `@pytest.mark.kind("words")` is one face of a kind of fault that people or hostile
inputs have brought. Each parameter of it counts. Prints a table, and one JSON object as its last
line. Ends with 1 if a face is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "tests"


class Faces:
    """Collect the outcome of each marked test, as a plugin of pytest."""

    def __init__(self, only: str) -> None:
        self.only = only
        self.kinds: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests of the kinds that are asked for, and note the kind of each."""
        for item in items:
            mark = item.get_closest_marker("kind")
            if mark and self.only in mark.args[0]:
                self.kinds[item.nodeid] = mark.args[0]
        items[:] = [item for item in items if item.nodeid in self.kinds]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst outcome of a test's setup, call and end."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.setdefault(report.nodeid, report.outcome)
            if report.failed:
                self.outcomes[report.nodeid] = "failed"

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self) -> None:
        """Print the table before the tests' own conftest ends the process."""
        table = self.table()
        print("", "| kind | faces | right | skipped |", "|---|---|---|---|", sep="\n")
        for kind, outcomes in table.items():
            print(f"| {kind} | {outcomes.total()} | {outcomes['passed']} | {outcomes['skipped']} |")
        total = sum(table.values(), Counter())
        summary = {"kinds": len(table), "faces": total.total(), "right": total["passed"]}
        print(json.dumps(summary | {"skipped": total["skipped"], "wrong": total["failed"]}))

    def table(self) -> dict[str, Counter[str]]:
        """Return for each kind how many of its faces passed, failed or were skipped."""
        table: dict[str, Counter[str]] = {}
        for test, kind in sorted(self.kinds.items(), key=lambda pair: pair[1]):
            table.setdefault(kind, Counter())[self.outcomes.get(test, "skipped")] += 1
        return table


def main() -> None:
    """Run the marked tests and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="try only the kinds with these words")
    parser.add_argument("--quick", action="store_true", help="leave out slow and cluster tests")
    options = parser.parse_args()
    marks = "kind and not slow and not cluster" if options.quick else "kind and not cluster"
    arguments = [str(TESTS), "-q", "-p", "no:cacheprovider", "-m", marks]
    sys.exit(int(pytest.main(arguments, plugins=[Faces(options.only)]) != 0))


if __name__ == "__main__":
    main()
