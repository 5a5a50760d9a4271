"""Prediction of photos: a run's own test images, tiles and the whole, memory, damaged files, export, equal bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SEGMENTERS, build
from messages import line_of
from PIL import Image

import crackseg_nb
from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml
from crackseg_nb.inference import prediction
from crackseg_nb.inference.commands import export_main, predict_main
from crackseg_nb.inference.export import export_network
from crackseg_nb.inference.files import BandStore
from crackseg_nb.inference.models import TorchNetwork, alignment_of, receptive_radius
from crackseg_nb.inference.networks import Facts, Network
from crackseg_nb.inference.photos import DecodedPhoto, open_photo
from crackseg_nb.inference.prediction import predict
from crackseg_nb.inference.tiles import BUDGET, needed_bytes, plan_tiles, predict_bands
from crackseg_nb.metrics.counts import BinaryMetrics
from crackseg_nb.models.registry import create_model
from crackseg_nb.models.views import Views
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import run
from crackseg_nb.runs.trained_model import load_model
from crackseg_nb.sources.images import normalize, read_image, read_mask
from crackseg_nb.synthetic.cracks import synthesize

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(folder):
    "A run of one epoch of a small DeepLab."
    settings = dict(model="deeplab_optimized", aspp_channels=16, aspp_rates=(1, 2), pretrained="false", lr=0.01)
    data = dict(data="synthetic", synthetic_images=24, image_size=64, augmentation="none", batch_size=4, epochs=2)
    return run(configure(**settings, **data, amp="off", device="cpu", outputs=str(folder), run_name="bridge"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "A folder with two photos."
    place = tmp_path_factory.mktemp("photos")
    Image.fromarray(synthesize(1, (150, 203))[0]).save(place / "pier.png")
    Image.fromarray(synthesize(2, (97, 131))[0]).save(place / "deck.png")
    return place


def files_of(place):
    return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def viewed(trained, folder):
    "The same model, tested as a mean over flips and two scales, whose threshold is chosen for that mean."
    settings = dict(config=str(trained.folder / "config.yaml"), fine_tune=str(trained.folder.path), epochs=0)
    views = dict(tta="flips", scales="0.5,1", outputs=str(folder), run_name="viewed")
    return run(configure(**settings, **views))


def test_a_test_takes_the_mean_over_views(trained, viewed):
    results = [read_yaml(one.folder / "final_results.yaml") for one in (trained, viewed)]
    assert [found["protocol"]["evaluation"] for found in results] == [
        "native",
        "native, mean over 4 poses at scales 0.5, 1",
    ]
    assert results[0]["test"]["pooled"] != results[1]["test"]["pooled"]
    metrics, model = BinaryMetrics(), viewed.trained.model.eval()
    with torch.inference_mode():
        for index, sample in enumerate(viewed.prepared.splits.test):
            image = normalize(read_image(sample.image))[None]
            small = torch.nn.functional.interpolate(image, scale_factor=0.5, mode="bilinear", antialias=True)
            views = []
            for shown in (small, image):
                for flips in ((), (2,), (3,), (2, 3)):
                    found = model(shown.flip(flips)).sigmoid().flip(flips)
                    views.append(torch.nn.functional.interpolate(found, image.shape[-2:], mode="bilinear"))
            target = torch.from_numpy(read_mask(sample.mask, viewed.prepared.splits.mask_encoding))
            metrics.update(torch.cat(views).mean((0, 1))[None], target[None], [index])
    found = metrics.compute(results[1]["test"]["threshold"])["pooled"]
    assert found["iou"] == pytest.approx(results[1]["test"]["pooled"]["iou"], abs=1e-3)


@pytest.mark.parametrize("asked", [{}, dict(tta="flips", scales="0.5,1")])
def test_a_runs_test_images_score_what_its_results_say(trained, viewed, tmp_path, asked):
    samples, tested = trained.prepared.splits.test, viewed if asked else trained
    results = read_yaml(tested.folder / "final_results.yaml")["test"]
    if asked:
        asked |= {"threshold": results["threshold"]}
    paths = [sample.image for sample in samples]
    predict(trained.folder.path, paths, tmp_path, progress=False, device="cpu", depth=16, **asked)
    metrics = BinaryMetrics()
    for index, sample in enumerate(samples):
        found = torch.from_numpy(np.asarray(Image.open(tmp_path / f"{sample.image.stem}_mask.png")) / 255)
        target = torch.from_numpy(read_mask(sample.mask, trained.prepared.splits.mask_encoding))
        metrics.update(found[None], target[None], [index])
    scores = metrics.compute(0.5)
    assert 0 < results["pooled"]["iou"] < 1
    assert scores["pooled"] == results["pooled"] and scores["per_image"] == results["per_image"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["mask"]["threshold"] == results["threshold"]
    assert manifest["model"]["views"] == ("mean over 4 poses at scales 0.5, 1" if asked else "")
    assert ("given" if asked else "validation images") in manifest["mask"]["threshold_origin"]


def test_command_python_and_an_array_of_jobs_leave_equal_files(trained, photos, tmp_path):
    run_folder, options = str(trained.folder.path), dict(tile=192, halo=16, progress=False)
    crackseg_nb.predict(run_folder, photos, tmp_path / "python", **options, workers=2, batch=3)
    words = ["--model", run_folder, "--tile", "192", "--halo", "16", "--workers", "1", "--quiet", str(photos)]
    assert predict_main([*words, "--out", str(tmp_path / "command")]) == 0
    for shard in ("1/2", "2/2"):
        predict(run_folder, photos, tmp_path / "jobs", **options, shard=shard)
    expected = files_of(tmp_path / "python")
    assert len(expected) == 7
    assert files_of(tmp_path / "command") == expected and files_of(tmp_path / "jobs") == expected


def test_a_killed_process_goes_on_inside_a_photo(trained, photos, tmp_path, monkeypatch):
    options = dict(tile=128, halo=16, blend=32, progress=False, workers=1)
    predict(str(trained.folder.path), photos / "pier.png", tmp_path / "whole", **options)
    keep, kept = BandStore.add, []

    def die(self, band, *rest):
        if kept:
            raise KeyboardInterrupt
        keep(self, band, *rest)
        kept.append(band.index)

    monkeypatch.setattr(BandStore, "add", die)
    with pytest.raises(KeyboardInterrupt):
        predict(str(trained.folder.path), photos / "pier.png", tmp_path / "killed", **options)
    assert kept == [0] and files_of(tmp_path / "killed") == {}
    monkeypatch.setattr(BandStore, "add", lambda self, band, *rest: (kept.append(band.index), keep(self, band, *rest)))
    predict(str(trained.folder.path), photos / "pier.png", tmp_path / "killed", **options)
    assert kept[1] == 1 and files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_progress_ends_at_the_last_pixel(tmp_path, monkeypatch):
    "Fractions that are added miss the end by a rounding error, of which the bar complains."
    bars = []

    class Bar(prediction.tqdm):
        def close(self):
            if not bars:
                bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(prediction, "tqdm", Bar)
    sizes = [(697, 131), (813, 189), (501, 203)]
    for number, size in enumerate(sizes):
        Image.fromarray(synthesize(number, size)[0]).save(tmp_path / f"{number}.png")
    predict(Bright(), tmp_path, tmp_path / "out", tile=192, halo=16, workers=1)
    pixels = sum(height * width for height, width in sizes)
    assert bars == [(pixels, pixels)]


def test_another_plan_of_tiles_is_predicted_anew(trained, photos, tmp_path, monkeypatch):
    keep, kept = BandStore.add, []
    monkeypatch.setattr(BandStore, "add", lambda self, band, *rest: (kept.append(band.index), keep(self, band, *rest)))
    counts = []
    for tile, halo in ((192, 32), (192, 32), (256, 32), (256, 64)):
        options = dict(tile=tile, halo=halo, progress=False, workers=1)
        predict(str(trained.folder.path), photos / "pier.png", tmp_path / "out", **options)
        counts.append(len(kept))
    assert 0 < counts[0] == counts[1] < counts[2] < counts[3]


def small(family, **settings):
    torch.manual_seed(3)
    return create_model(family, image_size=64, pretrained="false", **settings).eval()


NARROW = dict(unet_channels=(24, 20, 16, 12, 8))


def test_tiled_equals_whole():
    "A U-Net of convolutions alone, also where a line between tiles passes: no step is seen there."
    model = small("unet", encoder="resnet34", **NARROW)
    halo = receptive_radius(model, 256)
    image, _ = synthesize(4, (301, 333))
    network = TorchNetwork(model, Facts("unet", "0" * 64))
    whole = network.probabilities(normalize(image)[None].numpy())[0, 0]
    plan = plan_tiles(whole.shape, halo, tile=2 * (halo + -halo % 32) + 96, blend=32)
    assert plan.count >= 4 and whole.std() > 1e-3
    tiled = np.concatenate(
        [band.probabilities[0] for band in predict_bands(DecodedPhoto("wall.png", image, None), plan, network)]
    )
    assert abs(tiled - whole).max() < 1e-3
    across = abs(np.diff(tiled, axis=1))
    lines = [column.first for column in plan.columns[1:]] + [column.last for column in plan.columns[:-1]]
    assert across[:, [line - 1 for line in lines]].mean() < 1.5 * across.mean()


@pytest.mark.slow
def test_tiled_equals_whole_over_views():
    model = Views(small("unet", encoder="test_resnet", **NARROW), "flips", (0.75, 1.5))
    halo = -(-receptive_radius(model.model, 256) * 4 // 3)
    image, _ = synthesize(4, (161, 673))
    network = TorchNetwork(model, Facts("unet", "0" * 64))
    whole = network.probabilities(normalize(image)[None].numpy())[0, 0]
    plan = plan_tiles(whole.shape, halo, 4 * 32, tile=2 * (halo + -halo % 128) + 160, blend=32)
    assert plan.count >= 3 and whole.std() > 1e-3
    bands = [band.probabilities[0] for band in predict_bands(DecodedPhoto("wall.png", image, None), plan, network)]
    assert abs(np.concatenate(bands) - whole).max() < 1e-3


@pytest.mark.parametrize("family", SEGMENTERS)
def test_a_dot_comes_back_in_its_place(family):
    "What a tiled prediction changes most by a dot lies where the dot is, whatever the size."
    network = TorchNetwork(build(family, 1), Facts(family, "0" * 64, align=32))
    size = (161, 203)
    plan = plan_tiles(size, 0, tile=128, blend=32)
    plain = np.full((*size, 3), 128, np.uint8)

    def tiled(image):
        photo = DecodedPhoto("dots.png", image, None)
        return np.concatenate([band.probabilities[0] for band in predict_bands(photo, plan, network)])

    before = tiled(plain)
    for row, column in [(0, 0), (size[0] - 1, size[1] - 1), (97, 131)]:
        image = plain.copy()
        image[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4] = 255
        change = abs(tiled(image) - before)
        rows, columns = np.nonzero(change > 0.5 * change.max())
        assert abs(np.median(rows) - row) <= 24 and abs(np.median(columns) - column) <= 24


def test_windows_of_attention_begin_where_tiles_do():
    assert alignment_of(build("swinv2_hybrid", 1)) == 256


CHILD = """
import resource, sys, numpy as np
from scipy.special import expit
from crackseg_nb.inference.networks import Facts, Network
from crackseg_nb.inference.prediction import predict
from crackseg_nb.core.files import sha256_file

