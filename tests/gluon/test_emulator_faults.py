"""The emulator finds each fault of a barrier protocol, under every seed, and says where it is."""

import re

import pipelines
import pytest
import torch
from hopper_emulator.faults import (
    BYTE_COUNT,
    DEADLOCK,
    ILLEGAL,
    IN_FLIGHT,
    IN_USE,
    NOT_AWAITED,
    NOT_FENCED,
    OUT_OF_BOUNDS,
    OVER_ARRIVAL,
    RACE,
    UNDER_ARRIVAL,
    UNWRITTEN,
    WRONG_PHASE,
    Fault,
)
from hopper_emulator.launch import emulating

SEEDS = range(6)


def operands(rows: int, columns: int, k: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns + k)
    return [torch.randn(n, k, generator=generator).bfloat16() for n in (rows, columns)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "columns", "k", "programs"), [(64, 64, 64, 1), (200, 48, 328, 2), (130, 64, 192, 3)])
def test_without_a_fault_the_product_is_right(rows, columns, k, programs, seed):
    a, b = operands(rows, columns, k)
    with emulating(seed):
        c = pipelines.product(a, b, programs)
    torch.testing.assert_close(c, (a.double() @ b.double().T).bfloat16(), atol=2**-6, rtol=2**-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_fault_the_exchange_is_right(seed):
    with emulating(seed):
        out = pipelines.exchange(5)
    assert out.tolist() == [[i] * 64 for i in range(5)]


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_fault_the_squares_are_right(seed):
    x = operands(5 * 64, 1, 64)[0]
    with emulating(seed):
        out, first = pipelines.squares(x), pipelines.unfenced(x[:64].contiguous())
    squares = torch.cat([tile.double() @ tile.double().T for tile in x.split(64)])
    torch.testing.assert_close(out, (-squares).bfloat16(), atol=2**-6, rtol=2**-7)
    torch.testing.assert_close(first, squares[:64].float())


PRODUCER, CONSUMER = "load_tiles", "multiply"
ANY_BARRIER, NO_BARRIER = r"(full|empty)\[[01]\]", ""
# A fault of the kernel: what it may be found as, depending on who runs first; in whom; at which barrier.
IN_PRODUCT = {
    "producer waits for the wrong phase": ({DEADLOCK}, {PRODUCER, CONSUMER}, ANY_BARRIER),
    "producer does not wait": ({IN_USE, NOT_AWAITED, OVER_ARRIVAL}, {PRODUCER}, r"full\[0\]|"),
    "too few bytes expected": ({BYTE_COUNT, WRONG_PHASE}, {PRODUCER, CONSUMER}, r"full\[[01]\]"),
    "too many bytes expected": ({BYTE_COUNT}, {CONSUMER}, r"full\[0\]"),
    "expected twice": ({OVER_ARRIVAL}, {PRODUCER}, r"full\[0\]"),
    "a load into the wrong stage": ({UNWRITTEN, IN_USE, NOT_AWAITED}, {PRODUCER, CONSUMER}, ANY_BARRIER),
    "a load without a wait": ({IN_FLIGHT}, {PRODUCER}, r"full\[[01]\]"),
    "consumer waits for the wrong phase": ({WRONG_PHASE, UNWRITTEN}, {CONSUMER}, r"full\[0\]"),
    "consumer waits for one phase too early": ({WRONG_PHASE, OVER_ARRIVAL, DEADLOCK}, {CONSUMER}, ANY_BARRIER),
    "consumer waits for the wrong barrier": ({NOT_AWAITED, UNWRITTEN}, {CONSUMER}, r"full\[[01]\]"),
    "consumer does not wait": ({NOT_AWAITED, UNWRITTEN}, {CONSUMER}, r"full\[0\]|"),
    "released before its wgmma": ({IN_USE}, {PRODUCER}, r"empty\[[01]\]"),
    "result used before its wait": ({ILLEGAL}, {CONSUMER}, NO_BARRIER),
    "released twice": ({OVER_ARRIVAL}, {CONSUMER}, r"empty\[[01]\]"),
    "released by two at once": ({OVER_ARRIVAL}, {CONSUMER}, r"empty\[0\]"),
    "never released": ({DEADLOCK}, {PRODUCER, CONSUMER}, ANY_BARRIER),
    "read after its release": ({IN_USE, WRONG_PHASE}, {PRODUCER, CONSUMER}, ANY_BARRIER),
    "staging overwritten": ({IN_USE}, {CONSUMER}, r"full\[1\]"),
    "no fence before the store": ({NOT_FENCED}, {CONSUMER}, NO_BARRIER),
    "a wgmma without a wait": ({IN_FLIGHT}, {CONSUMER}, NO_BARRIER),
    "a store without a wait": ({IN_FLIGHT}, {CONSUMER}, NO_BARRIER),
    "a barrier without init": ({ILLEGAL}, {PRODUCER, CONSUMER}, r"full\[1\]"),
    "count too high": ({UNDER_ARRIVAL}, {PRODUCER, CONSUMER}, r"empty\[[01]\]"),
    "no fence after init": ({NOT_FENCED}, {PRODUCER}, r"full\[0\]"),
}
IN_EXCHANGE = {
    "never written": ({UNWRITTEN}, {"read_tiles"}, "written"),
    "read without a wait": ({NOT_AWAITED, UNWRITTEN}, {"read_tiles"}, NO_BARRIER),
    "overwritten before it is read": ({IN_USE, NOT_AWAITED, OVER_ARRIVAL}, {"write_tiles"}, "written|"),
    "released too early": ({IN_USE, NOT_AWAITED}, {"write_tiles", "read_tiles"}, "written|read"),
    "stored outside of the tensor": ({OUT_OF_BOUNDS}, {"read_tiles"}, NO_BARRIER),
}  # fmt: skip


READERS = {"square[0]", "square[1]"}
IN_SQUARES = {
    "one releases for both": ({IN_USE}, {"load_for_both"}, r"empty\[0\]"),
    "one releases twice": ({IN_USE, WRONG_PHASE}, {"load_for_both", *READERS}, ANY_BARRIER),
    "one forgets the last": ({UNDER_ARRIVAL}, {"main"}, r"empty\[0\]"),
    "both use one buffer": ({IN_USE, NOT_AWAITED}, READERS, r"full\[[01]\]"),
    "one store too many in flight": ({IN_USE}, READERS, r"full\[0\]"),
}
IN_UNFENCED = {
    "no fence before the product": ({NOT_FENCED}, {"main"}, NO_BARRIER),
    "overwritten under its product": ({IN_USE}, {"main"}, NO_BARRIER),
}


def check(fault, expected, programs=1):
    kinds, partitions, barriers = expected
    assert fault.kind in kinds, fault
    assert fault.partition in partitions, fault
    assert re.fullmatch(barriers, fault.barrier), fault
    assert fault.step > 0 and f"step {fault.step}" in str(fault) and fault.partition in str(fault)
    assert fault.barrier in str(fault) and fault.program[0] < programs


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("planted", IN_PRODUCT)
def test_a_fault_of_the_pipeline_is_found(planted, seed):
    with pytest.raises(Fault) as caught, emulating(seed):
        pipelines.product(*operands(200, 64, 5 * 64), 1, planted)
    check(caught.value, IN_PRODUCT[planted])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("planted", IN_EXCHANGE)
def test_a_fault_of_the_exchange_is_found(planted, seed):
    with pytest.raises(Fault) as caught, emulating(seed):
        pipelines.exchange(5, planted)
    check(caught.value, IN_EXCHANGE[planted])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("planted", IN_SQUARES)
def test_a_fault_between_two_readers_is_found(planted, seed):
    with pytest.raises(Fault) as caught, emulating(seed):
        pipelines.squares(operands(5 * 64, 1, 64)[0], planted)
    check(caught.value, IN_SQUARES[planted])


@pytest.mark.parametrize("planted", IN_UNFENCED)
def test_a_fault_without_partitions_is_found(planted):
    with pytest.raises(Fault) as caught, emulating():
        pipelines.unfenced(operands(64, 1, 64)[0], planted)
    check(caught.value, IN_UNFENCED[planted])


IN_TOTALS = {
    "partitions share a total": ({RACE}, {"add_half[0]", "add_half[1]"}, NO_BARRIER),
    "programs share a total": ({RACE}, {"add_half[0]", "add_half[1]"}, NO_BARRIER),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_fault_the_totals_are_right(seed):
    with emulating(seed):
        totals = pipelines.totals(3)
    assert totals.tolist() == [[1, 2, 3], [11, 12, 23], [21, 22, 43]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("planted", IN_TOTALS)
def test_a_race_in_global_memory_is_found(planted, seed):
    """Found although the sums are right, because the emulator runs programs one after another."""
    with pytest.raises(Fault, match="in no order between them") as caught, emulating(seed):
        pipelines.totals(3, planted)
    check(caught.value, IN_TOTALS[planted], programs=3)


def test_every_kind_of_fault_is_shown():
    planted = IN_PRODUCT | IN_EXCHANGE | IN_SQUARES | IN_UNFENCED | IN_TOTALS
    shown = set().union(*(kinds for kinds, _, _ in planted.values()))
    assert shown == {
        DEADLOCK, WRONG_PHASE, OVER_ARRIVAL, UNDER_ARRIVAL, BYTE_COUNT, UNWRITTEN, NOT_AWAITED, IN_USE, IN_FLIGHT,
        NOT_FENCED, OUT_OF_BOUNDS, ILLEGAL, RACE,
    }  # fmt: skip


def test_the_same_seed_finds_the_same_fault_and_others_differ():
    def found(seed):
        with pytest.raises(Fault) as caught, emulating(seed):
            pipelines.product(*operands(200, 64, 5 * 64), 1, "released before its wgmma")
        return str(caught.value)

    assert [found(seed) for seed in SEEDS] == [found(seed) for seed in SEEDS]
    assert len({found(seed) for seed in SEEDS}) > 1


def test_a_deadlock_names_all_who_wait():
    expected = r"multiply waits for parity 1 of full\[[01]\].*load_tiles waits for parity 0 of"
    with pytest.raises(Fault, match=expected), emulating(0):
        pipelines.product(*operands(200, 64, 5 * 64), 1, "never released")
