"""Each file is opened once to be inspected, and at most once more before the first step of training."""

import pytest
from opens import counted_opens

from crackseg_nb.data.audit import audit, fingerprint
from crackseg_nb.data.splits import make_splits
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import Experiment
from crackseg_nb.sources.registry import read_source
from crackseg_nb.synthetic.cracks import write_synthetic
from crackseg_nb.synthetic.textures import write_textures

TINY = dict(image_size=64, batch_size=2, epochs=1, device="cpu", amp="off", num_workers=0, run_name="counted")
UNET = dict(encoder="test_resnet", pretrained="false", model="unet", **TINY)


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("data") / "walls", 9, (64, 64), seed=1)


def files_of(samples):
    return {str(file) for sample in samples for file in (sample.image, sample.mask) if file}


@pytest.mark.few(1)
@pytest.mark.parametrize("preload", ["auto", "disk", "false"])
def test_a_run_opens_each_file_twice_before_its_first_step(walls, tmp_path, monkeypatch, one_thread, preload):
    with counted_opens(walls, tmp_path / "opens", monkeypatch) as opened:
        settings = dict(data="folder", data_dir=str(walls), outputs=str(tmp_path), preload=preload, **UNET)
        experiment = Experiment(configure(**settings))
        experiment.load_data()
        experiment.build_model()
        experiment.train()
    # Nobody has asked for a test yet: its images are read when it comes, once, so they are never held in memory.
    splits = experiment.prepared.splits
    learned = files_of(splits.train + splits.val)
    assert opened == dict.fromkeys(files_of(splits.test), 1) | dict.fromkeys(learned, 2)


@pytest.mark.parametrize("name", ["unified360", "folder", "ImageFolder"])
def test_reading_splitting_and_auditing_open_each_file_once(walls, tmp_path, monkeypatch, name):
    root = write_textures(tmp_path / "textures", 3, (64, 64)) if name == "ImageFolder" else walls
    if name == "unified360":
        root = tmp_path / "tiles"
        for kind in ("images", "masks"):
            (root / kind).mkdir(parents=True)
            for index, file in enumerate(sorted((walls / kind).iterdir())):
                (root / kind / f"{index}{file.suffix}").write_bytes(file.read_bytes())
    with counted_opens(root, tmp_path / "opens", monkeypatch) as opened:
        source = read_source(name, root)
        splits = make_splits(source)
        assert audit(splits).fingerprint == fingerprint(splits)
    assert opened == dict.fromkeys(files_of(source.samples), 1)
