"""What is due: bursts are one, failures are counted, replays wait."""

from __future__ import annotations

import time

from code2lora.daemon.board import Board


def test_a_burst_is_one_look() -> None:
    board = Board()
    for _ in range(3):
        board.mark(1, 0.0)

    assert [worktree for worktree, _ in board.take()[0]] == [1]
    assert board.take() == ([], None)


def test_a_mark_while_under_way_is_a_look_of_its_own() -> None:
    board = Board()
    board.mark(1, 0.0)
    board.take()
    board.mark(1, 0.0)

    assert board.take() == ([], None)
    board.finish(1, again_in_s=None, attempts=0)
    assert [worktree for worktree, _ in board.take()[0]] == [1]


def test_failures_are_counted_through_new_marks() -> None:
    board = Board()
    board.mark(1, 0.0)
    board.take()
    board.mark(1, 0.0)
    board.finish(1, again_in_s=60.0, attempts=2)

    [(_, due)] = board.take()[0]
    assert due.attempts == 2


def test_a_mark_brings_a_retry_forward_and_may_ask_for_more() -> None:
    board = Board()
    board.mark(1, 60.0)
    assert board.take() == ([], None)
    board.mark(1, 0.0, thorough=True)

    [(_, due)] = board.take()[0]
    assert due.thorough


def test_replays_wait_for_refreshes_and_nothing_spins_meanwhile() -> None:
    board = Board()
    board.mark(1, 0.0)
    board.mark_replay("r")
    assert board.take()[1] is None
    assert board.next_s() is None

    board.finish(1, again_in_s=None, attempts=0)
    assert board.take() == ([], "r")
    assert board.next_s() is None
    board.finish_replay("r", again_in_s=5.0)
    next_s = board.next_s()
    assert next_s is not None and next_s > time.monotonic() + 4.0
