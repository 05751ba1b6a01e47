"""Worker processes: all work is done, whatever becomes of one of them; shares of several processes make the whole."""

import os
from pathlib import Path

import pytest

from sonic.workers import Share, in_workers


def touch(path: Path, answer: str) -> str:
    """A worker's task; one file kills its process, as a crash in a decoder would, another one meets a mistake of ours."""
    if path.name == "bad":
        os._exit(9)
    if path.name == "mistake":
        raise RuntimeError("seen")
    path.touch()
    return answer


def test_a_dying_worker_harms_no_other_work(tmp_path):
    names = ("a", "bad", "c", "d")
    results = sorted(in_workers(touch, [(tmp_path / name, name) for name in names], 2))
    assert results == [(0, "a", False), (1, None, True), (2, "c", False), (3, "d", False)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_a_mistake_is_not_taken_for_a_death(tmp_path):
    for num_workers in (0, 1):
        with pytest.raises(RuntimeError, match="seen"):
            list(in_workers(touch, [(tmp_path / "mistake", "")], num_workers))


def test_without_workers_it_is_done_here_in_order(tmp_path):
    assert list(in_workers(touch, [(tmp_path / name, name) for name in "ab"], 0)) == [(0, "a", False), (1, "b", False)]
    assert list(in_workers(touch, [], 4)) == []


def test_shares_make_the_whole():
    shares = [Share(index, 3).of(range(8)) for index in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert Share().of("ab") == Share().gather(["a", "b"]) == ["a", "b"]
