"""The lightweight DeepLab: parameters, sizes, recipes; validation images; training that begins with earlier weights."""

import pickle
import shutil

import pandas as pd
import pytest
import timm
import torch
from committed import committed
from safetensors.torch import save_file

from crackseg_nb.core.checks import CrackSegError, Stopped
from crackseg_nb.core.files import project_root, read_yaml
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.models.registry import count_parameters, create_model
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import Experiment, prepare, run
from crackseg_nb.runs.recipes import RECIPES
from crackseg_nb.synthetic.cracks import SyntheticConfig, write_synthetic

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = {"deeplab_original": 6_831_509, "deeplab_optimized": 2_516_853}
SMALL = dict(
    recipe="deeplab_test",
    pretrained="false",
    synthetic_images=24,
    image_size=32,
    epochs=2,
    batch_size=4,
    device="cpu",
    amp="off",
    lr=1e-3,
    fit="crop",
    eval_fit="native",
    checkpoint_every=1,
)


@pytest.mark.parametrize("name", FORMS)
def test_parameters_are_those_of_the_guide(name):
    with torch.device("meta"):
        counts = count_parameters(create_model(name, num_classes=21, pretrained="false"))
    assert counts["total"] == counts["trainable"] == FORMS[name]
    assert counts["encoder"] == 927_008
    assert sum(value for part, value in counts.items() if part not in ("total", "trainable")) == FORMS[name]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("stride", (16, 32))
def test_any_size_trains_and_predicts(name, stride):
    torch.manual_seed(0)
    model = create_model(
        name,
        num_classes=3,
        image_size=64,
        pretrained="false",
        output_stride=stride,
        aspp_channels=16,
        aspp_rates=(1, 3),
    )
    for height, width in ((32, 32), (33, 47), (225, 100)):
        logits = model.train()(
            torch.randn(1, 3, height, width)
        )  # a single image too: its pooled features are one value per channel
        assert logits.shape == (1, 3, height, width)
    logits.square().mean().backward()
    assert not [key for key, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 3, 96, 544)).shape == (2, 3, 96, 544)


def test_the_skips_are_read():
    torch.manual_seed(0)
    model = create_model("deeplab_optimized", image_size=64, pretrained="false").eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole = model(image)
        for part in (model.mid_skip, model.low_skip, model.aspp):
            hook = part.register_forward_hook(lambda _, __, output: output.zero_())
            assert not torch.allclose(model(image), whole)
            hook.remove()


def test_weights_of_timm_serve_at_both_strides(tmp_path):
    network = timm.create_model("mobilenetv3_small_100")
    save_file(network.state_dict(), tmp_path / "mobile.safetensors")
    for stride in (16, 32):
        model = create_model(
            "deeplab_optimized", image_size=64, pretrained=str(tmp_path / "mobile.safetensors"), output_stride=stride
        )
        assert torch.equal(model.encoder.body.conv_stem.weight, network.conv_stem.weight)
        assert torch.equal(model.encoder.state_dict()["body.blocks.5.0.conv.weight"], network.blocks[5][0].conv.weight)


