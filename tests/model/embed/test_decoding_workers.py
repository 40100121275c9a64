"""Images are read by threads, by processes, or by those that a trial finds faster: rows and errors are the same."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from colour_embedder import embed_colours, save_colours

from siglip_model.embed import load_embeddings, workers
from siglip_model.images.batches import read_ahead
from siglip_model.images.limits import PixelBudget

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path):
    save_colours(tmp_path / "images", 30)
    (tmp_path / "images" / "7.png").write_text("no image")
    return tmp_path / "images"


def test_processes_give_what_threads_give(folder, tmp_path):
    contents = []
    for decode in ("threads", "processes"):
        out = tmp_path / f"{decode}.safetensors"
        summary = embed_colours([folder], out, decode=decode, num_workers=2, max_pixels=2, profile=True)
        assert (summary.rows, summary.failed) == (29, 1)
        contents.append(out.read_bytes())
        assert (summary.profile.busy is None) == (decode == "processes")
    assert contents[0] == contents[1]
    assert "7.png: not an image" in str(load_embeddings(out).failed)
    with pytest.raises(ValueError, match="decode is 'x'; supported: threads, processes, auto"):
        embed_colours([folder], tmp_path / "x.safetensors", decode="x")
    with pytest.raises(ValueError, match="needs num_workers of at least 1"):
        embed_colours([folder], tmp_path / "x.safetensors", decode="processes", num_workers=0)


KILLED = """
import os, signal, sys, time
from colour_embedder import embed_colours
if __name__ == "__main__":
    def on_image(*_):
        if sys.argv[3] == "parent":
            os.kill(os.getpid(), signal.SIGKILL)
        import multiprocessing
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
    embed_colours([sys.argv[1]], sys.argv[2], decode="processes", num_workers=1, on_image=on_image)
"""


@pytest.mark.parametrize("killed", ["parent", pytest.param("children", marks=pytest.mark.thorough)])
def test_processes_end_with_their_parent_and_their_end_is_an_error(folder, tmp_path, killed):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}"}
    command = [sys.executable, str(script), str(folder), str(tmp_path / "out.npy"), killed]
    # The processes inherit stderr, so that it is at its end when all of them have ended
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if killed == "parent":
        assert done.returncode == -9, done.stderr
    else:
        assert "RuntimeError: a process that reads images has ended, or could not start" in done.stderr
    assert embed_colours([folder], tmp_path / "out.npy").rows == 29


class Pool:
    """Takes `seconds` per item, without reading."""

    def __init__(self, seconds):
        self.seconds, self.items, self.ended = seconds, [], []

    def submit(self, item):
        time.sleep(self.seconds)
        self.items.append(item)
        future = Future()
        future.set_result((item, None))
        return future

    def close(self):
        self.ended.append("closed")

    def finish(self):
        self.ended.append("finished")


@pytest.mark.parametrize(("threads", "processes", "faster"), [(2e-3, 1e-3, "processes"), (1e-3, 2e-3, "threads")])
def test_a_trial_keeps_the_faster(monkeypatch, threads, processes, faster):
    monkeypatch.setattr(workers, "TRIAL_AFTER", 0.03)
    monkeypatch.setattr(workers, "TRIAL_SECONDS", 0.06)
    pools, said = {"threads": Pool(threads), "processes": Pool(processes)}, []

    def trial(window):
        return workers.Trial(pools["threads"], lambda: pools["processes"], window, said.append)

    results = list(read_ahead(range(300), None, workers=2, window=4, pool=trial))
    assert results == [(number, number, None) for number in range(300)]
    assert pools[faster].items[-1] == 299 and len(pools["processes"].items) > 8
    assert pools["threads"].items[:10] == list(range(10)), "it begins with threads"
    assert pools["processes"].ended == (["finished"] if faster == "threads" else []) + ["closed"]
    (words,) = said
    assert (float(words.split()[0]) > workers.GAIN) == (faster == "processes")


def test_a_short_run_has_no_trial(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(workers.Processes, "__init__", None)  # which would be called
    assert embed_colours([folder], tmp_path / "out.npy", decode="auto", num_workers=2).rows == 29


def test_threads_that_read_do_not_multiply_those_of_the_model(folder, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = []
        model_threads = []

        def read(source):
            found.append(torch.get_num_threads())

        with workers.Workers("threads", 2) as readers:
            for _ in read_ahead(range(20), read, workers=2, window=4, pool=lambda n: readers.pool(read, read, n)):
                model_threads.append(torch.get_num_threads())
        assert set(found) == {1} and set(model_threads) == {3}
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert found[-1] == 3
    finally:
        torch.set_num_threads(before)


def _hold(budget, held, release):
    with budget.reserve(6):
        held.set()
        release.wait()


@pytest.mark.thorough  # as are other tests that start processes
def test_processes_share_one_budget_of_pixels():
    budget = PixelBudget(10, workers.CONTEXT)
    held, release = workers.CONTEXT.Event(), workers.CONTEXT.Event()
    process = workers.CONTEXT.Process(target=_hold, args=(budget, held, release))
    process.start()
    assert held.wait(60)
    waiting = threading.Thread(target=lambda: budget.reserve(5).__enter__())
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    release.set()
    waiting.join(60)
    assert not waiting.is_alive()
    process.join()
    budget.close()
    with pytest.raises(RuntimeError, match="no longer needed"), budget.reserve(1):
        pass
