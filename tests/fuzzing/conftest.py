"""Prints the counts of all cases at the end of a run."""

from collections import Counter, defaultdict
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, counts in getattr(report, "user_properties", []):
            if name.startswith("fuzzing ") and report.when == "call":
                totals[name.removeprefix("fuzzing ")].update(counts)
    if totals:
        terminalreporter.section("fuzzing: cases by ending")
    for target, counts in sorted(totals.items()):
        listed = ", ".join(f"{count} {ending}" for ending, count in sorted(counts.items()))
        terminalreporter.write_line(f"{target:<12} {sum(counts.values()):>5} cases: {listed}")
