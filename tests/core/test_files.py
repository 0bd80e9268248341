"""Files and folders that several processes write at once: nothing is half written, mixed or lost, and a killed process blocks nobody."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import together

from glpretrain.core.files import append_lines, locked, new_folder, part_file, point, remove_parts, write_json

# A process that takes a lock, leaves incomplete files and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from glpretrain.core.files import locked, new_folder, part_file
folder = Path(sys.argv[1])
with locked(folder, argument="out") if sys.argv[2] == "lock" else new_folder(folder, last="card.json", argument="export") as part:
    with part_file((part or folder) / "a.json") as file:
        file.write_text("half")
        print("ready", flush=True)
        time.sleep(600)
"""


def holder(folder: Path, what: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder, what], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def killed(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"writer": 0, "numbers": [0] * 1000})

    def write_or_read(number: int) -> int:
        for count in range(40):
            if number < 2:
                write_json(path, {"writer": number, "numbers": [number] * (1000 + 5000 * (count % 2))})
            else:
                found = json.loads(path.read_text())
                assert set(found["numbers"]) == {found["writer"]}
        return 40

    assert [ended.error for ended in together(write_or_read, count=4)] == [""] * 4
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_file_that_cannot_be_completed_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(OSError, match="no space"), part_file(path) as part:
        part.write_text("half")
        raise OSError("no space")
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["results.json"]


def test_a_name_of_255_bytes_is_written(tmp_path: Path) -> None:
    name = "n" * 250 + ".json"
    write_json(tmp_path / name, {"a": 1})
    assert json.loads((tmp_path / name).read_text()) == {"a": 1} and os.listdir(tmp_path) == [name]


def test_a_link_always_leads_somewhere(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).mkdir()
    link = tmp_path / "latest"
    point(link, "0")

    def move_or_follow(number: int) -> None:
        for _ in range(200):
            if number < 3:
                point(link, str(number))
            else:
                assert link.is_dir()

    assert [ended.error for ended in together(move_or_follow, count=4)] == [""] * 4
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "latest"]


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    together(lambda number: [append_lines(path, [json.dumps([number] * 9000)] * 2) for _ in range(20)], count=4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 4 * 20 * 2 and all(len(line) == 9000 and len(set(line)) == 1 for line in lines)


def test_half_a_line_of_a_killed_process_costs_one_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    append_lines(path, ['{"a": 2}'])
    assert path.read_text().splitlines() == ['{"a": 1}', '{"a"', '{"a": 2}']


def test_a_lock_names_the_process_that_has_it(tmp_path: Path) -> None:
    process = holder(tmp_path / "out", "lock")
    try:
        with pytest.raises(ValueError) as refused, locked(tmp_path / "out", argument="out"):
            pass
    finally:
        killed(process)
    line = f"out: process {process.pid} on {platform.node()} is writing to {tmp_path / 'out'}; wait until it has ended, or end it"
    assert str(refused.value) == f"{line}, or give another folder"


def test_the_lock_and_the_files_of_a_killed_process_are_taken_over(tmp_path: Path) -> None:
    killed(holder(tmp_path, "lock"))
    assert len(list(tmp_path.glob(".*.part"))) == 1 and (tmp_path / ".lock").exists()
    with locked(tmp_path, argument="out"):
        remove_parts(tmp_path)
        assert (tmp_path / ".lock").read_text().splitlines()[0] == str(os.getpid())
    assert not os.listdir(tmp_path)


def test_one_process_at_a_time_has_a_lock(tmp_path: Path) -> None:
    def count_up(number: int) -> int:
        done = 0
        while done < 10:
            try:
                with locked(tmp_path, argument="out"):
                    count = int((tmp_path / "count").read_text())
                    time.sleep(0.001)
                    (tmp_path / "count").write_text(str(count + 1))
                    done += 1
            except ValueError as error:
                assert "is writing to" in str(error)
        return done

    (tmp_path / "count").write_text("0")
    assert [ended.value for ended in together(count_up, count=4)] == [10] * 4
    assert (tmp_path / "count").read_text() == "40"


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_one_of_four_processes_fills_a_new_folder(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "out"
    if there:
        folder.mkdir()

    def fill(number: int) -> None:
        with new_folder(folder, last="card.json", argument="export") as part:
            for name in ("card.json", "model"):
                (part / name).write_text(str(number))
                time.sleep(0.02)

    ended = together(fill, count=4)
    (winner,) = (number for number, one in enumerate(ended) if not one.error)
    assert all("is writing to" in one.error or "is not empty and nothing is overwritten" in one.error for one in ended if one.error)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"card.json": str(winner), "model": str(winner)}


def test_a_folder_that_could_not_be_filled_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(OSError, match="no space"), new_folder(tmp_path / name, last="card.json", argument="export") as part:
            (part / "model").write_text("half")
            raise OSError("no space")
    assert os.listdir(tmp_path) == ["empty"] and not os.listdir(tmp_path / "empty")


def test_a_folder_that_a_killed_process_had_begun_can_be_filled(tmp_path: Path) -> None:
    killed(holder(tmp_path / "out", "new"))
    with new_folder(tmp_path / "out", last="card.json", argument="export") as part:
        (part / "card.json").write_text("whole")
    assert os.listdir(tmp_path / "out") == ["card.json"]
