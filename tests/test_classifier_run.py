"""The Swin classifier end to end: scores agree with the kept predictions, resuming, and its encoder in the hybrid."""

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crackseg_nb.core.checks import CrackSegError, Stopped
from crackseg_nb.core.files import project_root, read_yaml
from crackseg_nb.inference.models import load_network
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import prepare, run
from crackseg_nb.runs.recipes import RECIPES
from crackseg_nb.training.checkpoint import checkpoint_names

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(
    recipe="swin_classifier",
    encoder="swinv2",
    embed_dim=24,
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 3, 4),
    window_size=4,
    synthetic_images=80,
    image_size=32,
    epochs=2,
    batch_size=16,
    device="cpu",
    amp="off",
    lr=1e-3,
    checkpoint_every=1,
)


@pytest.fixture(scope="module")
def done(folder):
    return run(configure(**SMALL, outputs=str(folder), run_name="textures"))


@pytest.fixture(scope="module")
def lender(folder):
    "A classifier with a whole SwinV2-tiny."
    return run(
        configure(
            **{
                **SMALL,
                "embed_dim": 0,
                "depths": (),
                "num_heads": (),
                "window_size": 0,
                "epochs": 1,
                "synthetic_images": 40,
            },
            outputs=str(folder),
            run_name="tiny",
        )
    )


def test_the_recipe_is_the_guide():
    settings = RECIPES["swin_classifier"].settings
    expected = dict(
        batch_size=64,
        lr=3e-4,
        weight_decay=0.05,
        epochs=100,
        time_limit=24 * 60,
        clip_norm=1.0,
        image_size=224,
        encoder="swin_tiny",
        label_smoothing=0.1,
        drop_path_rate=0.1,
        betas=(0.9, 0.999),
        lr_batch_size=64,
        checkpoint_every=10,
        scheduler="warmup_cosine",
        augmentation="advanced",
    )
    assert {name: settings[name] for name in expected} == expected
    assert settings["warmup_fraction"] * settings["epochs"] == pytest.approx(5)
    assert settings["warmup_start"] * settings["lr"] == pytest.approx(1e-6) and settings["min_lr_fraction"] * settings[
        "lr"
    ] == pytest.approx(1e-5)


def test_scores_equal_the_kept_answers(done):
    table, results = (
        pd.read_csv(done.folder / "predictions" / "per_image.csv"),
        read_yaml(done.folder / "final_results.yaml"),
    )
    names = {sample.name: sample.name.split("/")[0] for sample in done.prepared.splits.test}
    assert table["label"].tolist() == [names[name] for name in table["name"]]
    assert results["test"]["pooled"]["accuracy"] == pytest.approx((table["label"] == table["answer"]).mean())
    assert results["test"]["pooled"]["top5_accuracy"] == pytest.approx((table["rank"] < 5).mean())
    means = (table["label"] == table["answer"]).groupby(table["label"]).mean()
    assert results["test"]["pooled"]["mean_class_accuracy"] == pytest.approx(means.mean())
    matrix = pd.read_csv(done.folder / "confusion_matrix.csv", index_col=0)
    assert (
        matrix.to_numpy().sum() == len(table) and matrix.to_numpy().trace() == (table["label"] == table["answer"]).sum()
    )
    assert results["protocol"]["epoch_rule"] == "highest top-1 accuracy on the validation images"


