"""Pieces side by side, a core each: results, torch's number of threads, errors, forks."""

import multiprocessing
import os
import threading

import pytest
import torch

from scorer.engine.cores import side_by_side


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def seen_by_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_results_come_in_order_however_many_pieces_there_are():
    for count in (0, 1, 2, 3, 10):
        assert side_by_side(lambda piece: piece * piece, range(count)) == [piece * piece for piece in range(count)]


def test_as_many_pieces_are_computed_at_a_time_as_torch_has_threads():
    all_there = threading.Barrier(3, timeout=60)
    names = side_by_side(lambda piece: (all_there.wait(), threading.current_thread().name)[1], range(3))
    assert len(set(names)) == 3


def test_a_piece_has_one_core_before_and_after_its_first_operation():
    def count(_):
        before = torch.get_num_threads()
        torch.ones(300_000).exp2().sum()
        return before, torch.get_num_threads()

    assert side_by_side(count, range(12)) == [(1, 1)] * 12


def test_torch_has_its_threads_everywhere_else():
    side_by_side(torch.ones, range(3))
    assert torch.get_num_threads() == 3
    assert seen_by_a_new_thread() == 3


def test_a_piece_may_have_pieces_of_its_own():
    nested = side_by_side(lambda piece: side_by_side(lambda inner: piece + inner, range(4)), range(6))
    assert nested == [[piece + inner for inner in range(4)] for piece in range(6)]


def test_one_thread_computes_where_it_was_asked():
    torch.set_num_threads(1)
    assert side_by_side(lambda _: threading.current_thread(), range(2)) == [threading.current_thread()] * 2


def test_the_error_of_a_piece_is_raised():
    def divide(piece):
        return 1 / piece

    with pytest.raises(ZeroDivisionError):
        side_by_side(divide, [2, 1, 0, 3])
    assert side_by_side(divide, [2, 1]) == [0.5, 1.0]


def test_a_forked_process_has_threads_of_its_own():
    """The old one's are gone there; to wait for them would be for ever."""

    def child(connection):
        connection.send(side_by_side(lambda _: os.getpid(), range(3)))

    side_by_side(torch.ones, range(3))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == [process.pid] * 3
    finally:
        process.kill()
        process.join()
