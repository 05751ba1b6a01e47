"""Files and folders appear whole or not at all, whoever is killed and however many make them at once."""

import multiprocessing
import os
from pathlib import Path

import pytest

from sonic.files import atomic_folder, remove_folder, whole_file

ROUNDS = 40


def names(folder: Path) -> list[str]:
    """Of all that lies there, what is hidden too."""
    return sorted(path.name for path in folder.iterdir())


def test_whole_file(tmp_path):
    target = tmp_path / "a.json"
    with whole_file(target) as partial:
        partial.write_text("old")
        assert not target.exists()
    with pytest.raises(RuntimeError), whole_file(target) as partial:
        partial.write_text("ne")
        raise RuntimeError("the disk is full")
    assert target.read_text() == "old"
    with whole_file(target) as one, whole_file(target) as two:  # at once
        one.write_text("one")
        two.write_text("two")
    assert target.read_text() == "one" and names(tmp_path) == ["a.json"]


def test_atomic_folder(tmp_path):
    target = tmp_path / "checkpoint-5"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("killed")
    assert (target / "a").read_text() == "old"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "new"
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_folder_that_another_process_has_made_meanwhile_stays(tmp_path):
    target = tmp_path / "model"
    for word in ("first", "second"):  # once where nothing is, and once in the place of another
        with atomic_folder(target) as late:
            (late / "a").write_text("late")
            with atomic_folder(target) as folder:
                (folder / "a").write_text(word)
        assert (target / "a").read_text() == word
        assert names(tmp_path) == ["model"]


def make_many(folder, word, barrier):
    """Makes ROUNDS folders, each at the same moment as another process."""
    for number in range(ROUNDS):
        barrier.wait(60)
        with atomic_folder(folder / str(number)) as unfinished:
            for name in "abc":
                (unfinished / name).write_text(word)


@pytest.mark.parametrize("replaced", [False, True])
def test_two_processes_make_the_same_folders_at_once(tmp_path, replaced):
    for number in range(ROUNDS if replaced else 0):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a").write_text("before")
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    processes = [spawn.Process(target=make_many, args=(tmp_path, word, barrier)) for word in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert names(tmp_path) == sorted(map(str, range(ROUNDS)))
    for folder in tmp_path.iterdir():
        words = {name: (folder / name).read_text() for name in names(folder)}
        assert words in (dict.fromkeys("abc", word) for word in ("one", "two")), folder


def die_in(folder):
    with atomic_folder(folder) as unfinished:
        (unfinished / "a").write_text("half")
        os._exit(9)


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=die_in, args=(tmp_path / "model",))
    process.start()
    process.join(60)
    (left,) = tmp_path.iterdir()
    assert process.exitcode == 9 and str(process.pid) in left.name
    with atomic_folder(tmp_path / "model") as folder, atomic_folder(tmp_path / "other"):
        assert not left.exists()
        (folder / "a").write_text("whole")
    assert names(tmp_path) == ["model", "other"]


def test_removing_a_folder_minds_what_a_kill_left_of_it(tmp_path):
    for name in ("state", ".state.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    remove_folder(tmp_path / "state")
    assert names(tmp_path) == []