def test_scalars_have_the_names_of_the_guide(done):
    events = EventAccumulator(str(done.folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/accuracy", "train/learning_rate", "val/loss", "val/accuracy"} <= set(
        events.Tags()["scalars"]
    )
    history = pd.read_csv(done.folder / "history.csv")
    assert [event.value for event in events.Scalars("train/accuracy")] == pytest.approx(
        history["train_accuracy"].tolist()
    )


def test_training_accuracy_counts_each_image_once(done):
    images = len(done.prepared.splits.train)
    counted = pd.read_csv(done.folder / "history.csv")["train_accuracy"] * images
    assert np.allclose(counted, counted.round()) and (counted <= images).all()


@pytest.mark.slow
def test_the_rate_grows_with_the_batch(folder):
    rates = {}
    for accumulation in (1, 2):
        experiment = prepare(
            configure(
                **{**SMALL, "lr_batch_size": 16, "accumulation": accumulation, "epochs": 1},
                outputs=str(folder),
                run_name=f"rate{accumulation}",
            )
        )
        trainers = []
        experiment.train(on_epoch=trainers.append)
        experiment.folder.mark("stopped")
        rates[accumulation] = trainers[0].scheduler.base_lrs[0]
    assert rates[2] == 2 * rates[1] == pytest.approx(2e-3)


@pytest.mark.slow
def test_a_time_limited_classifier_resumes_to_the_same(folder, done):
    limit = done.trained.seconds / 4 / 60
    with pytest.raises(Stopped):
        run(configure(**SMALL, time_limit=limit, outputs=str(folder), run_name="limited"))
    status = read_yaml(folder / "limited" / "status.yaml")
    assert status["state"] == "stopped" and "time limit" in status["reason"]
    states = checkpoint_names(folder / "limited" / "checkpoints")
    assert states and f"epoch_{2:04}" not in states  # it stopped before the end, with a state
    resumed = run(configure(resume="limited", outputs=str(folder), time_limit=0))
    assert (resumed.folder / "history.csv").read_bytes() == (done.folder / "history.csv").read_bytes()
    for name, value in done.trained.model.state_dict().items():
        assert torch.equal(value, resumed.trained.model.state_dict()[name]), name


def test_labels_and_masks_want_their_models():
    with pytest.raises(
        CrackSegError,
        match="found swinv2_hybrid with data synthetic_textures, expected swin_classifier, as of -p recipe",
    ):
        configure(data="synthetic_textures", augmentation="basic")
    with pytest.raises(
        CrackSegError, match="found swin_classifier with data synthetic, expected a model that segments"
    ):
        configure(**{**SMALL, "data": "synthetic", "augmentation": "basic"})
    for data in ("synthetic", "NEU_Seg"):
        with pytest.raises(CrackSegError, match=f"found swin_classifier with data {data}"):
            configure(recipe="swin_classifier", data=data, data_dir="" if data == "synthetic" else "x")
    with pytest.raises(CrackSegError, match="found deeplab_optimized with data ImageFolder"):
        configure(recipe="deeplab_test", data="ImageFolder", data_dir="x")
    with pytest.raises(CrackSegError, match="loss: found 'dice'"):
        configure(**SMALL, loss="dice")


@pytest.mark.real_data
def test_the_published_layout_runs(folder, data_folder, begin):
    settings = dict(SMALL, data="ImageFolder", data_dir=str(data_folder / "cifar10"), epochs=0)
    experiment = begin(configure(**settings, outputs=str(folder), run_name="cifar"))
    assert experiment.prepared.splits.lengths["test"] == 1000 and len(experiment.prepared.splits.classes) == 10
    assert experiment.config.model_config().num_classes == 10


def test_it_is_refused_where_pixels_are_predicted(lender):
    with pytest.raises(CrackSegError, match="model: found tiny, which names whole images"):
        load_network(lender.folder.path, "cpu")


def test_its_encoder_serves_the_hybrid(folder, lender, begin):
    hybrid = dict(synthetic_images=12, image_size=64, epochs=0, device="cpu", amp="off", outputs=str(folder))
    begun = begin(configure(**hybrid, encoder_weights="tiny", run_name="transfer"))
    source, own = lender.trained.model.state_dict(), begun.built.model.state_dict()
    learned = [name for name in own if name.startswith("encoder.") and name in source]
    assert len(learned) > 150
    for name in learned:
        if own[name].shape == source[name].shape and not name.endswith(
            ("relative_coords_table", "relative_position_index", "attn_mask")
        ):
            assert torch.equal(own[name], source[name]), name
    weights = read_yaml(begun.folder / "environment.yaml")["weights"]
    assert weights["requested"] == "encoder_weights" and "tensors loaded" in weights["report"]
    scratch = begin(configure(**hybrid, run_name="scratch"))
    for name, value in scratch.built.model.state_dict().items():  # the rest begins as without the transfer
        if not name.startswith("encoder."):
            assert torch.equal(value, own[name]), name


@pytest.mark.slow
def test_the_notebook_of_pairs_runs(folder, lender, tmp_path):
    papermill.execute_notebook(
        project_root() / "nbs" / "transfer.ipynb",
        tmp_path / "out.ipynb",
        kernel_name="python3",
        progress_bar=False,
        parameters=dict(
            encoder_weights="tiny",
            outputs=str(folder),
            seeds="1",
            fixed="synthetic_images=12 image_size=64 epochs=1 batch_size=4 device=cpu amp=off",
        ),
    )
    runs = pd.read_csv(folder / "transfer" / "runs.csv")
    assert runs["state"].tolist() == ["done", "done"] and runs["test_iou"].notna().all()