class Dark(Network):
    facts = Facts("dark", "0" * 64, radius=32)
    def probabilities(self, images):
        return expit(-images.mean(1, keepdims=True))

import rasterio, scipy.ndimage, PIL.JpegImagePlugin
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 400 * 2**20,) * 2)
predict(Dark(), sys.argv[1], sys.argv[2], progress=False, workers=1, tile=512)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_mosaic(path, height, width):
    "Write a GeoTIFF by strips."
    rasterio = pytest.importorskip("rasterio")
    place = dict(crs="EPSG:25832", transform=rasterio.transform.from_origin(500_000, 5_600_000, 0.002, 0.002))
    tile = synthesize(5, (256, 512))[0]
    strip = np.moveaxis(np.tile(tile, (1, -(-width // 512), 1))[:, :width], -1, 0)
    options = dict(driver="GTiff", height=height, width=width, count=3, dtype="uint8", photometric="rgb")
    with rasterio.open(path, "w", **options, **place, compress="lzw") as file:
        for start in range(0, height, 256):
            rows = min(256, height - start)
            file.write(strip[:, :rows], window=((start, start + rows), (0, width)))
    return place


def test_memory_does_not_grow_with_the_height(tmp_path):
    "A photo of twice the height takes the same memory, and few addresses; its probabilities alone would take 24 MB."
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    peaks = []
    for height in (1500, 3000):
        place = write_mosaic(tmp_path / f"ortho{height}.tif", height, 2000)
        words = [sys.executable, "-c", CHILD, tmp_path / f"ortho{height}.tif", tmp_path / "found"]
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.05 * peaks[0], peaks
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(tmp_path / "found" / "ortho1500_mask.tif") as file:
        assert file.shape == (1500, 2000) and file.transform == place["transform"] and file.crs == place["crs"]
        assert 0 < (file.read(1) == 255).mean() < 1


@pytest.mark.parametrize("width", [700, 4000, 20_000, 39_266])
@pytest.mark.parametrize("halo", [0, 96, 320])
def test_tiles_are_the_largest_that_the_budget_allows(width, halo):
    plan = plan_tiles((50_000, width), halo, align=64)
    assert plan.step % 64 == 0 and plan.step >= max(512, 2 * halo) and plan.halo == halo
    assert needed_bytes(width, halo, plan.step, plan.blend) <= BUDGET
    assert needed_bytes(width, halo, plan.step + 64, plan.blend) > BUDGET
    assert plan_tiles((400, width), halo, align=64).step == plan.step, "the height has a say in the memory"


def test_as_many_tiles_at_once_as_memory_and_cores_allow(monkeypatch):
    plan, network = plan_tiles((9000, 9000), 320), Bright()
    for cores, room, threads, most, expected in [
        (16, 2**40, 2, 8, 8),
        (16, 2**40, 2, 2, 2),
        (6, 2**40, 2, 8, 3),
        (1, 2**40, 2, 8, 1),
        (16, 0, 1, 8, 1),
        (16, 4 * 600 * plan.tile**2 * 3, 1, 8, 3),
    ]:
        monkeypatch.setattr(prediction, "cores", lambda cores=cores: cores)
        monkeypatch.setattr(prediction, "free_memory", lambda room=room: room)
        network.threads, network.workers = threads, most
        assert prediction.count_workers(plan, network) == expected
        assert prediction.count_workers(plan, network, batch=2**20) == 1
    assert plan_tiles((9000, 9000), 320, enlarged=2.0).tile < plan.tile


def test_how_far_a_network_looks_is_measured_only_where_there_are_tiles(tmp_path, monkeypatch):
    network, asked = Bright(), []
    monkeypatch.setattr(network, "radius", lambda: asked.append(1) or 40, raising=False)
    settings = prediction.PredictSettings()
    for side, measured in [(300, False), (1500, False), (2500, True)]:
        photo = DecodedPhoto(tmp_path / "photo.png", np.zeros((200, side, 3), np.uint8), None)
        plan = prediction.plan_for(photo, network, settings)
        assert (plan.count > 1, bool(asked)) == (measured, measured)


class Bright(Network):
    "A network that needs no weights."

    facts = Facts("bright", "0" * 64)

    def probabilities(self, images):
        return 1 / (1 + np.exp(-images[:, :1]))


def refused(model, images, out, **options):
    with pytest.raises(CrackSegError) as error:
        predict(model, images, out, progress=False, **options)
    assert not out.exists() or not files_of(out)
    return line_of(error)


def test_bad_input_is_refused_before_work_begins(trained, photos, tmp_path):
    out = tmp_path / "out"
    assert "found no run" in refused(tmp_path / "nothing", photos, out)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(next((trained.folder / "checkpoints").glob("best*.safetensors")).read_bytes())
    assert "found no config.yaml beside these weights" in refused(weights, photos, out)
    Image.fromarray(np.zeros((20, 400, 3), np.uint8)).save(tmp_path / "thin.png")
    assert "found 20x400 pixels" in refused(Bright(), tmp_path / "thin.png", out)
    (tmp_path / "file").write_text("")
    assert "cannot write there" in refused(Bright(), photos, tmp_path / "file" / "out")
    (tmp_path / "twice").mkdir()
    for name in ("a.png", "A.jpg"):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "twice" / name)
    assert "would write the same files" in refused(Bright(), tmp_path / "twice", out)
    (tmp_path / "empty").mkdir()
    assert "found no photo" in refused(Bright(), tmp_path / "empty", out)


@pytest.mark.parametrize("tiled", [True, False])
def test_a_tiff_damaged_in_its_last_strip(tmp_path, tiled):
    rasterio = pytest.importorskip("rasterio")
    write_mosaic(tmp_path / "plain.tif", 600, 700)
    with rasterio.open(tmp_path / "plain.tif") as file:
        profile, values = {**file.profile, "tiled": tiled, "blockxsize": 256, "blockysize": 256}, file.read()
    if not tiled:
        profile.pop("blockxsize")
    with rasterio.open(tmp_path / "ortho.tif", "w", **profile) as file:
        file.write(values)
    data = (tmp_path / "ortho.tif").read_bytes()
    (tmp_path / "ortho.tif").write_bytes(data[: len(data) - 3000])
    assert "found damage in rows" in refused(Bright(), tmp_path / "ortho.tif", tmp_path / "out")


@pytest.mark.mount
def test_a_full_disk_is_found_before_work_begins(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    try:
        Image.fromarray(np.zeros((1200, 1500, 3), np.uint8)).save(tmp_path / "wall.png")
        with pytest.raises(CrackSegError, match="MiB free, expected at least"):
            predict(Bright(), tmp_path / "wall.png", place / "out", progress=False)
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_lie_as_training_sees_them(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image = synthesize(6, (60, 90))[0]
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    with open_photo(tmp_path / "turned.png") as photo:
        rows = np.concatenate(
            [photo.read(start, min(start + 25, photo.height))[0] for start in range(0, photo.height, 25)]
        )
    assert np.array_equal(rows, read_image(tmp_path / "turned.png"))


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    image = synthesize(6, (64, 96))[0]
    heif.from_pillow(Image.fromarray(image)).save(tmp_path / "phone.heic", quality=100)
    with open_photo(tmp_path / "phone.heic") as photo:
        assert abs(photo.read(0, 64)[0].astype(int) - image).mean() < 4


def test_several_classes_keep_ids_and_colours(tmp_path, photos):
    class Damages(Network):
        facts = Facts("damages", "0" * 64, ("background", "crack", "rust"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)))

        def probabilities(self, images):
            red = 1 / (1 + np.exp(-images[:, :1]))
            return np.concatenate([1 - red, 0.6 * red, 0.4 * red], axis=1)

    manifest = predict(Damages(), photos / "pier.png", tmp_path, progress=False)
    picture = Image.open(tmp_path / "pier_mask.png")
    ids = np.asarray(picture)
    assert picture.mode == "P" and set(np.unique(ids)) == {0, 1}
    assert set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3))) == {(0, 0, 0), (255, 0, 0)}
    assert manifest["photos"][0]["pixels"] == {
        "background": int((ids == 0).sum()),
        "crack": int((ids == 1).sum()),
        "rust": 0,
    }


def test_an_exported_run_predicts_the_same_without_torch(trained, photos, tmp_path):
    pytest.importorskip("onnxruntime")
    network = TorchNetwork(load_model(trained.folder.path), Facts("bridge", "0" * 64, threshold=0.5, radius=32))
    report = export_network(network, tmp_path / "bridge.onnx", sizes=[(33, 47), (97, 65)])
    assert report["difference"] <= 1e-4 and report["agreement"] == 1
    code = f"""
import sys
from crackseg_nb.inference.commands import predict_main
assert predict_main(["--model", {str(tmp_path / "bridge.onnx")!r}, "--quiet", "--out", {str(tmp_path / "onnx")!r},
    "--tile", "192", "--halo", "16", {str(photos)!r}]) == 0
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    predict(network, photos, tmp_path / "torch", tile=192, halo=16, progress=False)
    for name in ("pier", "deck"):
        one, other = (
            np.asarray(Image.open(tmp_path / kind / f"{name}_probability.png")).astype(int)
            for kind in ("onnx", "torch")
        )
        assert one.std() > 0 and abs(one - other).max() <= 1


def test_a_network_that_tracing_gets_wrong_is_not_exported(tmp_path):
    class Sided(torch.nn.Module):
        def forward(self, images):
            return images[:, :1] + 1.0 * (
                images.shape[-1] // 32 % 2 if images.shape[-1] < 500 else float(images[0, 0, 0, 0])
            )

    network = TorchNetwork(Sided(), Facts("sided", "0" * 64, radius=1))
    with pytest.raises(CrackSegError, match="another network"):
        export_network(network, tmp_path / "sided.onnx", sizes=[(33, 47)])
    assert not list(tmp_path.iterdir())


def test_help_needs_nothing_slow():
    code = "import sys\nfrom crackseg_nb.inference.commands import predict_parser\npredict_parser().format_help()\n"
    code += "assert not {'torch', 'scipy', 'rasterio', 'timm'} & set(sys.modules), 'slow'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]


def test_a_command_says_a_mistake_in_one_line(tmp_path, capsys):
    assert predict_main(["--model", "none", str(tmp_path / "none")]) == 1
    assert export_main([str(tmp_path / "none")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 2
