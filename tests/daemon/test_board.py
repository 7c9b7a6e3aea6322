"""What is due: bursts are one, failures are counted, replays wait, and scoring waits longest."""

from __future__ import annotations

import time

from code2lora.daemon.board import Board, Ready


def test_a_burst_is_one_look() -> None:
    board = Board()
    for _ in range(3):
        board.mark(1, 0.0)

    assert [worktree for worktree, _ in board.take().worktrees] == [1]
    assert board.take() == Ready([])


def test_a_mark_while_under_way_is_a_look_of_its_own() -> None:
    board = Board()
    board.mark(1, 0.0)
    board.take()
    board.mark(1, 0.0)

    assert board.take() == Ready([])
    board.finish(1, again_in_s=None, attempts=0)
    assert [worktree for worktree, _ in board.take().worktrees] == [1]


def test_failures_are_counted_through_new_marks() -> None:
    board = Board()
    board.mark(1, 0.0)
    board.take()
    board.mark(1, 0.0)
    board.finish(1, again_in_s=60.0, attempts=2)

    [(_, due)] = board.take().worktrees
    assert due.attempts == 2


def test_a_mark_brings_a_retry_forward_and_may_ask_for_more() -> None:
    board = Board()
    board.mark(1, 60.0)
    assert board.take() == Ready([])
    board.mark(1, 0.0, thorough=True)

    [(_, due)] = board.take().worktrees
    assert due.thorough


def test_replays_wait_for_refreshes_and_nothing_spins_meanwhile() -> None:
    board = Board()
    board.mark(1, 0.0)
    board.mark_replay("r")
    assert board.take().replay is None
    assert board.next_s() is None

    board.finish(1, again_in_s=None, attempts=0)
    assert board.take() == Ready([], replay="r")
    assert board.next_s() is None
    board.finish_replay("r", again_in_s=5.0)
    next_s = board.next_s()
    assert next_s is not None and next_s > time.monotonic() + 4.0


def test_scoring_waits_for_refreshes_and_replays() -> None:
    board = Board()
    board.mark(1, 0.0)
    board.mark_replay("r")
    board.mark_scoring(1, 0.0)
    board.take()
    assert board.take() == Ready([])

    board.finish(1, again_in_s=None, attempts=0)
    assert board.take() == Ready([], replay="r")
    assert board.take() == Ready([])
    assert board.next_s() is None
    board.finish_replay("r", again_in_s=None)
    assert board.take() == Ready([], scoring=1)


def test_no_replay_begins_while_scoring_is_under_way_but_a_refresh_does() -> None:
    board = Board()
    board.mark_scoring(1, 0.0)
    assert board.take() == Ready([], scoring=1)
    board.mark_replay("r")
    board.mark(1, 0.0)

    ready = board.take()
    assert ([worktree for worktree, _ in ready.worktrees], ready.replay) == ([1], None)
    board.finish(1, again_in_s=None, attempts=0)
    board.finish_scoring(1, again_in_s=None)
    assert board.take() == Ready([], replay="r")


def test_every_refresh_puts_scoring_off() -> None:
    board = Board()
    board.mark_scoring(1, 0.0)
    board.mark_scoring(1, 60.0)

    assert board.take() == Ready([])
    next_s = board.next_s()
    assert next_s is not None and next_s > time.monotonic() + 50.0


def test_scoring_that_gave_way_comes_back_unless_it_is_wanted_already() -> None:
    board = Board()
    board.mark_scoring(1, 0.0)
    board.take()
    board.finish_scoring(1, again_in_s=0.0)
    assert board.take() == Ready([], scoring=1)

    board.mark_scoring(1, 60.0)
    board.finish_scoring(1, again_in_s=0.0)
    assert board.take() == Ready([])
