"""Reading ahead and batching: order, failures, bounded memory, and the end of the threads."""

import threading

import pytest

from siglip_model.images.batches import Batch, Failure, read_ahead, read_batches


@pytest.mark.parametrize("workers", [0, 3])
def test_reading_ahead_keeps_order_errors_and_window(workers):
    drawn = []

    def numbers():
        for number in range(50):
            drawn.append(number)
            yield number

    stream = read_ahead(numbers(), lambda number: 60 // (number - 7), workers=workers, window=4)
    first = next(stream)
    assert first == (0, 60 // -7, None)
    assert len(drawn) <= 1 + 4
    rest = list(stream)
    assert [number for number, _, _ in rest] == list(range(1, 50))
    assert [number for number, _, error in rest if isinstance(error, ZeroDivisionError)] == [7]


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_full_and_failures_separate(workers):
    def read(number):
        if number % 4 == 1:
            raise OSError(f"{number} is unreadable")
        return number * 10

    outcomes = list(read_batches(range(10), read, batch_size=3, workers=workers))
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert [(failure.item, str(failure.error)) for failure in failures] == [
        (number, f"{number} is unreadable") for number in (1, 5, 9)
    ]
    batches = [outcome for outcome in outcomes if isinstance(outcome, Batch)]
    assert [batch.items for batch in batches] == [[0, 2, 3], [4, 6, 7], [8]]
    assert all(batch.values == [10 * item for item in batch.items] for batch in batches)
    assert outcomes.index(failures[0]) < outcomes.index(batches[0])  # reported before its batch is full


@pytest.mark.parametrize("workers", [0, 3])
def test_the_window_bounds_reading_and_closing_ends_the_threads(workers):
    drawn = []

    def numbers():
        for number in range(1000):
            drawn.append(number)
            yield number

    batches = read_batches(numbers(), lambda number: number, batch_size=2, workers=workers)
    assert next(batches).items == [0, 1]
    assert len(drawn) <= 2 + 1 + (2 * 2 + workers if workers else 0)
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("read_ahead"):
            thread.join(timeout=10)
            assert not thread.is_alive()
