"""Sweeps on this machine and on a real SLURM of one node: kills, requeues, retries, the table and the comparison."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
from slurm_cluster import wait_for
from stand_in import write_stand_in

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml
from crackseg_nb.core.run_folder import RunFolder, create_run_folder
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.jobs import attempts_of
from crackseg_nb.runs.sweep import Sweep, expand, notes_on

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TINY = (
    "model=deeplab_optimized pretrained=false synthetic_images=12 image_size=32 epochs=30 batch_size=4 "
    "device=cpu amp=off"
)
GRID = "lr=0.001,0.002 seed=1,2"


@pytest.fixture
def sweep(tmp_path):
    "Return a function that makes a sweep of the stand-in notebook; its jobs are ended."
    notebook, made = write_stand_in(tmp_path), []

    def create(grid=None, fixed=None, name="demo", **jobs):
        made.append(Sweep(name, grid, fixed, tmp_path / "outputs", notebook=notebook, **jobs))
        return made[-1]

    yield create
    for each in made:
        if each.active():
            each.cancel()


def state(sweep, index):
    return sweep.table()["state"].iloc[index]


def folder(sweep, index):
    return RunFolder(sweep.folder / list(sweep.runs)[index])


def has_trained(run, epochs=1):
    return (run / "history.csv").is_file() and len((run / "history.csv").read_text().splitlines()) > epochs


def log_of(sweep):
    return "\n".join(path.read_text()[-3000:] for path in sweep.folder.glob("jobs/*/*_log.*"))


def wait_until_done(sweep, seconds=120):
    wait_for(lambda: not sweep.active(), "the end of the jobs", seconds)
    table = sweep.table()
    assert list(table["state"]) == ["done"] * len(table), f"{table.to_string()}\n{log_of(sweep)}"
    return table


def check_comparison(sweep):
    "Compare the written comparison with the results of the runs, computed here."
    results = [read_yaml(sweep.folder / run / "final_results.yaml") for run in sweep.runs]
    written = pd.read_csv(sweep.folder / "comparison.csv").sort_values("lr")
    for row, (first, second) in zip(written.itertuples(), (results[:2], results[2:])):
        for name, keys in dict(
            val_iou=("val", "pooled", "iou"),
            test_iou=("test", "pooled", "iou"),
            test_per_image_f1=("test", "per_image", "f1"),
        ).items():
            values = [result[keys[0]][keys[1]][keys[2]] for result in (first, second)]
            assert (
                abs(getattr(row, name) - sum(values) / 2) < 1e-9
                and abs(getattr(row, f"{name}_spread") - abs(values[0] - values[1]) / 2**0.5) < 1e-9
            )
    assert list(written.sort_values("rank")["val_iou"]) == sorted(written["val_iou"], reverse=True)
    assert all(run in (sweep.folder / "comparison.md").read_text() for run in sweep.runs)


# Two by two runs, one of them killed or requeued: with the stand-in, and (slow) real ones,
# through the notebook here and through the command on SLURM

both_kinds = pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])


def start(tmp_path, real, command, **jobs):
    "Start a process that carries out the sweep `demo` and return it with the sweep, once its second run trains."
    if not real:
        notebook = str(write_stand_in(tmp_path))
        create = f'Sweep("demo", {GRID!r}, "epochs=30", {str(tmp_path)!r}, notebook={notebook!r}, **{jobs})'
        command = [
            sys.executable,
            "-c",
            f"import sys; from crackseg_nb.runs.sweep import *; sys.exit(carry_out({create}, False))",
        ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for((tmp_path / "demo" / "sweep.yaml").exists, "the sweep", 60)
    sweep = Sweep("demo", outputs=tmp_path)
    wait_for(lambda: has_trained(folder(sweep, 1)), "the second run", 120)
    return process, sweep


def check_end(process, sweep):
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-3000:] + log_of(sweep)
    assert list(wait_until_done(sweep)["attempts"]) == [1, 2, 1, 1]
    check_comparison(sweep)


@both_kinds
def test_a_sweep_on_this_machine_with_a_killed_run(tmp_path, real):
    words = {"name": "demo", "grid": GRID, "fixed": TINY, "outputs": tmp_path, "parallel": 2, "cpus": 1}
    command = [
        sys.executable,
        "-m",
        "papermill",
        ROOT / "nbs" / "sweep.ipynb",
        tmp_path / "result.ipynb",
        "-k",
        "python3",
        "--no-progress-bar",
        *[word for name, value in words.items() for word in ("-p", name, str(value))],
    ]
    process, sweep = start(tmp_path, real, command, parallel=2, cpus=1)
    victim = folder(sweep, 1)
    os.kill(victim.status["pid"], signal.SIGKILL)
    check_end(process, sweep)
    assert "the kernel died" in attempts_of(victim.path)[0]["message"] and attempts_of(victim.path)[1]["resumed"]
    if real:
        assert read_yaml(victim / "environment.yaml")["threads"] == 1


@pytest.mark.slurm
@both_kinds
def test_a_sweep_on_slurm_with_a_requeued_job(slurm, tmp_path, real):
    words = [word for value in GRID.split() for word in ("-g", value)] + [
        word for value in TINY.split() for word in ("-p", *value.split("="))
    ]
    command = [
        BIN / "crackseg_sweep",
        "demo",
        *words,
        "--outputs",
        tmp_path,
        "--cluster",
        "slurm",
        "--partition",
        "test",
        "--cpus",
        "1",
        "--time",
        "10",
    ]
    process, sweep = start(tmp_path, real, command, cluster="slurm", partition="test", cpus=1, time=10)
    subprocess.run(["scontrol", "requeue", job_of(sweep, 1)], check=True)
    check_end(process, sweep)
    first, second = attempts_of(folder(sweep, 1).path)
    assert (first["code"], first["failed"], second["resumed"], first["job"]) == (75, False, True, second["job"])


def job_of(sweep, index):
    "Return SLURM's name of the job that carries a run of the only submission."
    name = list(sweep.submissions())[0]
    lines = subprocess.run(
        ["squeue", "--noheader", "--array", "--name", name, "--format", "%F_%K"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return next(line for line in lines if line.endswith(f"_{index}"))


# Details, with a run notebook that starts in a second


def test_failed_runs_are_tried_again_and_never_ranked(sweep):
    "One after the other here: no more runs at once than wanted."
    both, running = sweep("lr=0.25,0.5", "epochs=5", parallel=1, retries=1), []
    both.submit()
    while both.active():
        running.append((both.table()["state"] == "running").sum())
    table = both.table()
    assert list(table["state"]) == ["done", "failed"] and list(table["attempts"]) == [2, 2] and max(running) == 1, (
        log_of(both)
    )
    assert list(both.compare()["rank"].isna()) == [False, True]
    assert "failed (loss: found NaN), not ranked" in (both.folder / "comparison.md").read_text()
    assert len(both.submit()) == 1  # what failed gets new retries, what is done is not repeated
    wait_for(lambda: not both.active(), "the end of the jobs", 90)
    assert list(both.table()["attempts"]) == [2, 4]


@pytest.mark.slow
def test_a_run_of_a_killed_job_is_taken_over(sweep, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    both = sweep("seed=1,2", "epochs=30", parallel=2, cpus=3)
    both.submit()
    assert both.active() and both.submit() == []
    wait_for(lambda: has_trained(folder(both, 0)) and has_trained(folder(both, 1)), "both runs", 60)
    psutil.Process(folder(both, 0).status["pid"]).parent().kill()
    table = wait_until_done(both)
    assert list(table["attempts"]) == [2, 1]
    assert read_yaml(folder(both, 0) / "threads.yaml")["OMP_NUM_THREADS"] == "3"


@pytest.mark.slow
def test_an_interrupt_stops_the_runs_and_the_same_sweep_goes_on(sweep, tmp_path):
    outputs, notebook = str(tmp_path / "outputs"), str(tmp_path / "stand_in.ipynb")
    create = f'Sweep("demo", "seed=1,2", "epochs=40", {outputs!r}, notebook={notebook!r}, parallel=2)'
    command = [
        sys.executable,
        "-c",
        f"import sys; from crackseg_nb.runs.sweep import *; sys.exit(carry_out({create}, False))",
    ]
    both = sweep("seed=1,2", "epochs=40", parallel=2)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for(lambda: has_trained(folder(both, 0)) and has_trained(folder(both, 1)), "both runs", 60)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "the same command goes on" in output and "Traceback" not in output, output
    assert list(both.table()["state"]) == ["stopped"] * 2 and not both.active(), log_of(both)
    both.submit()
    assert list(wait_until_done(both)["attempts"]) == [2, 2]


@pytest.mark.slow
@pytest.mark.slurm
def test_slurm_warns_cancels_and_goes_on(slurm, sweep):
    "A warned job (SIGUSR1) queues itself again; a cancelled one does not; the same sweep goes on with it."
    both = sweep("seed=1,2", "epochs=40", cluster="slurm", cpus=1, time=10)
    both.submit()
    wait_for(lambda: has_trained(folder(both, 0)) and has_trained(folder(both, 1)), "both runs", 60)
    subprocess.run(["scancel", "--signal=USR1", job_of(both, 0)], check=True)
    subprocess.run(["scancel", job_of(both, 1)], check=True)
    wait_for(lambda: not both.active(), "the end of the jobs", 90)
    assert [state(both, index) for index in range(2)] == ["done", "stopped"], log_of(both)
    assert list(both.table()["attempts"]) == [2, 1]
    assert both.submit() == [list(both.runs)[1]]
    assert list(wait_until_done(both)["attempts"]) == [2, 2]


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_whose_time_is_up_queues_itself_again(slurm, sweep):
    one = sweep(
        "seed=1", "epochs=1400", cluster="slurm", cpus=1, time=2
    )  # minutes; SLURM may warn a whole minute early
    one.submit()
    assert wait_until_done(one, 600)["attempts"].iloc[0] >= 2
    first = attempts_of(folder(one, 0).path)[0]
    assert (first["code"], first["failed"]) == (75, False)


@pytest.mark.slurm
def test_slurm_refuses_in_one_line(slurm, sweep):
    refused = sweep("seed=1,2", {}, cluster="slurm", partition="nowhere")
    with pytest.raises(CrackSegError, match="invalid partition") as caught:
        refused.submit()
    assert "\n" not in str(caught.value) and not refused.active() and not refused.submissions()


def test_a_run_beside_the_sweep_lends_its_weights_by_its_name(sweep, tmp_path):
    first = create_run_folder(tmp_path / "outputs", "first")
    (first / "checkpoints" / "best.json").touch()
    made = sweep("encoder_weights=none,first,ready")
    found = [configure(**given, outputs=str(made.folder)).encoder_weights for given in made.runs.values()]  # as a job
    assert found == ["", str(first.path), "ready"]


@pytest.mark.parametrize("score, told", [(None, ["No run has a validation IoU"]), (0.7, [])])
def test_runs_without_an_iou_are_not_ranked_and_that_is_told(score, told):
    runs = pd.DataFrame([dict(run="a", state="done", val_iou=score, data_fingerprint="x")])
    assert [note.partition(",")[0] for note in notes_on(runs)] == told


def test_another_grid_under_the_same_name_is_refused(sweep):
    sweep("seed=1,2", "epochs=3")
    assert list(sweep().runs) == ["00-seed=1", "01-seed=2"]
    for grid, fixed, words in (
        ("seed=1,2,3", "epochs=3", "other seed"),
        ("seed=1,2", "epochs=4", "other epochs"),
        ("lr=0.1", {}, "other seed, epochs, lr"),
    ):
        with pytest.raises(CrackSegError, match=words):
            sweep(grid, fixed)
    done = subprocess.run([BIN / "crackseg_sweep", "demo", "-g", "sed=1"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "did you mean 'seed'?" in done.stderr and done.stderr.count("\n") == 1


def test_a_file_of_weights_is_found_from_another_folder(tmp_path, monkeypatch):
    "A job may be started anywhere; other values of the same parameter stay as they are."
    monkeypatch.chdir(tmp_path)
    Path("first.safetensors").touch()
    runs = expand({"pretrained": ["first.safetensors", "auto"]}, dict(recipe="crack_unet"))
    assert [run["pretrained"] for run in runs] == [str(tmp_path / "first.safetensors"), "auto"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for run in runs:
        configure(**run)
