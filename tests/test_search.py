"""Searches beyond the chapter: ended and gone on with, on SLURM, without Optuna, and where nothing can be trained."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
from optuna.trial import TrialState
from slurm_cluster import wait_for

from crackseg_nb.core.checks import CrackSegError, Stopped
from crackseg_nb.core.machine import this_process
from crackseg_nb.studies import search as search_module
from crackseg_nb.studies.search import Goal, Search, is_gone, open_study
from crackseg_nb.studies.search_command import search_main
from crackseg_nb.training.interrupt import StopRequest

TINY = dict(data="synthetic", synthetic_images=12, synthetic_width="4,8", image_size=32, epochs=2, batch_size=4)
TINY |= dict(
    recipe="deeplab_test", model="deeplab_optimized", pretrained="false", aspp_rates="1,2", device="cpu", amp="off"
)
SPACE = {"lr": "1e-4..1e-2:log", "aspp_channels": "8,16"}
TABLES = ["score", "lr", "aspp_channels", "epoch"]
CODE = """
import sys
from crackseg_nb.studies.search import Search
Search("killed", outputs=sys.argv[1]).work(2)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A search of two trials that nobody disturbed."
    search = Search("whole", SPACE, TINY | dict(epochs=6, checkpoint_every=1), tmp_path_factory.mktemp("outputs"))
    search.work(2)
    return search


@pytest.mark.few(1)
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_search_that_was_ended_goes_on_as_if_nothing_had_happened(whole, tmp_path, number):
    search = Search("killed", whole.space, whole.fixed, tmp_path)
    process = subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path)], stderr=subprocess.DEVNULL)
    history = search.folder / "trial-0000" / "history.csv"
    wait_for(lambda: history.is_file() and len(pd.read_csv(history)) > 1, "the second epoch", 120)
    process.send_signal(getattr(signal, number))
    assert process.wait(timeout=60) != 0
    assert len(pd.read_csv(history)) < 6 and list(search.table()["state"]) == ["interrupted"]
    search.work(2)
    found, wanted = search.table(), whole.table()
    assert list(found["state"]) == ["complete"] * 2 and list(found.index) == ["trial-0000", "trial-0001"]
    assert found[TABLES].equals(wanted[TABLES])
    for run in found.index:
        assert (search.folder / run / "history.csv").read_bytes() == (whole.folder / run / "history.csv").read_bytes()


def test_a_search_looks_at_no_test_image_and_keeps_little(whole):
    for run in whole.table().index:
        names = {path.name for path in (whole.folder / run).iterdir()}
        assert "final_results.yaml" not in names and not list((whole.folder / run / "predictions").glob("*"))
        states = [path.stem for path in (whole.folder / run / "checkpoints").glob("*.json")]
        assert sorted(state.split("_")[0] for state in states) == ["best", "epoch"], states


def test_what_is_reported_to_the_pruner_is_each_epoch(whole):
    for trial in open_study(whole).get_trials():
        history = pd.read_csv(whole.folder / trial.user_attrs["run"] / "history.csv")
        assert list(trial.intermediate_values.values()) == history["val_iou"].tolist()
        assert trial.value == history["val_iou"].max()


def test_a_search_that_was_stopped_in_a_notebook_goes_on_in_the_same_kernel(whole, tmp_path, monkeypatch):
    "The process of the trial is alive then, and is this one."
    search = Search("halted", whole.space, whole.fixed, tmp_path)
    monkeypatch.setattr(StopRequest, "reason", property(lambda stop: "SIGINT"))
    with pytest.raises(Stopped):
        search.work(2)
    monkeypatch.undo()
    assert list(search.table()["state"]) == ["interrupted"] and search.finish() == []
    search.work(2)
    assert search.table()[TABLES].equals(whole.table()[TABLES])


def test_trials_of_another_machine_are_left_to_it(whole):
    "Its process numbers mean nothing here."
    process = this_process() | {"pid": 2**22 + 1}
    running = SimpleNamespace(state=TrialState.RUNNING, user_attrs={"process": process})
    assert is_gone(running)
    process["host"] = "elsewhere"
    assert not is_gone(running)