PUBLISHED = {  # of the guide: its four strategies, then its four recipes of training
    "deeplab_test": dict(
        epochs=50, loss="focal", augmentation="mirror", train_set="train", lr=1e-4, image_size=512, batch_size=8
    ),
    "deeplab_enhanced": dict(epochs=100, loss="focal", augmentation="enhanced", train_set="train", lr=1e-4),
    "deeplab_maximum": dict(
        epochs=150,
        loss="focal_dice",
        augmentation="enhanced",
        train_set="trainval",
        lr=1e-4,
        weight_decay=1e-4,
        batch_size=8,
    ),
    "deeplab_finetune": dict(epochs=100, loss="focal", augmentation="enhanced", train_set="trainval", lr=5e-5),
    "deeplab_quick": dict(epochs=30, batch_size=8, image_size=384, loss="focal"),
    "deeplab_efficient": dict(epochs=80, batch_size=8, loss="focal", augmentation="enhanced"),
    "deeplab_budget": dict(
        epochs=100, batch_size=4, image_size=384, loss="focal", augmentation="enhanced", num_workers=2
    ),
    "deeplab_original": dict(model="deeplab_original", epochs=50, train_set="train", loss="ce"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_hold_what_was_published(name):
    settings = RECIPES[name].settings
    assert {key: settings[key] for key in PUBLISHED[name]} == PUBLISHED[name]
    if not RECIPES[name].needs:
        assert configure(recipe=name).model == settings["model"]


def test_a_recipe_says_what_it_needs():
    with pytest.raises(CrackSegError, match="fine_tune: found none, expected it with recipe deeplab_finetune"):
        configure(recipe="deeplab_finetune")


@pytest.fixture(scope="module")
def first(folder):
    return run(configure(**SMALL, outputs=str(folder), run_name="first"))


def test_validation_images_are_learned_and_choose_nothing(folder, first):
    whole = run(
        configure(
            **{**SMALL, "loss": "focal", "class_weights": "inverse"},
            train_set="trainval",
            outputs=str(folder),
            run_name="whole",
        )
    )
    own, other = whole.prepared.splits, first.prepared.splits
    assert len(own.train) == len(other.train) + len(other.val) and not own.val
    names = {split: {sample.name for sample in samples} for split, samples in first.prepared.splits}
    assert {sample.name for sample in whole.prepared.splits.train} == names["train"] | names["val"]
    assert {sample.name for sample in whole.prepared.splits.test} == names["test"]
    results = read_yaml(whole.folder / "final_results.yaml")
    assert "val" not in results and "val" in first.results
    assert results["protocol"]["epoch"] == 2 and "were learned too" in results["protocol"]["epoch_rule"]
    assert not [name for name in pd.read_csv(whole.folder / "history.csv") if name.startswith("val")]
    assert "cannot be seen" in (whole.folder / "analysis_report.txt").read_text()
    counted = whole.prepared.class_weights.pixels
    assert list(counted) == (whole.prepared.audit.pixels["train"] + whole.prepared.audit.pixels["val"]).tolist()


def test_without_validation_the_threshold_is_a_half(folder):
    settings = dict(
        recipe="deeplab_test",
        model="deeplab_optimized",
        data="synthetic",
        synthetic_images=12,
        synthetic_width=(3, 6),
        image_size=32,
        epochs=1,
        batch_size=4,
    )
    done = run(
        configure(
            **settings,
            pretrained="false",
            train_set="trainval",
            device="cpu",
            amp="off",
            outputs=str(folder),
            run_name="cracks",
        )
    )
    assert done.tested.threshold == 0.5 and done.results["protocol"]["threshold_rule"] == "0.5, not chosen"
    assert "test_at_0.5" not in done.results


@pytest.mark.slow
def test_a_run_without_validation_resumes_to_the_same(folder):
    settings = dict(SMALL, train_set="trainval", outputs=str(folder))
    through, stopped = (
        run(configure(**settings, run_name="through")),
        Experiment(configure(**settings, run_name="stopped")),
    )
    stopped.load_data(), stopped.build_model()
    steps = iter(range(100))
    type(stopped.stop).reason, kept = (
        property(lambda self: "SIGTERM" if next(steps) > 8 else None),
        type(stopped.stop).reason,
    )
    try:
        with pytest.raises(Stopped):
            stopped.train()
    finally:
        type(stopped.stop).reason = kept
    resumed = run(configure(resume=str(stopped.folder.path)))
    assert (resumed.folder / "history.csv").read_bytes() == (through.folder / "history.csv").read_bytes()
    for name, value in through.trained.model.state_dict().items():
        assert torch.equal(value, resumed.trained.model.state_dict()[name]), name


def test_fine_tuning_begins_with_the_weights_of_the_run(folder, first):
    tuned = run(
        configure(
            **{**SMALL, "recipe": "deeplab_finetune", "epochs": 0},
            fine_tune="first",
            train_set="train",
            outputs=str(folder),
            run_name="tuned",
        )
    )
    assert tuned.results["test"] == first.results["test"]
    weights = read_yaml(tuned.folder / "environment.yaml")["weights"]
    assert weights["requested"] == "fine_tune" and "first" in weights["loaded"] and len(weights["sha256"]) == 64
    again = configure(config=str(tuned.folder / "config.yaml"), run_name="again")
    assert again.fine_tune == "first" and run(again).results["test"] == first.results["test"]


def hostile(path):
    class Code:
        def __reduce__(self):
            return eval, ("1/0",)

    torch.save({"model": Code()}, path)


def truncated(path):
    path.with_suffix(".safetensors").write_bytes(b"\x10" * 40)


@pytest.mark.few(3)
@pytest.mark.parametrize("parameter", ("fine_tune", "encoder_weights"))
@pytest.mark.parametrize(
    "make",
    (hostile, truncated, lambda path: path.write_bytes(pickle.dumps({"weight": 1}))),
    ids=("code", "truncated", "pickle"),
)
def test_files_that_cannot_be_trusted_stop_a_run_in_one_line(tmp_path, parameter, make):
    make(tmp_path / "weights.pt")
    path = next(tmp_path.iterdir())
    with pytest.raises(CrackSegError) as caught:
        prepare(configure(**SMALL, outputs=str(tmp_path / "outputs"), run_name="no", **{parameter: str(path)}))
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert RunFolder(tmp_path / "outputs" / "no").state == "failed"


def test_weights_of_another_model_or_class_count_are_refused(folder, first):
    binary = dict(SMALL, data="synthetic", fine_tune="first", outputs=str(folder))
    with pytest.raises(CrackSegError, match="num_classes=5, expected num_classes=1"):
        prepare(configure(**binary, run_name="binary"))
    with pytest.raises(
        CrackSegError, match="first is a run of deeplab_optimized, expected one of deeplab_original"
    ) as caught:
        prepare(configure(**SMALL, model="deeplab_original", fine_tune="first", outputs=str(folder), run_name="other"))
    assert "\n" not in str(caught.value)
    with pytest.raises(CrackSegError, match="weights of another network"):
        prepare(
            configure(
                **{**SMALL, "model": "unet", "encoder": "resnet34"},
                encoder_weights="first",
                outputs=str(folder),
                run_name="third",
            )
        )
    with pytest.raises(CrackSegError, match="encoder_weights: found no run 'frist' .did you mean 'first'"):
        configure(**SMALL, encoder_weights="frist", outputs=str(folder))
    with pytest.raises(CrackSegError, match="expected one of the two"):
        configure(**SMALL, encoder_weights="first", fine_tune="first", outputs=str(folder))


def test_weights_of_a_run_that_learned_test_images_are_refused(tmp_path):
    write_synthetic(tmp_path / "mini", 20, (32, 32), 1, SyntheticConfig(crack_width=(3, 6)))
    settings = dict(SMALL, data="folder", data_dir=str(tmp_path / "mini"), epochs=1, outputs=str(tmp_path))
    before = run(configure(**settings, seed=42, run_name="before"))
    same = prepare(configure(**settings, seed=42, fine_tune="before", run_name="same"))
    same.folder.mark("stopped")
    other = Experiment(configure(**settings, seed=7, fine_tune="before", run_name="other"))
    other.load_data()
    with pytest.raises(CrackSegError) as caught:
        other.build_model()
    assert not (other.folder / "splits.yaml").exists()  # nothing was settled
    learned = {sample.name for sample in before.prepared.splits.train + before.prepared.splits.val}
    test = [sample.name for sample in other.prepared.splits.test]
    assert str(caught.value).startswith(
        f"fine_tune: found {len(learned & set(test))} of {len(test)} test images among those that before learned"
    )
    assert "\n" not in str(caught.value)
    # A file of that run is no way around it; of a file from elsewhere nothing is known, and the report says so.
    [file] = (before.folder / "checkpoints").glob("best-*.safetensors")
    with pytest.raises(CrackSegError, match="test images among those that before learned"):
        prepare(configure(**settings, seed=7, fine_tune=str(file), run_name="file"))
    shutil.copy(file, tmp_path / "foreign.safetensors")
    foreign = prepare(
        configure(**settings, seed=7, fine_tune=str(tmp_path / "foreign.safetensors"), run_name="foreign")
    )
    foreign.folder.mark("stopped")
    assert (
        "foreign.safetensors lies in no run: whether it learned test images cannot be told"
        in foreign.prepared.audit.warnings[-1]
    )


@pytest.mark.slow
def test_weights_of_a_run_that_learned_validation_images_are_told(tmp_path):
    write_synthetic(tmp_path / "mini", 20, (32, 32), 1, SyntheticConfig(crack_width=(3, 6)))
    settings = dict(SMALL, data="folder", data_dir=str(tmp_path / "mini"), epochs=1, outputs=str(tmp_path))
    before = run(configure(**settings, train_set="trainval", run_name="before"))
    after = run(configure(**settings, fine_tune="before", run_name="after"))
    val = len(after.prepared.splits.val)
    told = (
        f"fine_tune: before learned {val} of {val} validation images, by which this run chooses its epoch and threshold"
    )
    assert val and told in after.prepared.audit.warnings
    assert told in (after.folder / "analysis_report.txt").read_text("utf-8")
    assert not [warning for warning in before.prepared.audit.warnings if "learned" in warning]


def test_a_mobile_encoder_moves_between_models(folder, first, begin):
    unet = begin(
        configure(
            **{**SMALL, "model": "unet", "encoder": "mobilenet_v3_small"},
            encoder_weights="first",
            outputs=str(folder),
            run_name="moved",
        )
    )
    source = first.trained.model.state_dict()
    for name, value in unet.built.model.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(value, source[name]), name
    assert " 0 tensors left" in read_yaml(unet.folder / "environment.yaml")["weights"]["report"]


@pytest.mark.parametrize("path", committed("outputs/**/config.yaml"), ids=str)
def test_the_configurations_of_committed_runs_can_be_read(path):
    settings = read_yaml(project_root() / path)
    labelled = settings["data"]["data"] in ("ImageFolder", "TinyImageNet")  # their folder tells the classes
    if labelled:
        pytest.skip("needs files that are not committed")
    config = configure(config=str(project_root() / path))
    assert config.model == settings["model"]["model"] and config.run.seed == settings["run"]["seed"]
