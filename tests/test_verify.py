"""Runs verified from their folders: each change is named, each repetition equal, and nothing is written."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import manifest_sum, read_yaml, sha256_file, write_table, write_yaml
from crackseg_nb.core.machine import describe_environment
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.runs import verify as module
from crackseg_nb.runs.commands import verify_main
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import run
from crackseg_nb.runs.results import image_table
from crackseg_nb.runs.verify import TOLERANCE, KeptRun, verify
from crackseg_nb.synthetic.cracks import write_synthetic

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(
    image_size=32,
    fit="crop",
    batch_size=4,
    lr=2e-3,
    pretrained="false",
    amp="off",
    device="cpu",
    checkpoint_every=0,
)
TINY = dict(SMALL, recipe="deeplab_test", epochs=2, aspp_channels=8, aspp_rates=(1, 3), prior=0.05)


@pytest.fixture(scope="module")
def photos(folder):
    return write_synthetic(folder / "photos", 12, (32, 32), seed=3)


@pytest.fixture(scope="module")
def done(folder, photos):
    return run(configure(**TINY, data="folder", data_dir=str(photos), outputs=str(folder), run_name="done"))


@pytest.fixture
def copy(done, tmp_path):
    "A copy of the run, to be changed."
    return shutil.copytree(done.folder.path, tmp_path / "copy")


@pytest.fixture
def moved(photos, tmp_path):
    "A copy of the images and masks, to be changed."
    return shutil.copytree(photos, tmp_path / "moved")


def outcomes(found):
    return {check.name: check.outcome for check in found.checks}


def lines(found, name):
    return next(check.lines for check in found.checks if check.name == name)


def flip(path, position=-1):
    "Change one byte of a file."
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def replace_text(path, pattern, new):
    text, count = re.subn(pattern, new, path.read_text(), count=1, flags=re.M)
    assert count == 1
    path.write_text(text)


def without_manifest(copy):
    for name in ("manifest.yaml", "images.csv"):
        (copy / name).unlink()
    return copy


def same_world(monkeypatch, copy, **changes):
    "Let the run in `copy` have been made by a commit, here, and `changes` be what differs now."
    world = {**describe_environment(), "git": {"commit": "a" * 40, "modified": False}}
    write_yaml(copy / "environment.yaml", {**read_yaml(copy / "environment.yaml"), **world})
    monkeypatch.setattr(module, "describe_environment", lambda: {**world, **changes})


# Equal


def test_a_run_is_equal_and_nothing_is_written(done):
    before = {
        path: (path.stat().st_mtime_ns, sha256_file(path)) for path in done.folder.path.rglob("*") if path.is_file()
    }
    found = verify("done", outputs=str(done.folder.path.parent))
    assert (found.outcome, found.code) == ("equal", 0)
    assert {name for name, outcome in outcomes(found).items() if outcome != "equal"} <= {"code"}
    assert {"files", "configuration", "results", "images", "evaluated scores", "evaluated images"} <= {*outcomes(found)}
    assert {
        path: (path.stat().st_mtime_ns, sha256_file(path)) for path in done.folder.path.rglob("*") if path.is_file()
    } == before


def test_moved_images_and_a_moved_run_are_equal(copy, moved, done):
    replace_text(copy / "status.yaml", "^host: .*", "host: elsewhere")
    assert verify(copy, data_dir=str(moved)).code == 0


def test_the_manifest_names_every_result(done):
    manifest = read_yaml(done.folder / "manifest.yaml")
    files = {path.relative_to(done.folder.path).as_posix() for path in done.folder.path.rglob("*") if path.is_file()}
    rest = {name for name in files - {*manifest["files"]} if not name.startswith(("tensorboard/", "visualizations/"))}
    assert rest == {"manifest.yaml", "final_results.yaml", "status.yaml", "training.log"}
    assert manifest["results"] == read_yaml(done.folder / "final_results.yaml") and manifest["config"] == read_yaml(
        done.folder / "config.yaml"
    )


def test_images_whose_names_say_nothing_to_pandas_are_equal(tmp_path):
    table = image_table({"test": {name: ("a" * 64, "b" * 64) for name in ("NA", "null", "1")}})
    write_table(tmp_path / "images.csv", table)
    check = KeptRun(RunFolder(tmp_path)).compare_table("images", "images.csv", "name", table)
    assert check.outcome == "equal", check.lines


# Different

CHANGES = {
    "history.csv": (r"^(1,0\.)(\d)", lambda match: f"{match[1]}{9 - int(match[2])}"),
    "predictions/per_image.csv": (r"^(0,[^,]*,0\.)(\d)", lambda match: f"{match[1]}{9 - int(match[2])}"),
    "environment.yaml": ("^cores: .*", "cores: 77"),
    "splits.yaml": ("^val:", "vaI:"),
    "performance.csv": (r"^1,", "7,"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_named(copy, name):
    replace_text(copy / name, *CHANGES[name])
    found = verify(copy)
    assert found.code == 1 and len(lines(found, "files")) == 1 and lines(found, "files")[0].startswith(f"{name}: found")


def test_each_changed_setting_is_named_with_both_values(copy):
    replace_text(copy / "config.yaml", "^  lr: .*", "  lr: 0.5")
    replace_text(copy / "config.yaml", "^  aspp_channels: .*", "  aspp_channels: 16")
    found = verify(copy)
    assert found.code == 1 and lines(found, "configuration") == [
        "model.aspp_channels: found 16, kept 8",
        "optim.lr: found 0.5, kept 0.002",
    ]
    assert outcomes(found)["evaluated scores"] == "not checked"


@pytest.mark.parametrize("pattern", ["best-*.safetensors", "best.json"])
def test_one_byte_of_the_checkpoint(copy, pattern):
    [path] = (copy / "checkpoints").glob(pattern)
    flip(path, path.stat().st_size // 2)
    found = verify(copy)
    assert found.code == 1 and lines(found, "files")[0].startswith(f"checkpoints/{path.name}: found")
    assert path.name in lines(found, "evaluated scores")[0]
    without_manifest(copy)
    assert verify(copy).code == 1 and path.name in lines(verify(copy), "evaluated scores")[0]


def test_a_changed_score_is_named(copy, done):
    results = read_yaml(copy / "final_results.yaml")
    results["test"]["pooled"]["iou"] += 0.1
    write_yaml(copy / "final_results.yaml", results)
    found = verify(copy)
    for name in ("results", "evaluated scores"):
        assert lines(found, name)[-1].startswith("test.pooled.iou: found")
    assert outcomes(found)["files"] == "equal" and found.code == 1


def test_a_changed_manifest_is_not_trusted(copy):
    replace_text(copy / "manifest.yaml", "seed: 42", "seed: 43")
    found = verify(copy)
    assert found.code == 1 and lines(found, "manifest") == ["manifest.yaml: changed or damaged (its sum does not fit)"]
    assert "configuration" not in outcomes(found) and outcomes(found)["evaluated scores"] == "equal"


def test_a_manifest_with_a_part_missing_is_not_trusted(copy):
    manifest = read_yaml(copy / "manifest.yaml")
    del manifest["files"]
    write_yaml(copy / "manifest.yaml", manifest | {"sum": manifest_sum(manifest)})
    assert lines(verify(copy), "manifest") == [
        "manifest.yaml: changed or damaged (found no files, expected what a run writes)"
    ]


@pytest.mark.parametrize(
    "scores", [dict(per_image={"iou": "high"}), dict(per_image=[1]), dict(per_image={}, pooled={})]
)
def test_scores_that_are_none_are_different(copy, scores):
    results = read_yaml(without_manifest(copy) / "final_results.yaml")
    results["test"] |= scores
    write_yaml(copy / "final_results.yaml", results)
    found = verify(copy)
    assert found.code == 1 and outcomes(found)["means"] == "different"


def test_unreadable_results_are_different(copy):
    (copy / "final_results.yaml").write_text("test: [")
    found = verify(copy)
    assert found.code == 1 and "final_results.yaml" in lines(found, "results")[0]


def turn_pixel(path):
    with Image.open(path) as picture:
        values = np.asarray(picture).copy()
    values[0, 0] = 255 - values[0, 0]
    Image.fromarray(values).save(path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_changed_mask_is_named(done, copy, moved, split):
    sample = done.prepared.splits[split][1]
    turn_pixel(moved / "masks" / sample.mask.name)
    found = verify(copy, data_dir=str(moved))
    assert (
        found.code == 1
        and len(lines(found, "images")) == 1
        and lines(found, "images")[0].startswith(f"{sample.name} mask: found")
    )
    assert outcomes(found)["evaluated scores"] == (
        "equal" if split == "train" else "within tolerance" if outcomes(found)["code"] == "noted" else "different"
    )


def test_a_damaged_mask_is_named(done, copy, moved):
    path = moved / "masks" / done.prepared.splits.test[0].mask.name
    path.write_bytes(path.read_bytes()[:60])
    found = verify(copy, data_dir=str(moved))
    assert found.code == 1 and path.name in lines(found, "images")[0]


def test_a_missing_image_is_named(done, copy, moved):
    sample = done.prepared.splits.train[0]
    for path in (moved / "images" / sample.image.name, moved / "masks" / sample.mask.name):
        path.unlink()
    assert f"{sample.name} image: found nothing" in " ".join(lines(verify(copy, data_dir=str(moved)), "images"))


# Runs without a manifest


def test_an_earlier_run_is_equal_as_far_as_it_goes(copy):
    found = verify(without_manifest(copy))
    assert (
        found.code == 0 and outcomes(found)["files"] == "not checked" and "no manifest.yaml" in lines(found, "files")[0]
    )


def test_an_earlier_run_names_a_test_mask_and_a_table_row(done, copy, moved, monkeypatch):
    sample = done.prepared.splits.test[1]
    turn_pixel(moved / "masks" / sample.mask.name)
    found = verify(without_manifest(copy), data_dir=str(moved))
    assert (
        found.code == 1
        and lines(found, "images")[0].startswith("fingerprint: found")
        and lines(found, "images")[-1].startswith(f"{sample.name} crack_pixels: found")
    )
    replace_text(copy / "predictions" / "per_image.csv", *CHANGES["predictions/per_image.csv"])
    assert lines(verify(copy), "means")[0].startswith("predictions/per_image.csv, iou: found")
    same_world(monkeypatch, copy)
    found = verify(copy)
    assert found.code == 1 and lines(found, "evaluated images")[0].startswith(f"{done.prepared.splits.test[0].name} ")


# Elsewhere


def test_other_versions_are_noted_and_scores_then_have_a_tolerance(copy, monkeypatch):
    same_world(monkeypatch, without_manifest(copy))
    results = read_yaml(copy / "final_results.yaml")
    results["test"]["pooled"]["iou"] += 0.5 * TOLERANCE["evaluated"]
    write_yaml(copy / "final_results.yaml", results)
    assert verify(copy).outcome == "different"
    packages = {**describe_environment()["packages"], "torch": "0.1"}
    same_world(monkeypatch, copy, packages=packages)
    found = verify(copy)
    assert outcomes(found)["versions"] == "noted" and lines(found, "versions")[0].startswith(
        "packages.torch: found 0.1, kept"
    )
    assert (found.outcome, found.code) == ("within tolerance", 0) and f"{TOLERANCE['evaluated']:g} allowed" in lines(
        found, "evaluated scores"
    )[0]
    results["test"]["pooled"]["iou"] += TOLERANCE["evaluated"]
    write_yaml(copy / "final_results.yaml", results)
    assert verify(copy).outcome == "different"


# Training again


def test_training_again_is_equal_bit_for_bit(copy, done):
    shutil.rmtree(copy / "checkpoints")
    bare = verify(copy)
    assert (bare.outcome, bare.code) == ("not verified", 2) and "--train" in lines(bare, "evaluated scores")[0]
    assert lines(bare, "left out")[0].startswith("2 files")
    found = verify(copy, train=True)
    assert (found.outcome, found.code) == ("equal", 0)
    assert {name: outcome for name, outcome in outcomes(found).items() if name.startswith("trained")} == {
        "trained history": "equal",
        "trained weights": "equal",
        "trained scores": "equal",
        "trained images": "equal",
        "trained folder": "noted",
    }
    again = copy.with_name("copy-again")
    for name in ("history.csv", "predictions/per_image.csv"):
        assert (again / name).read_bytes() == (done.folder / name).read_bytes()
    assert not (copy / "checkpoints").exists()


def test_another_training_is_different(copy, monkeypatch):
    same_world(monkeypatch, without_manifest(copy))
    replace_text(copy / "config.yaml", "^  lr: .*", "  lr: 0.0001")
    found = verify(copy, train=True)
    assert found.code == 1 and {outcomes(found)[name] for name in ("trained history", "trained weights")} == {
        "different"
    }
    assert outcomes(found)["evaluated scores"] == "equal"  # of a setting that only training knows


def test_the_file_of_pretrained_weights_may_be_gone(copy):
    replace_text(without_manifest(copy) / "config.yaml", "^  pretrained: .*", "  pretrained: gone.safetensors")
    found = verify(copy)
    assert outcomes(found)["evaluated scores"] == "equal", lines(found, "evaluated scores")


def test_a_run_that_changed_on_its_way_is_not_trained_again(copy):
    write_yaml(copy / "resumes.yaml", [{"changed": {"lr": 0.001, "num_workers": 2}}, {"changed": {"devices": 2}}])
    found = verify(copy, train=True)
    assert lines(found, "trained scores") == [
        "the run was resumed with lr=0.001, devices=2: config.yaml holds what it ended with"
    ]
    assert found.code == 0 and not copy.with_name("copy-again").exists()


@pytest.mark.slow
def test_the_source_of_first_weights_may_be_gone(done, folder, photos, tmp_path):
    source = shutil.copytree(done.folder.path, tmp_path / "source")
    tuned = run(
        configure(
            **{**TINY, "epochs": 1},
            data="folder",
            data_dir=str(photos),
            outputs=str(folder),
            run_name="tuned",
            fine_tune=str(source),
        )
    )
    again = verify(tuned.folder.path, train=True)
    assert again.code == 0 and outcomes(again)["first weights"] == "equal"
    shutil.rmtree(source)
    found = verify(tuned.folder.path, train=True)
    assert found.code == 0 and outcomes(found)["evaluated scores"] == "equal"
    assert outcomes(found)["trained scores"] == "not checked" and "fine_tune" in lines(found, "trained scores")[0]


# Several classes, and labels


def test_several_classes_are_equal(folder):
    settings = {
        **SMALL,
        "recipe": "damage_quickstart",
        "epochs": 1,
        "synthetic_images": 24,
        "class_weights": "inverse_sqrt",
    }
    several = run(configure(**settings, outputs=str(folder), run_name="several"))
    found = verify(several.folder.path)
    assert found.code == 0 and outcomes(found)["evaluated images"] == "equal"
    assert {"class_weights.json", "confusion_matrix.csv"} <= {*read_yaml(several.folder / "manifest.yaml")["files"]}
    flip(several.folder / "class_weights.json", 5)
    assert lines(verify(several.folder.path), "files")[0].startswith("class_weights.json: found")


def test_a_classifier_is_equal(folder):
    labelled = run(
        configure(
            recipe="swin_classifier",
            encoder="swinv2",
            embed_dim=24,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 3, 4),
            window_size=4,
            synthetic_images=80,
            image_size=32,
            epochs=1,
            batch_size=16,
            device="cpu",
            amp="off",
            lr=1e-3,
            outputs=str(folder),
            run_name="labelled",
        )
    )
    found = verify(labelled.folder.path)
    assert found.code == 0 and {
        outcomes(found)[name] for name in ("images", "evaluated scores", "evaluated images")
    } == {"equal"}
    answers = labelled.folder / "predictions" / "per_image.csv"
    replace_text(answers, r",(\d+),(0|1)\.0$", lambda match: f",{int(match[1]) + 1},{match[2]}.0")
    found = verify(labelled.folder.path)
    assert found.code == 1 and " rank: found" in lines(found, "evaluated images")[0]


# Refusals


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name, pattern, new",
    [
        ("predictions/per_image.csv", "name", "nome"),
        ("predictions/per_image.csv", "^0,", '0,"'),
        ("images.csv", "image", "imbge"),
        ("environment.yaml", "^threads: .*", "threads: 0"),
        ("environment.yaml", "^device: .*", "device: 7"),
        ("final_results.yaml", "precision: .no", "precisiom: no"),
        ("manifest.yaml", "^sum: ", "sum: ["),
        ("splits.yaml", ".*", "["),
    ],
)
def test_damage_is_an_answer_and_no_crash(copy, name, pattern, new):
    replace_text(copy / name, pattern, new)
    found = verify(copy)
    assert found.code == 1 and any(
        name in line for check in found.checks for line in check.lines if check.outcome == "different"
    )
    without_manifest(copy)
    assert verify(copy).code in (0, 1)


def test_an_unfinished_run_is_refused(copy):
    write_yaml(copy / "status.yaml", {**read_yaml(copy / "status.yaml"), "state": "failed"})
    with pytest.raises(CrackSegError, match="copy is failed, expected a run that is done"):
        verify(copy)
    with pytest.raises(CrackSegError, match="found no run 'cpoy' .did you mean 'copy'"):
        verify("cpoy", outputs=str(copy.parent))


def test_missing_images_are_no_difference(copy, photos):
    replace_text(copy / "config.yaml", "^  data_dir: .*", "  data_dir: nowhere")
    found = verify(without_manifest(copy))
    assert found.code == 2 and outcomes(found)["images"] == "not checked" and "nowhere" in lines(found, "images")[0]


def test_nothing_in_a_folder_is_run(copy, tmp_path):
    target = tmp_path / "pwned"
    (copy / "config.yaml").write_text(f'run: !!python/object/apply:os.system ["touch {target}"]')
    found = verify(copy)
    assert (
        found.code == 1
        and "config.yaml: found no readable YAML" in lines(found, "configuration")[0]
        and not target.exists()
    )


def test_the_command_prints_a_table_or_json(copy, capsys):
    assert verify_main([str(copy)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "copy: equal"
    flip(next((copy / "predictions").glob("*.png")))
    assert verify_main([str(copy), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["outcome"], told["code"]) == ("copy", "different", 1)
    assert [check["name"] for check in told["checks"] if check["outcome"] == "different"] == ["files"]
    assert verify_main(["dome", "--outputs", str(copy.parent)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
