"""The benchmark: equal work, the same weights, what the clock counts, and the notebook."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml
from crackseg_nb.data.augment import create_augmentation
from crackseg_nb.data.dataset import CrackDataset
from crackseg_nb.sources.registry import read_source
from crackseg_nb.studies import race as race_module
from crackseg_nb.studies.race import Contest, Contestant, enter_all, enter_resident, race, ratios, seconds_of, turns
from crackseg_nb.studies.training_speed import BenchmarkConfig, algorithms, time_first_step
from crackseg_nb.synthetic.cracks import write_synthetic
from crackseg_nb.training.losses import create_loss
from crackseg_nb.training.settings import OptimConfig, TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "benchmark_training.ipynb"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read_source("folder", write_synthetic(tmp_path_factory.mktemp("data") / "photos", 12, (32, 32), seed=1))


@pytest.fixture
def make_contest(source):
    def make(dataset=CrackDataset, device="cpu", **settings):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout2d(0.2),
            nn.Conv2d(8, 1, 3, padding=1),
        )
        images = dataset(
            source.samples, source.mask_encoding, create_augmentation("basic", (32, 32)), seed=1, progress=False
        )
        config = TrainConfig(
            **{**dict(batch_size=2, accumulation=3, gradient_checkpointing=False, amp="off"), **settings}
        )
        optim = OptimConfig("sgd", lr=0.1, scheduler="onecycle")  # AdamW would hide a gradient of another size
        return Contest(model, create_loss("focal_dice"), images, config, optim, torch.device(device), seed=1)

    return make


def assert_same_weights(contestants, **tolerance):
    expected = contestants["bare"].model.state_dict()
    for name in set(contestants) - {"bare", "resident"}:
        found = contestants[name].model.state_dict()
        assert found.keys() == expected.keys()
        for key in expected:
            place = f"{name}: {key}: "
            torch.testing.assert_close(found[key], expected[key], **tolerance, msg=place.__add__)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "settings", [{}, {"clip_norm": 0.05}, {"amp": "bf16"}, {"channels_last": False, "accumulation": 1}], ids=str
)
def test_all_do_the_same_work_and_end_at_the_same_weights(make_contest, settings):
    contest = make_contest(**settings)
    contestants = enter_all(contest)
    table = race(contestants, rounds=2)
    assert set(table["images"]) == {12} and set(table["steps"]) == {12 // (2 * contest.config.accumulation)}
    assert table.groupby("contestant")["seconds"].min().gt(0).all()
    assert_same_weights(contestants, atol=1e-5, rtol=1e-4)
    moved = contestants["bare"].model[0].weight - contest.model[0].weight
    assert moved.abs().max() > 1e-3


def test_lightning_takes_part_or_is_left_out(make_contest, monkeypatch):
    pytest.importorskip("lightning")
    assert list(enter_all(make_contest())) == ["trainer", "bare", "resident", "lightning"]
    monkeypatch.setattr(race_module, "has_lightning", lambda: False)
    assert list(enter_all(make_contest())) == ["trainer", "bare", "resident"]


def fake(seconds, images=4, steps=1):
    "Return a contestant that says it took `seconds(number)`."
    model = nn.Conv2d(3, 1, 1)
    optimizer = torch.optim.SGD(model.parameters())

    def epoch(number):
        model(torch.zeros(images, 3, 2, 2)).sum().backward()
        for _ in range(steps):
            optimizer.step()
        return seconds(number)

    return Contestant(model, epoch)


def test_the_warm_up_does_not_count():
    table = race(
        {"trainer": fake(lambda number: 100.0 if number == 0 else 1.0), "bare": fake(lambda number: 2.0)}, rounds=3
    )
    assert table["seconds"].max() == 2 and sorted(table["round"].unique()) == [1, 2, 3]
    assert ratios(table).loc["bare", ["ratio", "low", "high"]].tolist() == pytest.approx([2, 2, 2])
    cold = race({"trainer": fake(lambda number: 100.0 if number == 0 else 1.0)}, rounds=1, warmup=0)
    assert cold["seconds"].tolist() == [100]


@pytest.mark.parametrize("less", [dict(images=3), dict(steps=0)], ids=str)
def test_who_does_less_is_found_out(less):
    with pytest.raises(
        CrackSegError, match=rf"unequal work in round 0, {next(iter(less))}: .*lazy {next(iter(less.values()))}"
    ):
        race({"bare": fake(lambda number: 1.0), "lazy": fake(lambda number: 1.0, **less)}, rounds=1)


def test_everybody_is_first_and_last_equally_often():
    orders = [turns(list("abcd"), number) for number in range(8)]
    assert sorted(order[0] for order in orders) == sorted(order[-1] for order in orders) == sorted("abcd" * 2)


def test_loading_counts_for_all_but_the_resident(make_contest):
    class Slow(CrackDataset):
        def __getitem__(self, key):
            time.sleep(0.02)
            return super().__getitem__(key)

    table = race(enter_all(make_contest(Slow)), rounds=1)
    seconds = table.set_index("contestant")["seconds"]
    assert seconds.drop("resident").min() > 12 * 0.02 and seconds["resident"] < 12 * 0.02


def test_nobody_changes_the_algorithms_for_the_others(make_contest):
    contestants, seen = enter_all(make_contest()), {}
    for name, contestant in contestants.items():

        def see(module, inputs, name=name):
            seen.setdefault(name, set()).add(torch.are_deterministic_algorithms_enabled())

        contestant.model.register_forward_pre_hook(see)
    for wanted in (True, False):
        seen.clear()
        with algorithms(repeatable=wanted, fill=False):
            race(contestants, rounds=1)
        assert seen == dict.fromkeys(contestants, {wanted})

    def careless(number):
        torch.use_deterministic_algorithms(True)

    changed = "careless changed torch.s settings: deterministic False to True"
    with algorithms(repeatable=False, fill=True), pytest.raises(CrackSegError, match=changed):
        race({"careless": Contestant(nn.Conv2d(3, 1, 1), careless)}, rounds=1)


def test_resident_batches_are_those_of_the_loader(make_contest, monkeypatch):
    taken, contest = [], make_contest()
    monkeypatch.setattr(
        race_module, "plain_epoch", lambda contest, model, optimizer, scaler, batches: taken.append(batches)
    )
    enter_resident(contest).epoch(5)
    loader = contest.loader()
    loader.batch_sampler.set_epoch(0)
    for found, expected in zip(taken[0], loader, strict=True):
        assert torch.equal(found["image"], expected["image"])


def test_precision_is_decided_once_for_all(make_contest, monkeypatch):
    asked = []

    def measure(amp, device, ask):
        asked.append(amp)
        return "bf16" if amp == "auto" else amp

    monkeypatch.setattr(race_module, "choose_precision", measure)
    contest = make_contest(amp="auto")
    contestants = enter_all(contest)
    assert asked == ["auto"] and contest.config.amp == "bf16"
    with contest.autocast():
        assert contestants["bare"].model(torch.zeros(2, 3, 32, 32)).dtype == torch.bfloat16


def test_the_clock_is_read_when_the_device_has_nothing_left_to_do(monkeypatch):
    done = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
        patch.setattr(race_module.time, "perf_counter", lambda: float(done.append("look") or len(done)))
        seconds_of(lambda: done.append("work"), torch.device("cuda"))
    assert done == ["wait", "look", "work", "wait", "look"]


@pytest.mark.gpu
def test_the_clock_waits_for_the_device(make_contest):
    device, square = torch.device("cuda"), torch.randn(8192, 8192, device="cuda")

    def work():
        for _ in range(20):
            square @ square

    queued = seconds_of(work, torch.device("cpu"))
    torch.cuda.synchronize()
    assert seconds_of(work, device) > 2 * queued
    contestants = enter_all(make_contest(device="cuda"))
    race(contestants, rounds=2)
    assert_same_weights(contestants, atol=1e-3, rtol=1e-2)


# The notebook


def parameters_cell():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return "".join(next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))["source"])


def test_the_parameters_cell_says_what_the_settings_are():
    given = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(parameters_cell()).body}
    defaults = {name: value for name, value in vars(BenchmarkConfig()).items() if name not in ("name", "models")}
    assert given == {"name": "", "models": (), **defaults}


@pytest.mark.slow
def test_the_notebook_runs_and_writes_its_figures(tmp_path):
    small = dict(
        name="small",
        outputs="made",
        image_size=64,
        accumulation=1,
        rounds=1,
        sizes="64",
        batches="2",
        threads=1,
        device="cpu",
    )
    words = [word for name, value in small.items() for word in ("-p", name, str(value))]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(NOTEBOOK),
            "result.ipynb",
            "-k",
            "python3",
            "--no-progress-bar",
            *words,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows, summary = (
        pd.read_csv(tmp_path / "made" / "small" / "benchmark.csv"),
        read_yaml(tmp_path / "made" / "small" / "benchmark.yaml"),
    )
    assert set(rows["part"]) == {"contest", "options", "evaluation", "cost of image_size", "cost of batch_size"}
    phases = summary["seconds_to_first_step"]["first run"]
    assert phases["total"] == pytest.approx(sum(value for name, value in phases.items() if name != "total"), rel=0.01)
    assert phases["imports"] > 0 and phases["training to the first step"] > 0


@pytest.mark.slow
def test_a_run_without_a_step_is_named(tmp_path):
    with pytest.raises(CrackSegError, match="came to no optimiser step: .*image_size: found 3"):
        time_first_step(tmp_path, image_size=3)
