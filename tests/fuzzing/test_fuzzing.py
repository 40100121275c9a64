"""Damaged checkpoints, embeddings, journals and images give a clear error or the same result; nothing is replaced.

Each case damages one file of a whole folder (`mutations.py`) and uses the folder in a forked child (`target.py`).
`cases.py` judges the ending: an error must be of the documented class and name the damaged file, and a second run must
end in the same way; a result must be finite and keep every finished row. Either takes at most 2 s of CPU time and
1.5 GiB, and after an error every byte is as it was. The message of a failure holds the command that repeats its case.
"""

import dataclasses
import math
import os
import random
import signal
import time
from collections import Counter

import pytest

pytest.importorskip("resource", reason="cases run in forked processes with limits, which this system lacks")

import cases
import forked
import torch
from cases import Fault, Fuzzer, snapshot
from checkpoint_targets import CLASSIFIER, GEMMA, SIGLIP
from embedding_targets import JOURNAL, NPY_OUTPUT, OUT, OUTPUT, OVERWRITING, use_load
from image_targets import IMAGE

from siglip_model.embed import EmbeddingFileError

TARGETS = {
    target.name: target for target in (SIGLIP, GEMMA, CLASSIFIER, OUTPUT, NPY_OUTPUT, JOURNAL, OVERWRITING, IMAGE)
}
pytestmark = pytest.mark.filterwarnings("ignore:images of mode")  # which value range is assumed
SEED = int(os.environ.get("TEST_SEED", "0"))
CASE = os.environ.get("FUZZ_CASE")  # the only one to run
QUICK = 3  # cases per target in the default tests
BLOCKS, BLOCK = 4, 100  # tests per target of the thorough ones, and cases per test


def run_cases(name, numbers, folder, record_property):
    fuzzer = Fuzzer(TARGETS[name], SEED, folder)
    counts, faults = Counter(), []
    for number in numbers if CASE is None else [int(CASE)]:
        try:
            counts[fuzzer.run(number)] += 1
        except Fault as fault:
            counts["fault"] += 1
            faults.append(str(fault))
    record_property(f"fuzzing {name}", dict(counts))  # summed by conftest.py
    assert not faults, "\n\n".join([f"{len(faults)} of {counts.total()} cases:", *faults])


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_cases(name, tmp_path, record_property):
    run_cases(name, range(QUICK), tmp_path, record_property)


@pytest.mark.thorough
@pytest.mark.skipif(CASE is not None, reason="test_a_few_cases runs the one of FUZZ_CASE")
@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("name", TARGETS)
def test_many_cases(name, block, tmp_path, record_property):
    start = QUICK + block * BLOCK
    run_cases(name, range(start, start + BLOCK), tmp_path, record_property)


# ---- The judge itself: each planted defect must be seen.


def raises(error):
    def use(folder):
        raise error

    return use


def replaces(folder):
    (folder / OUT).write_bytes(b"")
    raise EmbeddingFileError(f"{folder / OUT} is damaged")


def leaves_a_file(folder):
    (folder / "more").touch()
    raise EmbeddingFileError(f"{folder / OUT} is damaged")


def loses_rows(folder):
    return {"least": 4, "shape": [1, 32], "finite": True, "rows": {"a.png": [0.0] * 32}}


def succeeds_later(folder):
    seen = folder.parent / "seen"
    if seen.exists():
        return {"least": 0, "shape": [0, 32], "finite": True, "rows": {}}
    seen.touch()
    raise EmbeddingFileError(f"{folder / OUT} is damaged")


def takes_long(folder):
    while time.process_time() < 0.35:  # of the child, which starts at 0
        pass


def takes_memory(folder):
    torch.zeros(2**26).add_(1)


def dies(folder):
    os.kill(os.getpid(), signal.SIGKILL)


