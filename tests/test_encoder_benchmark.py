"""The comparison of encoders: what is averaged and ranked, what is refused, what is written, and the notebook."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import write_yaml
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.runs.config import notebook_settings
from crackseg_nb.runs.sweep import read_fixed
from crackseg_nb.studies.encoder_benchmark import (
    FAMILY_COLOURS,
    EncoderBenchmark,
    EncoderBenchmarkConfig,
    cautions,
    class_means,
    compare_pairs,
    readable,
    show_accuracy,
    show_classes,
    strength_of,
    summarise,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "benchmark_encoders.ipynb"
CLASSES = ("background", "crack", "spalling")


@pytest.fixture
def create(tmp_path):
    "Return a function that makes a benchmark and run folders from (encoder, seed) -> changes; None: not run."

    def make(scores=None, encoders=("mobilenet", "swin"), seeds=(1, 2), **settings):
        benchmark = EncoderBenchmark(
            EncoderBenchmarkConfig(
                encoders=encoders, seeds=seeds, outputs=str(tmp_path), **{"image_size": 32, "rounds": 1, **settings}
            )
        )
        for run, given in benchmark.sweep.runs.items():
            changes = (scores or {}).get((given["encoder"], given["seed"]), {})
            if changes is not None:
                write_run(RunFolder(benchmark.folder / run), **changes)
        return benchmark

    return make


def write_run(
    folder,
    state="done",
    val=0.5,
    test=0.5,
    absent=(),
    fingerprint="one",
    weights="from scratch",
    test_epoch=False,
    classes=CLASSES,
    speeds=(9.0, 30.0, 32.0),
):
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.mark(state, **({"error": "loss: found NaN"} if state == "failed" else {}))
    if state != "done":
        return
    pd.DataFrame({"epoch": range(len(speeds)), "images_per_second": speeds}).to_csv(
        folder / "performance.csv", index=False
    )
    write_yaml(
        folder / "environment.yaml",
        dict(
            processor="Some processor",
            threads=2,
            gpus=[],
            packages={"torch": "2.14"},
            git={"commit": "f" * 40, "modified": True},
        ),
    )
    per_class = {"per_class": {name: {"iou": None if name in absent else test} for name in classes}} if classes else {}
    write_yaml(
        folder / "final_results.yaml",
        {
            "val": {"pooled": {"iou": val}},
            "test": {"pooled": {"iou": test}, "num_images": 7, **per_class},
            "protocol": {
                "epoch": 2,
                "epochs_trained": 3,
                "epoch_rule": "the highest",
                **({"test_epoch": True} if test_epoch else {}),
            },
            "model": {"parameters": 5, "weights": weights},
            "data_fingerprint": fingerprint,
            "performance": {"precision": "no", "peak_memory_mib": 800.0, "seconds": {"train": 3.0}},
        },
    )


def scores_of(**values):
    "Return made-up runs, a test score per seed; validation scores are the same."
    return {
        (encoder, seed): dict(val=value, test=value)
        for encoder, tests in values.items()
        for seed, value in enumerate(tests, start=1)
    }


# What is averaged and ranked


def test_the_order_does_not_follow_test_scores(create):
    scores = {
        ("mobilenet", 1): dict(val=0.8, test=0.1),
        ("mobilenet", 2): dict(val=0.8, test=0.3),
        ("swin", 1): dict(val=0.7, test=0.9),
        ("swin", 2): dict(val=0.7, test=0.9),
    }
    table = summarise(create(scores).runs())
    assert list(table.index) == ["mobilenet", "swin"] and list(table["rank"]) == [1, 2]
    assert table.loc["mobilenet", ["test_iou", "spread", "lowest", "highest"]].tolist() == pytest.approx(
        [0.2, np.std([0.1, 0.3], ddof=1), 0.1, 0.3]
    )
    assert list(table["family"]) == ["mobile CNN", "ViT"]


@pytest.mark.parametrize("state", ["failed", "stopped", "running", None])
def test_a_run_that_is_not_done_is_listed_but_neither_averaged_nor_ranked(create, state):
    scores = scores_of(mobilenet=(0.4, 0.5), swin=(0.6, 0.9)) | {("swin", 2): state and dict(state=state, test=0.9)}
    benchmark = create(scores)
    if state in (None, "running"):
        state = {"running": "running", None: "waiting"}[state]
    runs = benchmark.runs()
    table = summarise(runs)
    assert runs["state"].tolist() == ["done", "done", "done", state] and np.isnan(runs["test_iou"].iloc[3])
    assert table.loc["swin", ["done", "runs", "test_iou"]].tolist() == [1, 2, 0.6] and table[
        "rank"
    ].isna().tolist() == [False, True]
    [verdict] = compare_pairs(runs, list(table.index))["verdict"]
    assert verdict.startswith("can't tell") and verdict.endswith("but one seed says nothing of the scatter.")
    told = cautions(runs)[0]
    assert (
        told.startswith(f"03-encoder=swin-seed=2: {state}")
        and told.endswith("neither averaged nor ranked.")
        and ("found NaN" in told) == (state == "failed")
    )


@pytest.mark.slow
def test_without_any_run_there_are_still_tables_and_figures(create):
    benchmark = create({(encoder, seed): None for encoder in ("mobilenet", "swin") for seed in (1, 2)})
    benchmark.finish()
    assert (benchmark.folder / "classes.png").stat().st_size
    verdicts = pd.read_csv(benchmark.folder / "differences.csv")["verdict"]
    assert verdicts.tolist() == ["can't tell mobilenet from swin: no seed in common."]
    assert readable(benchmark.table())["test IoU"].tolist() == ["-", "-"]


@pytest.mark.slow
def test_one_seed_and_one_encoder(create):
    benchmark = create(scores_of(mobilenet=(0.5,), swin=(0.9,)), seeds=(1,))
    assert benchmark.differences()["result"].tolist() == ["can't tell"] and np.isnan(benchmark.table()["spread"]).all()
    assert strength_of(pd.DataFrame({"seeds": [1]})).startswith("One seed tells nothing about the scatter")
    alone = create(scores_of(swin=(0.5, 0.6)), encoders=("swin",), name="alone")
    assert len(alone.differences()) == 0 and alone.table().loc["swin", "rank"] == 1
    alone.finish()


def test_a_class_without_a_pixel_counts_in_no_mean(create):
    scores = scores_of(mobilenet=(0.4, 0.6), swin=(0.5, 0.7))
    for (_, seed), run in scores.items():
        run["absent"] = ("crack", "spalling") if seed == 2 else ("spalling",)
    runs = create(scores).runs()
    means = class_means(runs, ["swin", "mobilenet"])
    assert (
        means["crack"].tolist() == [0.5, 0.4]
        and means["background"].tolist() == pytest.approx([0.6, 0.5])
        and means["spalling"].isna().all()
    )
    assert [text.get_text() for text in show_classes(means).axes[0].texts] == [
        "0.60",
        "0.50",
        "no\npixel",
        "0.50",
        "0.40",
        "no\npixel",
    ]
    told = cautions(runs)
    assert any(line.startswith("crack: no pixel in the test images of seed 2;") for line in told) and any(
        "spalling: no pixel in the test images of seed 1, 2;" in line for line in told
    )


@pytest.mark.slow
def test_a_binary_segmentation_has_one_class(create):
    benchmark = create(
        {key: dict(test=0.4, classes=()) for key in [("mobilenet", 1), ("mobilenet", 2), ("swin", 1), ("swin", 2)]}
    )
    assert benchmark.per_class()["crack"].tolist() == pytest.approx([0.4, 0.4])


# What is refused or told


def test_runs_of_the_same_seed_on_other_data_are_refused(create):
    scores = scores_of(mobilenet=(0.5, 0.5), swin=(0.5, 0.5))
    scores["mobilenet", 2]["fingerprint"] = scores["swin", 2]["fingerprint"] = "another split"
    benchmark = create(scores)
    assert len(benchmark.runs()) == 4
    write_run(RunFolder(benchmark.folder / "03-encoder=swin-seed=2"), fingerprint="third")
    with pytest.raises(
        CrackSegError, match="data: found other data in 03-encoder=swin-seed=2 .*than in 01-encoder=mobilenet-seed=2"
    ) as caught:
        benchmark.finish()
    assert "\n" not in str(caught.value) and not (benchmark.folder / "benchmark.csv").exists()


def test_a_busy_machine_is_told(create):
    scores = scores_of(mobilenet=(0.5, 0.5), swin=(0.5, 0.5))
    scores["mobilenet", 1]["speeds"], scores["swin", 1]["speeds"] = (1.0, 27.0), (1.0, 20.0)
    told = [line for line in cautions(create(scores).runs()) if "images/s" in line]
    assert len(told) == 1 and told[0].startswith("swin trained at 20 to 31 images/s")


def test_test_epochs_and_unequal_beginnings_are_told(create):
    scores = scores_of(mobilenet=(0.5, 0.5), swin=(0.5, 0.5))
    scores["swin", 1] |= dict(test_epoch=True, weights="timm/swin")
    told = "\n".join(cautions(create(scores).runs()))
    assert (
        "02-encoder=swin-seed=1: a test of one epoch" in told
        and "Unequal beginnings: mobilenet, swin began from scratch" in told
    )
    assert "the last epoch is the best" not in told


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(encoders=("mobilenet", "swim")), "did you mean 'swin'?"),
        (dict(seeds=(1, 1)), "seed: found 1 twice"),
        (dict(settings="seed=3"), "seed: found in the grid"),
        (dict(settings="image_size=64"), "image_size: found it in settings and as a parameter"),
        (dict(settings="recipe=quickstart"), "recipe: found it in settings"),
        (dict(settings="lr=fast"), "lr"),
        (dict(rounds=0), "rounds: found 0"),
        (dict(jobs="cluster=slrm"), "did you mean 'slurm'?"),
        (dict(encoders=()), "encoder: found no value"),
    ],
    ids=str,
)
def test_a_mistake_costs_one_line_and_no_run(create, tmp_path, settings, words):
    with pytest.raises(CrackSegError) as caught:
        create(**settings)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# How sure


def pair(one, other):
    runs = pd.DataFrame(
        [
            dict(encoder=name, seed=seed, state="done", test_iou=score)
            for name, scores in (("a", one), ("b", other))
            for seed, score in enumerate(scores)
        ]
    )
    return compare_pairs(runs, ["a", "b"]).iloc[0]


def test_a_difference_counts_by_the_paired_t_test():
    found = pair((0.50, 0.54, 0.52), (0.44, 0.47, 0.455))
    reference = stats.ttest_rel((0.50, 0.54, 0.52), (0.44, 0.47, 0.455))
    assert (found["difference"], found["p"]) == (pytest.approx(0.065), pytest.approx(reference.pvalue))
    assert (found["result"], found["rule"]) == ("better", "paired t-test over seeds, Holm's correction")
    assert pair((0.44, 0.47, 0.455), (0.50, 0.54, 0.52))["result"] == "worse"
    assert pair((0.50, 0.54, 0.52), (0.49, 0.56, 0.48))["result"] == "can't tell"
    assert (pair((0.5, 0.6, 0.7), (0.4, 0.5, 0.8))["ahead"], pair((0.5, 0.5), (0.5, 0.5))["ahead"]) == (2, 0)


def test_only_seeds_of_both_encoders_are_compared():
    found = pair((0.5, 0.6, 0.99), (0.4, 0.5))
    assert found["seeds"] == 2 and found["difference"] == pytest.approx(0.1)


def test_two_seeds_are_weaker_than_three():
    needed = [
        float(strength_of(pd.DataFrame({"seeds": [seeds] * 3})).split("from ")[1].split()[0]) for seeds in (2, 3, 4, 10)
    ]
    assert needed == sorted(needed, reverse=True) and needed[0] > 20 and needed[3] < 1


# Pictures


@pytest.mark.few(1)
@pytest.mark.parametrize("count, crowd", [(4, 0), (8, 0), (8, 0.9)])
def test_no_name_covers_another(count, crowd):
    rng, names = (
        np.random.default_rng(count),
        ("mobilenet", "convnext", "swin", "coatnet", "segformer", "maxvit", "resnet34", "mobilenet_v3")[:count],
    )
    for _ in range(5):
        scores, families = 0.5 + 0.1 * (1 - crowd) * rng.random((count, 3)), list(FAMILY_COLOURS)
        table = pd.DataFrame(
            {
                "test_iou": scores.mean(1),
                "gflops": 1 + 5 * (1 - crowd) * rng.random(count),
                "family": [families[place % len(families)] for place in range(count)],
            },
            index=names,
        )
        runs = pd.DataFrame(
            [dict(encoder=name, state="done", test_iou=score) for name, row in zip(names, scores) for score in row]
        )
        axis = show_accuracy(table, runs).axes[0]
        texts = [text for text in axis.texts if text.get_text()]
        boxes, frame = [text.get_window_extent() for text in texts], axis.get_window_extent()
        assert {text.get_text() for text in texts} == set(names)
        assert not any(box.count_overlaps(boxes[:place]) for place, box in enumerate(boxes))
        assert all(
            frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in boxes
        )


# Files and the notebook


def test_the_files_say_what_the_tables_say(create):
    benchmark = create(scores_of(mobilenet=(0.4, 0.5), swin=(0.6, 0.65)))
    benchmark.finish()
    written = {
        name: pd.read_csv(benchmark.folder / f"{name}.csv")
        for name in ("benchmark", "runs", "differences", "inference")
    }
    assert written["benchmark"]["encoder"].tolist() == ["swin", "mobilenet"] and written["benchmark"][
        "iou_crack"
    ].tolist() == pytest.approx([0.625, 0.45])
    assert written["benchmark"]["train_images_per_second"].tolist() == [31, 31] and (
        written["benchmark"][["gflops", "images_per_second_1", "images_per_second_8"]] > 0
    ).all(axis=None)
    assert written["runs"]["run"].tolist() == list(benchmark.sweep.runs)
    [verdict] = written["differences"]["verdict"]
    assert verdict.startswith("can't tell swin from mobilenet: difference +0.1750") and verdict.endswith("2 seeds).")
    assert set(written["inference"].groupby(["encoder", "batch"])["images"].sum()) == {8}  # equal work in the one round
    remarks = benchmark.remarks()
    for part in (
        "Ranked by the mean IoU on the validation images",
        "fingerprint one, 7 test images",
        "Some processor, 2 threads, torch 2.14",
        "f" * 12 + ", modified",
        "images: 32 pixels",
    ):
        assert part in remarks, part


def test_the_sweep_is_found_again(create):
    assert create(name="twice").sweep.runs == create(name="twice").sweep.runs
    with pytest.raises(CrackSegError, match="with another grid .other seed"):
        create(name="twice", seeds=(1, 2, 3))


def test_the_parameters_cell_says_what_the_settings_are():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    source = "".join(next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))["source"])
    given = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(source).body}
    assert list(given) == list(vars(EncoderBenchmarkConfig()))
    differing = {
        name
        for name, value in vars(notebook_settings(EncoderBenchmarkConfig, given)).items()
        if value != getattr(EncoderBenchmarkConfig(), name)
    }
    assert differing == {"name", "image_size", "epochs", "batch_size"}  # a small budget


@pytest.mark.slow
def test_the_notebook_trains_compares_and_reuses(tmp_path):
    given = dict(
        name="tiny",
        outputs="made",
        encoders="mobilenet,resnet34",
        seeds="1",
        image_size=32,
        epochs=1,
        batch_size=4,
        rounds=1,
        jobs="cpus=1",
        settings="synthetic_images=12 device=cpu amp=off",
    )
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(NOTEBOOK),
        "result.ipynb",
        "-k",
        "python3",
        "--no-progress-bar",
        *words,
    ]
    for attempt in range(2):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"tiny: {0 if attempt else 2} of 2 runs submitted" in (tmp_path / "result.ipynb").read_text()
    folder = tmp_path / "made" / "tiny"
    table, runs = pd.read_csv(folder / "benchmark.csv"), pd.read_csv(folder / "runs.csv")
    assert set(runs["state"]) == {"done"} and set(table["rank"]) == {1, 2} and runs["data_fingerprint"].nunique() == 1
    assert (
        table.set_index("encoder")["parameters"].to_dict() == runs.set_index("encoder")["parameters"].to_dict()
    )  # what was measured is what was trained
    assert {"iou_background", "iou_crack"} < set(table)
    assert "loading from files" in (tmp_path / "result.ipynb").read_text()
    assert read_fixed(given["settings"])["amp"] == "off" and "from scratch" in set(runs["weights"])
