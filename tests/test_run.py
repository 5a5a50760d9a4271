"""One run from the command line: signals, dead kernels, exit statuses, claims."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from slurm_cluster import wait_for
from stand_in import write_stand_in

from crackseg_nb.core.checks import RESUME_CODE
from crackseg_nb.core.run_folder import Claimed, RunFolder, claim
from crackseg_nb.runs import notebook as notebook_module
from crackseg_nb.runs.command import main

BIN = Path(sys.executable).parent
CODE = """
import sys, json
from crackseg_nb.core.run_folder import claim
from crackseg_nb.runs.notebook import execute
from pathlib import Path
folder, notebook, parameters = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
with claim(folder) as lock: outcome = execute(folder, lock, parameters, notebook=notebook)
print(outcome.message)
sys.exit(outcome.code)
"""


@pytest.fixture
def launch(tmp_path):
    "Return a function that starts a process which executes the stand-in notebook; whatever is left of them is ended."
    notebook, started = write_stand_in(tmp_path), []

    def start(run="run", resume=False, environment=None, **parameters):
        folder = tmp_path / run
        parameters = {"resume": str(folder)} if resume else {"outputs": str(tmp_path), "run_name": run, **parameters}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", CODE, folder, notebook, json.dumps(parameters)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        )
        return started[-1], RunFolder(folder)

    yield start
    for process in started:
        process.kill()


def end_of(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines()[-1] if out else "", out + err


def has_trained(folder):
    return (folder / "history.csv").is_file()


def kernel_of(folder):
    return folder.status["pid"]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "number, seen, seconds", [("SIGTERM", "SIGTERM", 7), ("SIGUSR1", "SIGUSR1", 0), ("SIGINT", "SIGTERM", 0)]
)
def test_a_signal_stops_a_run_with_its_checkpoint(launch, number, seen, seconds):
    "Also when the checkpoint takes longer than Jupyter waits for a kernel to shut down."
    process, folder = launch(epochs=1000, environment={"CHECKPOINT_SECONDS": str(seconds)})
    wait_for(lambda: has_trained(folder), "the first epoch")
    process.send_signal(getattr(signal, number))
    code, line, output = end_of(process)
    assert code == RESUME_CODE and line == f"run: stopped; resume it with: crackseg_run -p resume {folder.path}", output
    assert folder.state == "stopped" and folder.status["reason"] == seen
    executed = json.loads((folder / "result.ipynb").read_text("utf-8"))
    assert any(output.get("ename") == "Stopped" for cell in executed["cells"] for output in cell.get("outputs", []))


def test_a_signal_before_the_run_has_begun(launch, tmp_path):
    process, folder = launch(epochs=1000)
    wait_for((tmp_path / ".locks" / "run.lock").exists, "the claim")
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, line, output = end_of(process)
    assert code == RESUME_CODE and ("the same command starts it" in line or "resume it with" in line), output


def test_a_second_interrupt_ends_at_once(launch):
    process, folder = launch(epochs=1000, environment={"CHECKPOINT_SECONDS": "60"})
    wait_for(lambda: has_trained(folder), "the first epoch")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert end_of(process)[0] not in (0, RESUME_CODE)
    wait_for(lambda: folder.state == "interrupted", "the end of the kernel")


def test_a_killed_kernel_can_be_resumed(launch):
    process, folder = launch(epochs=30)
    wait_for(lambda: has_trained(folder), "the first epoch")
    os.kill(kernel_of(folder), signal.SIGKILL)
    code, line, output = end_of(process)
    assert code == RESUME_CODE and line.startswith(
        "run: the kernel died (killed, or out of memory); resume it with: "
    ), output
    assert folder.state == "interrupted"
    code, line, output = end_of(launch(resume=True)[0])
    assert (code, line) == (0, "run: done") and folder.state == "done", output
    assert "epoch 30" in output and "epoch 1 " not in output


def test_what_a_kernel_said_before_it_died_is_shown(launch):
    process, folder = launch(lr=0.75)
    code, line, output = end_of(process)
    assert code == RESUME_CODE and line.startswith("run: the kernel died"), output
    assert "illegal memory access\n" in output and folder.state == "interrupted"


def test_a_run_stays_claimed_until_its_kernel_is_gone(launch):
    process, folder = launch(epochs=1000)
    wait_for(lambda: has_trained(folder), "the first epoch")
    kernel = psutil.Process(kernel_of(folder))
    kernel.suspend()  # it cannot notice that its parent is gone
    try:
        process.kill()
        process.wait()
        with pytest.raises(Claimed, match="another process at work on this run"), claim(folder.path):
            pass
    finally:
        kernel.resume()
    with claim(folder.path, patience=10):
        assert not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE
    wait_for(lambda: folder.state == "interrupted", "the end of the kernel")


def test_a_failed_run_is_reported_in_one_line(launch):
    process, folder = launch(lr=0.5)
    code, line, output = end_of(process)
    assert code == 1 and line == "run: loss: found NaN, expected a finite number" and "Traceback" not in output, output
    assert folder.state == "failed"
    assert end_of(launch(resume=True)[0])[:2] == (1, line)  # a status from the first attempt is no sign of success


def test_a_run_that_another_process_carries_is_refused(launch):
    process, folder = launch(epochs=1000)
    wait_for(lambda: has_trained(folder), "the first epoch")
    code, _, output = end_of(launch(resume=True)[0])
    assert code == 1 and "Claimed: run: found another process at work on this run" in output
    assert process.poll() is None and folder.state == "running"


def test_the_command_stops_and_resumes_a_real_run(tmp_path):
    words = (
        f"-p outputs {tmp_path} -p run_name real -p synthetic_images 12 -p image_size 32 -p epochs 10 -p batch_size 4 "
        "-p device cpu -p amp off -p model deeplab_optimized -p pretrained false"
    )
    process = subprocess.Popen(
        [BIN / "crackseg_run", *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    folder = RunFolder(tmp_path / "real")
    wait_for(lambda: has_trained(folder), "the first epoch", 300)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == RESUME_CODE and folder.state == "stopped" and "epoch 1/10" in out, (
        out[-2000:] + err[-2000:]
    )
    resume = re.search(r"resume it with: (crackseg_run .*)", out)[1]
    done = subprocess.run(
        [BIN / "crackseg_run", *shlex.split(resume)[1:]], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0 and "epoch 10/10" in done.stdout and "epoch 1/10" not in done.stdout, (
        done.stdout[-2000:] + done.stderr[-2000:]
    )
    assert (
        folder.state == "done"
        and len((folder / "history.csv").read_text().splitlines()) == 11
        and (folder / "result.ipynb").is_file()
    )


def test_the_command_leaves_out_what_was_tried_in_the_notebook(tmp_path, monkeypatch, capsys):
    edited, given = tmp_path / "run_experiment.ipynb", {}
    cell = nbformat.v4.new_code_cell(
        "epochs: int = 1\nlr: float = None\nweight_decay: float = 2 * 1e-4\nseed = 3", metadata={"tags": ["parameters"]}
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), edited)

    def note(notebook, result, parameters, relay, lock):
        given.update(parameters)
        return "no kernel", False

    monkeypatch.setattr(notebook_module, "door", lambda name: edited)
    monkeypatch.setattr(notebook_module, "execute_notebook", note)
    assert main(["-p", "lr", "1e-3", "-p", "outputs", str(tmp_path / "made"), "-p", "run_name", "night"]) == 1
    left_out = {"epochs": None, "weight_decay": None, "seed": None}
    assert given == {**left_out, "lr": 1e-3, "outputs": str(tmp_path / "made"), "run_name": "night"}
    assert (
        "run_experiment.ipynb: left out epochs=1, weight_decay=2 * 0.0001, seed=3, set in the notebook itself"
        in capsys.readouterr().out
    )


def test_the_command_reports_a_mistake_in_one_line(tmp_path):
    done = subprocess.run(
        [BIN / "crackseg_run", "-p", "resume", "nowhere"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert (
        done.returncode == 1
        and done.stdout == ""
        and done.stderr.startswith("resume: found no run 'nowhere'")
        and done.stderr.count("\n") == 1
    )
