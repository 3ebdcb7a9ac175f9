"""Reading ahead: order, bounds, errors, threads."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import closing

import pytest
import torch

from loraloom.adapter import Adapter, Factors
from loraloom.store import save
from loraloom.stream import OnDemand, ahead


def test_results_come_in_order_and_few_wait():
    made, most = 0, 0

    def make(n):
        nonlocal made
        time.sleep(0.002 * (5 - n % 5))
        made += 1
        return -n

    for used, (item, result) in enumerate(ahead(make, range(30), workers=2, depth=3), start=1):
        assert (item, result) == (used - 1, -(used - 1))
        most = max(most, made - used)
    assert used == 30 and most <= 3


def test_an_error_comes_where_its_item_would_and_ends_it():
    begun = []

    def make(n):
        begun.append(n)
        if n == 3:
            raise KeyError("three")
        return n

    seen = []
    with pytest.raises(KeyError, match="three"):
        for item, _ in ahead(make, range(100)):
            seen.append(item)
    assert seen == [0, 1, 2] and max(begun) < 8


def test_no_thread_is_left_and_the_callers_threads_stay():
    before, threads = torch.get_num_threads(), set(threading.enumerate())
    inside = [count for _, count in ahead(lambda n: torch.get_num_threads(), range(4))]
    stopped = ahead(lambda n: n, range(100))
    next(stopped)
    stopped.close()
    assert inside == [1] * 4 and torch.get_num_threads() == before
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize("taken", [1, 4])
def test_threads_that_are_started_later_compute_as_before(taken):
    before, counts = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with closing(ahead(lambda n: n, range(4))) as made:
            for _ in range(taken):
                next(made)
        later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        later.start(), later.join()
    finally:
        torch.set_num_threads(before)
    assert counts == [3]


def test_no_thread_is_left_where_what_was_made_cannot_be_used(tmp_path, monkeypatch):
    """A generator that is left to the garbage collector waits for its threads wherever that one runs: it may hang."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    threads = set(threading.enumerate())
    one = Factors(B=torch.ones(2, 1), A=torch.ones(1, 2))
    monkeypatch.setattr("loraloom.safefile.Writer.add", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save(Adapter({"peft_type": "LORA", "r": 1}, {str(at): one for at in range(9)}), tmp_path / "a")
    assert caught and set(threading.enumerate()) == threads


def test_nothing_to_make():
    assert list(ahead(lambda n: n, [])) == []


def test_asking_whether_a_name_is_there_reads_nothing():
    read = []
    held = OnDemand(["a"], lambda name: read.append(name) or torch.ones(1))
    assert "a" in held and "b" not in held and not read
    assert held["a"] == 1 and read == ["a"]
