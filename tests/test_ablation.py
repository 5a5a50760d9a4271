"""The ablation: every arm changes what it says, seeds are paired, and the notebook runs."""

import numpy as np
import pandas as pd
import papermill
import pytest
from messages import one_line

from crackseg_nb.core.files import project_root
from crackseg_nb.runs.config import config_to_dict, configure
from crackseg_nb.studies.ablation import ARMS, BASE, AblationConfig, effects, sweeps_of


def flat(settings, path=""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != BASE])
def test_an_arm_changes_what_it_says_and_nothing_else(arm):
    settings = {name: value for name, value in ARMS[arm].items()}
    base, other = (
        dict(flat(config_to_dict(configure(recipe="swinv2_hybrid_360", **given)))) for given in ({}, settings)
    )
    changed = {name.rsplit(".", 1)[-1] for name in {*base, *other} if base.get(name) != other.get(name)}
    assert changed == set(settings)


def made_up(differences, seeds=(1, 2, 3)):
    rows = [{"arm": BASE, "seed": seed, "test_iou": 0.6 + 0.01 * seed} for seed in seeds]
    rows += [
        {"arm": "no-cbam", "seed": seed, "test_iou": 0.6 + 0.01 * seed + difference}
        for seed, difference in zip(seeds, differences)
    ]
    return pd.DataFrame(rows).assign(
        state="done", val_iou=0.5, test_f1=0.5, error="", data_fingerprint=[f"images {row['seed']}" for row in rows]
    )


def test_seeds_are_paired_whatever_their_order():
    results = made_up([-0.03, -0.02, -0.025])
    found, shuffled = (
        effects(results),
        effects(results.sample(frac=1, random_state=1).sort_values("arm", kind="stable")),
    )
    assert found.loc["no-cbam", "difference"] == pytest.approx(-0.025) and found.loc["no-cbam", "result"] == "worse"
    assert shuffled.loc["no-cbam", ["difference", "low", "high"]].tolist() == pytest.approx(
        found.loc["no-cbam", ["difference", "low", "high"]].tolist()
    )
    assert effects(made_up([0.03, -0.02, 0.001])).loc["no-cbam", "result"] == "can't tell"


def test_a_seed_without_its_base_takes_no_part():
    results = made_up([-0.03, -0.02, -0.025])
    results.loc[(results["arm"] == BASE) & (results["seed"] == 2), "state"] = "failed"
    found = effects(results).loc["no-cbam"]
    assert found["seeds"] == 2 and found["difference"] == pytest.approx(np.mean([-0.03, -0.025]))


def test_arms_are_not_overruled_by_what_is_fixed(tmp_path):
    one_line(
        lambda: sweeps_of(AblationConfig(("no-aspp",), (1,), "aspp=true", outputs=str(tmp_path))),
        "found aspp, which the arm no-aspp changes",
    )
    assert not (tmp_path / "ablation").exists()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    parameters = dict(
        arms="no-cbam",
        seeds="1",
        fixed="synthetic_images=12 image_size=32 epochs=1 batch_size=4 device=cpu amp=off",
        outputs=str(tmp_path),
        name="small",
    )
    papermill.execute_notebook(
        project_root() / "nbs" / "ablate_hybrid.ipynb",
        tmp_path / "out.ipynb",
        kernel_name="python3",
        progress_bar=False,
        parameters=parameters,
    )
    assert pd.read_csv(tmp_path / "small" / "runs.csv")["state"].tolist() == ["done", "done"]
    [verdict] = pd.read_csv(tmp_path / "small" / "effects.csv")["verdict"]
    assert verdict.endswith("but one seed says nothing of the scatter.")


def test_an_arms_mean_is_over_the_seeds_of_the_base():
    rows = [("base", 1, "done", 0.5), ("base", 2, "done", 0.6), ("base", 3, "failed", np.nan)]
    rows += [("no cbam", seed, "done", score) for seed, score in ((1, 0.4), (2, 0.5), (3, 0.9))]
    table = pd.DataFrame(rows, columns=["arm", "seed", "state", "test_iou"]).assign(
        fingerprint="a", data_fingerprint="a"
    )
    assert effects(table).loc["no cbam", "test_iou"] == pytest.approx(0.45)