DEFECTS = {
    "a raw error": (raises(KeyError("embeddings")), "undocumented KeyError: 'embeddings'"),
    "no memory": (raises(MemoryError()), "undocumented MemoryError"),
    "an empty message": (raises(EmbeddingFileError("")), "out.safetensors is not named in EmbeddingFileError: "),
    "another file": (raises(EmbeddingFileError("some file is damaged")), "out.safetensors is not named in"),
    "a long message": (raises(EmbeddingFileError(OUT * 1000)), "a message of 15000 characters"),
    "replaced": (replaces, "changed .*out.safetensors in spite of EmbeddingFileError"),
    "a file left": (leaves_a_file, "changed .*more in spite of EmbeddingFileError"),
    "lost rows": (loses_rows, "rows were lost: 1 of 4"),
    "another ending": (succeeds_later, "the second run ended otherwise"),
    "long": (takes_long, r"0\.\d s of CPU time for a result"),
    "large": (takes_memory, r"0\.\d\d GiB for a result"),
    "a crash": (dies, "the process died: SIGKILL"),
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """An undamaged folder."""
    folder = tmp_path_factory.mktemp("fuzzing") / "output"
    OUTPUT.build(folder)
    return folder


@pytest.fixture
def judge(output, tmp_path, monkeypatch):
    """Runs one case in which the damaged file is used by `use`."""
    monkeypatch.setattr(cases, "CPU_SECONDS", 0.3)
    monkeypatch.setattr(cases, "GIB", 0.05)

    def run(use):
        fuzzer = Fuzzer(dataclasses.replace(OUTPUT, ways={"planted": use}), SEED, tmp_path)
        fuzzer.whole, fuzzer.results = output, {"planted": use_load(output)}
        return fuzzer.run(0)

    return run


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_seen(judge, defect):
    use, expected = DEFECTS[defect]
    with pytest.raises(Fault, match=expected) as caught:
        judge(use)
    assert f"TEST_SEED={SEED} FUZZ_CASE=0 pytest '{cases.TEST}[output]'" in str(caught.value)


def test_a_hang_is_ended(judge, monkeypatch):
    monkeypatch.setattr(forked, "WALL_SECONDS", 0.2)
    with pytest.raises(Fault, match="hangs: killed after 0.2 s"):
        judge(lambda folder: signal.pause())


def test_what_is_allowed_passes(judge, output):
    def error(folder):
        raise EmbeddingFileError(f"{folder / OUT} is damaged")

    assert judge(error) == "clear error"
    assert judge(lambda folder: use_load(output)) == "same result"
    assert judge(lambda folder: {**use_load(output), "least": 0}) == "finite result"


WHOLE = {"rows": {"a.png": [0.25], "b.png": [0.75]}, "failed": {}}
IMAGE_RESULTS = {
    "one fails": ({"rows": {"a.png": [0.25]}, "failed": {"b.png": "/b.png: is truncated"}}, ""),
    "one is missing": ({"rows": {"a.png": [0.25]}, "failed": {}}, ""),
    "one has another row": ({"rows": {"a.png": [0.25], "b.png": [0.5]}, "failed": {}}, ""),
    "two have": ({"rows": {"a.png": [0.5], "b.png": [0.5]}, "failed": {}}, "no row or another for ['a.png', 'b.png']"),
    "not finite": ({"rows": {"a.png": [0.25], "b.png": [math.nan]}, "failed": {}}, "no row or another for ['b.png']"),
    "no reason": ({"rows": {"a.png": [0.25]}, "failed": {"b.png": "/b.png: "}}, "the reason is '/b.png: '"),
    "no name": ({"rows": {"a.png": [0.25]}, "failed": {"b.png": "is truncated"}}, "the reason is 'is truncated'"),
}


@pytest.mark.parametrize("case", IMAGE_RESULTS)
def test_what_a_damaged_image_may_change(case):
    result, expected = IMAGE_RESULTS[case]
    assert IMAGE.problem(result, WHOLE, "") == expected


@pytest.mark.thorough
@pytest.mark.parametrize("name", TARGETS)
def test_a_case_is_always_the_same(name, tmp_path):
    """Also of folders that were built apart."""
    damaged = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        TARGETS[name].build(folder)
        done = TARGETS[name].damage(random.Random(SEED), folder)
        damaged.append((done, {os.path.relpath(path, folder): entry for path, entry in snapshot(folder).items()}))
    assert damaged[0] == damaged[1]
