"""Studies that open a finished run on data of today: images that it learned, or that are others now, are refused."""

import shutil

import pytest

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import run
from crackseg_nb.runs.trained_model import open_model
from crackseg_nb.runs.verify import verify
from crackseg_nb.studies.across_data import DataSet, score_across
from crackseg_nb.studies.scales import ScalesConfig, count_scales
from crackseg_nb.synthetic.cracks import write_synthetic

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(model="unet", encoder="test_resnet", pretrained="false", image_size=32, batch_size=2, epochs=1)
SMALL |= dict(device="cpu", amp="off", data="folder")


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("data") / "walls", 12, (48, 48), seed=3)


@pytest.fixture(scope="module")
def plain(walls, tmp_path_factory):
    "A run whose validation images are shown in two sizes."
    outputs = tmp_path_factory.mktemp("my runs")
    return run(configure(**SMALL, data_dir=str(walls), outputs=str(outputs), run_name="plain", val_scales="1,2"))


def count(done, **settings):
    outputs = str(done.folder.path.parent)
    return count_scales(
        open_model(done.folder.path), ScalesConfig(done.folder.run_id, "1", outputs=outputs, **settings)
    )


def test_a_photo_is_one_image_in_however_many_sizes_it_is_shown(plain):
    results = read_yaml(plain.folder / "final_results.yaml")
    assert results["val"]["num_images"] == results["protocol"]["split"]["val"] == 2
    verified = verify(plain.folder.path)
    assert verified.code == 0, str(verified)


def test_scales_are_not_chosen_by_images_that_were_learned(walls, tmp_path):
    done = run(configure(**SMALL, data_dir=str(walls), outputs=str(tmp_path), run_name="all", train_set="trainval"))
    with pytest.raises(CrackSegError, match="^run: found all, expected a run on cracks alone with validation images"):
        count(done)


def test_scales_are_not_chosen_by_images_that_are_others_now(plain, walls, tmp_path):
    "A photo less, and the split would be another: images that were learned would choose."
    assert [*count(plain).values()][0].compute()["num_images"] == 2
    fewer = shutil.copytree(walls, tmp_path / "walls")
    name = sorted(path.name for path in (fewer / "images").iterdir())[0]
    for part in ("images", "masks"):
        (fewer / part / name).unlink()
    with pytest.raises(CrackSegError, match="^data: found images or masks that differ from those of plain"):
        count(plain, data_dir=str(fewer))


def test_a_data_set_of_one_photo_is_refused_before_anything_is_scored(plain, tmp_path):
    one = DataSet("one", "folder", str(write_synthetic(tmp_path / "photo", 1, (48, 48), seed=8)))
    with pytest.raises(CrackSegError, match="^sets: found one photo alone in one, expected two or more"):
        score_across([str(plain.folder.path)], [one], str(tmp_path))
