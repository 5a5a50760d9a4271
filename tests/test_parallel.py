"Two real processes: exact sums, errors, signals, and nobody left behind."

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import parallel_jobs as jobs
import psutil
import pytest
import torch

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.training.processes import launch

PROGRAM = """
import signal, sys, torch
from crackseg_nb.training.processes import launch
from parallel_jobs import wait_for_signals
torch.set_num_threads(2)
torch.randn(500, 500) @ torch.randn(500, 500)  # a forked copy of this process would hang from here on
code = launch(wait_for_signals, (sys.argv[1], {signal.SIGTERM, signal.SIGUSR1}, sys.argv[2] == 'stuck'), devices=2)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
sys.exit(code)
"""


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def program(tmp_path, request):
    "Start two processes from a plain Python; nothing that belongs to it outlives the test."
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent), OMP_NUM_THREADS="2", TMPDIR=str(tmp_path))
    started = psutil.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), getattr(request, "param", "")],
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield started
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == started.pid:
                process.kill()
        except (psutil.Error, OSError):
            pass


def workers(process):
    "Return the started processes that already run the function."

    def words(child):
        try:
            return child.cmdline()
        except psutil.NoSuchProcess:
            return []  # it ended in between

    return [child for child in process.children() if "spawn_main" in " ".join(words(child))]


# One launch, many properties


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder, environment = tmp_path_factory.mktemp("two"), dict(os.environ)
    threads, output = torch.get_num_threads(), os.dup(1)
    with open(folder / "screen.txt", "w") as screen:  # of the whole process, as the started ones inherit it
        os.dup2(screen.fileno(), 1)
        try:
            code = launch(jobs.everything, (folder,), devices=2)
        finally:
            os.dup2(output, 1)
    assert os.environ == environment and torch.get_num_threads() == threads
    return code, folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_both_processes_ran_and_are_gone(two):
    code, _, answers = two
    assert code == 0
    assert [answer["world"] for answer in answers] == [2, 2]
    assert [answer["threads"] for answer in answers] == [max(1, torch.get_num_threads() // 2)] * 2
    assert not any(psutil.pid_exists(answer["pid"]) for answer in answers)


def test_only_the_first_process_writes_to_the_screen(two):
    _, folder, _ = two
    assert (folder / "screen.txt").read_text() == "process 0 is at work\n"


def test_sums_questions_and_objects(two):
    for answer in two[2]:
        assert answer["sum"] == [2.0, 10.0]
        assert answer["any"] == [False, True, True]
        assert answer["objects"] == [dict(rank=0), dict(rank=1)]


def test_gradients_are_summed_where_any_process_has_one(two):
    for found in (answer["gradients"] for answer in two[2]):
        assert found["both"].tolist() == [3.0, 6.0]
        assert found["one"].tolist() == [5.0, 6.0]
        assert found["none"] is None and found["frozen"] is None
        assert found["double"].tolist() == [1e-12 + (1 + 1e-12)] * 2  # a sum in float32 would lose the small part
        assert torch.equal(found["image"], torch.arange(24.0).view(2, 3, 2, 2) * 2)


def test_both_processes_say_that_one_has_no_room_for_the_exchange(two):
    first, second = (answer["no_room"] for answer in two[2])
    assert first == second and first.startswith("memory: found no room on cpu:0, or on another,")


def test_each_image_counts_once_in_the_metrics(two):
    expected = [jobs.metrics_of(range(count)).compute() for count in range(1, 8)]
    for answer in two[2]:
        assert answer["scores"] == expected
        assert answer["unnumbered"].startswith("merge: found images numbered as they came")


def test_running_statistics_are_those_of_one_process(two):
    one = jobs.Normalised()
    for image in jobs.micro_batches():
        one(image)
    first, second = (answer["buffers"] for answer in two[2])
    for name, expected in one.named_buffers():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-6)
    assert first["first.num_batches_tracked"] == 16 and torch.equal(first["frozen.running_var"], torch.ones(3))


# Errors


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "kind, message",
    [
        ("user", "data_root: found nothing, expected images"),
        ("bug", "process 1 of 2: IndexError: list index out of range"),
        ("killed", "devices: process 1 was ended by SIGKILL without an error of its own; often the machine's memory"),
    ],
)
def test_an_error_arrives_as_one_line_and_ends_all(kind, message, capfd, tmp_path):
    with pytest.raises(CrackSegError) as caught:
        launch(jobs.fail, (kind, tmp_path), devices=2)
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1
    assert (
        time.time() - (tmp_path / "failed").stat().st_mtime < 25
    )  # torch kills after 30 s what does not end by itself
    assert not workers(psutil.Process())
    if kind == "bug":
        assert "in fail" in str(caught.value.__cause__)
    assert "failed (exitcode" not in capfd.readouterr().err


# Signals


def test_signals_are_passed_on_and_there_is_time_to_save(program, tmp_path):
    wait_until(lambda: len(list(tmp_path.glob("?.started.*"))) == 2)
    program.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert program.poll() is None  # it waits for both
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 75
    assert len(list(tmp_path.glob("?.saved"))) == 2
    assert not list(tmp_path.glob("crackseg-*"))  # the notes


@pytest.mark.slow
def test_a_signal_before_the_work_begins_stops_it(program, tmp_path):
    wait_until(lambda: len(workers(program)) == 2)
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 75
    assert not list(tmp_path.glob("?.saved"))


@pytest.mark.few(1)
@pytest.mark.parametrize("program, number", [("stuck", signal.SIGKILL), ("", signal.SIGINT)], indirect=["program"])
def test_nobody_outlives_a_starter_that_is_killed_or_interrupted(program, number, tmp_path):
    wait_until(lambda: len(list(tmp_path.glob("?.started.*"))) == 2)
    pids = [int(path.suffix[1:]) for path in tmp_path.glob("?.started.*")]
    if number == signal.SIGINT:  # as a terminal does; the first is passed on as SIGTERM, and there is time to save
        os.killpg(program.pid, number)
        time.sleep(0.3)
        assert program.poll() is None and all(psutil.pid_exists(pid) for pid in pids)
    program.send_signal(number)
    errors = program.communicate(timeout=60)[1]
    assert program.returncode == -number
    if number == signal.SIGINT:
        assert errors.splitlines()[-1] == "KeyboardInterrupt"
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), seconds=30)