def test_any_error_of_a_trial_is_one_failed_trial(tmp_path, monkeypatch):
    search = Search("broken", {"lr": "1e-3..1e-2:log"}, TINY | dict(epochs=1), tmp_path)
    train, calls = search_module.train_trial, []

    def once(*words):
        calls.append(words)
        if len(calls) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return train(*words)

    monkeypatch.setattr(search_module, "train_trial", once)
    search.work(2)
    assert list(search.table()["state"]) == ["fail", "complete"]


def test_a_cost_that_cannot_be_measured_is_one_failed_trial(tmp_path, monkeypatch):
    "It is measured when the training is over; a restart would go into the same error again and again."
    search = Search("costly", {"lr": "1e-3..1e-2:log"}, TINY | dict(epochs=1), tmp_path, Goal("latency"))
    costs = iter([RuntimeError("no clock"), 3.0])

    def cost_of(*_):
        if isinstance(cost := next(costs), Exception):
            raise cost
        return cost

    monkeypatch.setattr(search_module, "cost_of", cost_of)
    search.work(2)
    assert list(search.table()["state"]) == ["fail", "complete"]


def test_the_table_of_a_search_without_trials_is_empty(tmp_path, capsys):
    Search("fresh", SPACE, TINY, tmp_path)
    assert search_main(["fresh", "--table", "--outputs", str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_what_a_search_is_given_counts_or_is_refused(tmp_path, capsys):
    for given, told in (["--trials", "0"], "trials: found 0"), (["--against", "latency"], "with another goal"):
        Search("given", SPACE, TINY, tmp_path)
        assert search_main(["given", *given, "--outputs", str(tmp_path)]) == 1
        assert told in capsys.readouterr().err


def test_a_poor_trial_ends_early_and_leaves_no_weights(tmp_path, monkeypatch):
    search = Search("pruned", {"lr": "1e-3..1e-2:log"}, TINY | dict(epochs=5), tmp_path)
    monkeypatch.setattr("optuna.trial.Trial.should_prune", lambda trial: True)
    search.work(1)
    assert list(search.table()["state"]) == ["pruned"] and search.best() == []
    assert len(pd.read_csv(search.folder / "trial-0000" / "history.csv")) == 1
    assert not (search.folder / "trial-0000" / "checkpoints").exists()


def test_four_trials_and_two_epochs_are_spared(tmp_path):
    search = Search("spared", SPACE, TINY, tmp_path)
    study, ended = open_study(search), []
    for score in (0.5, 0.5, 0.5, 0.5, 0.1):
        trial = study.ask(search.distributions)
        for epoch in (1, 2, 3):
            trial.report(score, epoch)
            ended.append(trial.should_prune())
        study.tell(trial, score)
    assert ended == 14 * [False] + [True]


def test_a_search_in_which_nothing_can_be_trained_ends(tmp_path):
    search = Search("infinite", {"lr": "1e30..1e32:log"}, TINY, tmp_path)
    with pytest.raises(
        CrackSegError, match="search: found no trial that can be trained in 3; trial-0002: failed: loss"
    ):
        search.work(9)
    assert list(search.table()["state"]) == ["fail"] * 3


def test_seeds_choose_other_trials(tmp_path):
    first, second = (
        Search(name, {"lr": "1e-3..1e-2"}, TINY | dict(epochs=1), tmp_path, Goal(seed=seed))
        for name, seed in (("a", 1), ("b", 2))
    )
    for search in (first, second):
        search.work(1)
    assert first.table()["lr"].iloc[0] != second.table()["lr"].iloc[0]


def test_without_optuna_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert search_main(["none", "-s", "lr=1e-3..1e-2", "--outputs", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "search: found no package optuna, expected it, by: pip install 'crackseg_nb[search]'\n"
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.slurm
def test_jobs_on_slurm_share_a_search(slurm, tmp_path):
    search = Search("shared", {"lr": "1e-3..1e-2:log"}, TINY | dict(epochs=1), tmp_path, cluster="slurm", parallel=2)
    assert search.submit(3) == 2
    wait_for(lambda: list(search.table().get("state", [])) == ["complete"] * 3, "three trials", 240)
    wait_for(lambda: not search.active(), "the end of the jobs", 60)
    time.sleep(0.1)
    assert search.submit(3) == 0
