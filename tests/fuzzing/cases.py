"""One case: damage a copy, use it in a forked child, and judge the ending."""

import os
import random
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from forked import Ending, run_forked
from target import Result, Target

CPU_SECONDS = 2.0
GIB = 1.5
TEST = "tests/fuzzing/test_fuzzing.py::test_a_few_cases"


class Fault(AssertionError):
    """What the code under test did wrong, with all that is needed to repeat it."""


@dataclass
class Fuzzer:
    """Cases of one target; case n of a seed is always the same. Those that end in a fault are kept in `folder`."""

    target: Target
    seed: int
    folder: Path

    @cached_property
    def whole(self) -> Path:
        whole = self.folder / "whole"
        self.target.build(whole)
        return whole

    @cached_property
    def results(self) -> dict[str, Result]:
        """What the undamaged folder gives, by way. Also imports whatever is imported on first use."""
        results = {}
        for way, use in self.target.ways.items():
            copy = self._copy("undamaged")
            results[way] = use(copy)
            shutil.rmtree(copy)
        return results

    def _copy(self, name: str) -> Path:
        copy = self.folder / name
        shutil.rmtree(copy, ignore_errors=True)
        return Path(shutil.copytree(self.whole, copy, symlinks=True))

    def run(self, number: int) -> str:
        """Returns "same result", "finite result" or "clear error". Raises Fault."""
        rng = random.Random(f"{self.seed} {self.target.name} {number}")
        results = self.results
        folder = self._copy(f"case {number}")
        name, done = self.target.damage(rng, folder)
        way = rng.choice(sorted(self.target.ways))
        before = snapshot(folder)
        ending = run_forked(lambda: self.target.ways[way](folder))
        problem = self._problem(ending, results[way], name, done, before, snapshot(folder))
        if not problem and ending.error and not self.target.read_only:
            again = run_forked(lambda: self.target.ways[way](folder))
            if again.error != ending.error or snapshot(folder) != before:
                problem = f"the second run ended otherwise: {again.error[:1]} {again.message[:300]}"
        if problem:
            raise Fault(
                f"{problem}\n  after: {name}: {done}\n  in: {way}; {ending.where}; {folder}\n"
                f"  again: TEST_SEED={self.seed} FUZZ_CASE={number} pytest '{TEST}[{self.target.name}]'"
            )
        shutil.rmtree(folder)
        if ending.error:
            return "clear error"
        return "same result" if ending.value == results[way] else "finite result"

    def _problem(
        self, ending: Ending, whole: Result, name: str, done: str, before: dict[str, Any], after: dict[str, Any]
    ) -> str:
        """What is wrong with the ending; empty if nothing is."""
        if ending.crash:
            return ending.crash
        kind = ending.error[0] if ending.error else "a result"
        shown = f"{kind}: {ending.message[:300]}" if ending.error else kind
        if ending.seconds > CPU_SECONDS:
            return f"{ending.seconds:.1f} s of CPU time for {shown}"
        if ending.gib > GIB:
            return f"{ending.gib:.2f} GiB for {shown}"
        if (ending.error or self.target.read_only) and before != after:
            changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
            return f"changed {', '.join(sorted(changed))} in spite of {shown}"
        if not ending.error:
            return self.target.problem(ending.value, whole, done)
        if "NotFinite" in ending.error:
            return ""
        if not {*self.target.errors, "Refused"} & set(ending.error):
            return f"undocumented {shown}"
        if name not in ending.message:
            return f"{name} is not named in {shown}"
        if len(ending.message) > 5000:
            return f"a message of {len(ending.message)} characters: {ending.message[:300]}"
        return ""


def snapshot(folder: Path) -> dict[str, Any]:
    """Each entry below the folder: the content of files, the target of links, the kind of anything else."""
    entries: dict[str, Any] = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent, name)
            if path.is_symlink():
                entries[str(path)] = ("link", os.readlink(path))
            else:
                entries[str(path)] = path.read_bytes() if path.is_file() else oct(path.lstat().st_mode)
    return entries
