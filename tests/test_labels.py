"Labelled images: folders and Tiny-ImageNet as published, their splits and audit, textures, and views by one seed."

import hashlib
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from messages import one_line
from PIL import Image

from crackseg_nb.core.files import fingerprint_of, read_yaml, write_yaml
from crackseg_nb.data.audit import audit, fingerprint
from crackseg_nb.data.dataset import LabelDataset
from crackseg_nb.data.label_augment import LABEL_AUGMENTATIONS, create_label_augmentation
from crackseg_nb.data.loaders import create_loader
from crackseg_nb.data.splits import make_splits
from crackseg_nb.sources.images import read_image, read_mask
from crackseg_nb.sources.registry import SOURCES, label_classes, read_source
from crackseg_nb.sources.samples import LABELS, Classes, Sample, Source
from crackseg_nb.synthetic.textures import TEXTURES, synthesize_texture, write_textures


def noise(seed, size=(32, 32)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_image(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(content).save(path)


def write_classes(root, counts, start=0):
    "Write `counts[name]` images of noise into a folder for each name."
    for index, (name, count) in enumerate(counts.items()):
        for number in range(count):
            write_image(root / name / f"{number}.png", noise(start + 1000 * index + number))
    return root


def labels_of(source):
    return {sample.name: sample.label for sample in source.samples}


# ---------------------------------------------------------------- folders of classes


def test_ids_are_those_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    write_classes(tmp_path, {name: 2 for name in ("b", "B", "a10", "a2", "é", "_x", "a b")})
    source, other = read_source("ImageFolder", tmp_path), ImageFolder(tmp_path)
    assert list(source.classes.names) == other.classes
    assert {str(sample.image): sample.label for sample in source.samples} == dict(other.samples)
    assert {sample.split for sample in source.samples} == {None} and source.mask_encoding == LABELS
    assert all(sample.mask is None and sample.group == sample.name for sample in source.samples)


def test_splits_are_kept_and_the_missing_one_is_carved(tmp_path):
    for split, count in (("Training", 12), ("test", 3)):
        write_classes(tmp_path / split, {"cat": count, "dog": count})
    splits = make_splits(read_source("ImageFolder", tmp_path))
    assert {sample.name for sample in splits.test} == {
        f"test/{name}/{index}" for name in ("cat", "dog") for index in range(3)
    }
    assert len(splits.train) + len(splits.val) == 24 and splits.val and splits.mask_encoding == LABELS
    assert all(sample.label == ("dog" in sample.name) for _, samples in splits for sample in samples)


def test_three_published_splits(tmp_path):
    for split in ("train", "valid", "test"):
        write_classes(tmp_path / split, {"cat": 2, "dog": 1})
    assert make_splits(read_source("ImageFolder", tmp_path)).lengths == {"train": 3, "val": 3, "test": 3}


def test_a_class_may_be_called_train(tmp_path):
    write_classes(tmp_path, {"bus": 2, "train": 3, "test": 1})
    assert read_source("ImageFolder", tmp_path).classes.names == ("bus", "test", "train")


def test_images_deeper_down_and_files_beside(tmp_path):
    write_classes(tmp_path, {"cat/tabby": 2, "dog": 2, ".cache": 1, "__MACOSX": 1})
    write_image(tmp_path / "overview.png", noise(1))
    (tmp_path / "dog/readme.txt").write_text("dogs")
    source = read_source("ImageFolder", tmp_path)
    assert labels_of(source) == {"cat/tabby/0": 0, "cat/tabby/1": 0, "dog/0": 1, "dog/1": 1}
    assert source.notes[0] == "skipped 1 image outside the class folders"


@pytest.mark.parametrize("where", ["train", "val", "test"])
@pytest.mark.parametrize("change", ["missing", "more", "empty", "renamed"])
def test_splits_with_other_classes(where, change, tmp_path):
    for split in ("train", "val", "test"):
        write_classes(tmp_path / split, {"cat": 1, "dog": 1, "emu": 1})
    place = tmp_path / where
    if change == "more":
        write_classes(place, {"fox": 1})
    if change == "empty":
        (place / "dog/0.png").unlink()
    if change == "missing":
        shutil.rmtree(place / "dog")
    if change == "renamed":
        (place / "dog").rename(place / "dogs")
    named = {"more": "'fox'", "empty": str(place / "dog"), "missing": "'dog'", "renamed": "did you mean"}[change]
    one_line(lambda: read_source("ImageFolder", tmp_path), str(tmp_path), named, "expected")


@pytest.mark.parametrize(
    "layout, part",
    [
        ({}, "found 0 classes, expected 2 to 254"),
        ({"cat/a": 1}, "found 1 class (cat)"),
        ({"test/cat": 1, "test/dog": 1}, "found test but no train/ in it"),
        ({"train/cat": 1, "dog": 1}, "found dog beside train/"),
        ({"val/a": 1, "valid/a": 1, "train/a": 1}, "expected each split once"),
    ],
)
def test_odd_folders(layout, part, tmp_path):
    one_line(lambda: read_source("ImageFolder", write_classes(tmp_path, layout)), str(tmp_path), part)


def test_too_many_classes(tmp_path):
    for index in range(255):
        (tmp_path / f"{index:03}").mkdir()
    one_line(lambda: read_source("ImageFolder", tmp_path), "found 255 classes (000, 001, 002, ...), expected 2 to 254")
    (tmp_path / "254").rmdir()
    assert len(label_classes("ImageFolder", tmp_path)) == 254


def test_names_of_classes(tmp_path):
    write_classes(tmp_path, {"n1": 1, "n2": 1, "n3": 1})

    def read(*names):
        return read_source("ImageFolder", tmp_path, class_names=names)

    assert read("cat", "dog", "emu").classes == Classes(("cat", "dog", "emu"))
    assert read("n1", "n2", "emu").classes.names == ("n1", "n2", "emu")
    one_line(lambda: read("n1", "n3", "n2"), "class_names: found 'n3' in the place of 'n2'", "n1, n2, n3")
    one_line(lambda: read("cat", "dog"), "class_names: found 2 names", "expected 3", "n1, n2, n3")
    one_line(lambda: read("cat", "cat", "dog"), "class_names: found 'cat' more than once")


@pytest.mark.parametrize("name", [name for name, reader in SOURCES.items() if reader.labels])
def test_masks_are_no_matter_of_labelled_sets(name, tmp_path):
    one_line(lambda: read_source(name, tmp_path, "class_ids"), "mask_encoding", "expected one of auto, labels")
    one_line(lambda: label_classes(name, tmp_path / "gone"), "data_dir", "gone", SOURCES[name].layout)


def test_groups_by_a_pattern(tmp_path):
    write_classes(tmp_path, {"cat": 4, "dog": 4})
    source = read_source("ImageFolder", tmp_path, group_pattern=r"^(\w+/[01]|\w+)")
    assert {sample.group for sample in source.samples} == {"cat/0", "cat/1", "cat", "dog/0", "dog/1", "dog"}
    one_line(lambda: read_source("ImageFolder", tmp_path, group_pattern="("), "group_pattern: found '('")
    one_line(
        lambda: read_source("ImageFolder", tmp_path, groups="x"), "found the option 'groups', expected group_pattern"
    )


# ---------------------------------------------------------------- Tiny-ImageNet

WNIDS = ("n02124075", "n01443537", "n07749582")


@pytest.fixture
def tiny(tmp_path):
    "The published layout with three classes."
    root = tmp_path / "tiny-imagenet-200"
    for index, name in enumerate(WNIDS):
        for number in range(6):
            write_image(root / f"train/{name}/images/{name}_{number}.JPEG", noise(100 * index + number, (64, 64)))
        (root / f"train/{name}/{name}_boxes.txt").write_text(
            "".join(f"{name}_{number}.JPEG\t0\t10\t63\t58\n" for number in range(6))
        )
    for number in range(7):
        write_image(root / f"val/images/val_{number}.JPEG", noise(500 + number, (64, 64)))
        write_image(root / f"test/images/test_{number}.JPEG", noise(600 + number, (64, 64)))
    lines = [f"val_{number}.JPEG\t{WNIDS[number % 3]}\t0\t32\t44\t62" for number in range(7)]
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "words.txt").write_text(
        "n00001740\tentity\nn02124075\tEgyptian cat\nn01443537\tgoldfish, Carassius auratus\nn07749582\tlemon\n"
    )
    return root


def test_tiny_imagenet_as_published(tiny):
    source = read_source("TinyImageNet", tiny)
    assert source.classes.names == tuple(sorted(WNIDS)) and source.mask_encoding == LABELS and len(source) == 18 + 7
    for sample in source.samples:
        told = sample.name.split("/")[1] if sample.split == "train" else WNIDS[int(sample.name[-1]) % 3]
        assert source.classes.names[sample.label] == told and sample.image.is_file()
    splits = make_splits(source)
    assert sorted(sample.name for sample in splits.test) == [f"val/val_{number}" for number in range(7)]
    assert all(sample.name.startswith("train/") for sample in splits.train + splits.val) and splits.val
    told = "\n".join(source.notes)
    assert (
        "left out 7 images of test/, which has no labels" in told
        and "n01443537 goldfish, n02124075 Egyptian cat" in told
    )
    assert audit(splits).problems == []
    assert [labels_of(read_source("TinyImageNet", place)) for place in (tiny.parent, tiny)] == [labels_of(source)] * 2


def test_tiny_imagenet_without_words_boxes_and_test(tiny):
    (tiny / "words.txt").unlink()
    for path in tiny.glob("train/*/*_boxes.txt"):
        path.unlink()
    shutil.rmtree(tiny / "test")
    source = read_source("TinyImageNet", tiny)
    assert len(source) == 25 and len(source.notes) == 1
    with open(tiny / "val/val_annotations.txt", "ab") as handle:
        handle.write(b"\r\n\r\n")
    assert len(read_source("TinyImageNet", tiny)) == 25


@pytest.mark.parametrize("file", ["wnids.txt", "val/val_annotations.txt"])
def test_tiny_imagenet_lacks_a_list(file, tiny):
    (tiny / file).unlink()
    one_line(
        lambda: read_source("TinyImageNet", tiny), str(tiny / file), "no such file", "expected tiny-imagenet-200 with"
    )


@pytest.mark.parametrize(
    "old, new, parts",
    [
        (
            "val_1.JPEG\tn01443537",
            "val_1.JPEG\tn01443573",
            ["'n01443573'", "did you mean 'n01443537'?", "val_1.JPEG", "wnids.txt"],
        ),
        ("val_1.JPEG", "val_9.JPEG", ["found val_9.JPEG, which is not in val/images"]),
        ("val_1.JPEG", "val_0.JPEG", ["found val_0.JPEG more than once"]),
        ("\t", " ", ["val_0.JPEG", "expected 2 columns between tabs"]),
    ],
)
def test_tiny_imagenet_with_odd_annotations(old, new, parts, tiny):
    path = tiny / "val/val_annotations.txt"
    path.write_text(path.read_text().replace(old, new))
    one_line(lambda: read_source("TinyImageNet", tiny), str(path), *parts)


def test_tiny_imagenet_copied_half_way(tiny):
    (tiny / "train/n02124075/images/n02124075_3.JPEG").unlink()
    one_line(lambda: read_source("TinyImageNet", tiny), "n02124075_boxes.txt", "1 image", "n02124075_3.JPEG")
    shutil.rmtree(tiny / "train/n02124075")
    one_line(lambda: read_source("TinyImageNet", tiny), "train/n02124075/images", "found no images of class n02124075")


def test_a_validation_image_without_a_line_is_noted(tiny):
    write_image(tiny / "val/images/val_9.JPEG", noise(9, (64, 64)))
    source = read_source("TinyImageNet", tiny)
    assert "skipped 1 image of val/ without a label (val_9)" in source.notes and len(source) == 25


# ---------------------------------------------------------------- splits and audit


def test_audit_counts_images_of_each_class(tmp_path):
    write_classes(tmp_path, {"cat": 20, "dog": 9, "emu": 1})
    splits = make_splits(read_source("ImageFolder", tmp_path))
    report = audit(splits)
    assert report.problems == []
    for split, samples in splits:
        counts = [sum(sample.label == label for sample in samples) for label in range(3)]
        assert (
            report.images[split].tolist() == report.pixels[split].tolist() == counts
            and report.images[split].dtype == np.int64
        )
        assert report.table.loc[split].tolist() == [
            len(samples),
            len(samples),
            "32x32",
            sum(map(bool, counts)),
            min(counts),
            max(counts),
        ]
    missing = [
        f"class {name} never occurs in {split}"
        for split, samples in splits
        for label, name in enumerate(("cat", "dog", "emu"))
        if label not in {sample.label for sample in samples}
    ]
    assert sum("emu" in line for line in missing) == 2 and missing == [line.split(":")[0] for line in report.warnings]
    assert report.table.columns.tolist() == [
        "images",
        "groups",
        "image size",
        "classes",
        "fewest per class",
        "most per class",
    ]


def test_two_classes_are_no_cracks(tmp_path):
    write_classes(tmp_path, {"cat": 12, "dog": 12})
    report = audit(make_splits(read_source("ImageFolder", tmp_path)), near_duplicates=False)
    assert "crack" not in report.report() and "inverted" not in report.report()


def test_many_missing_classes_take_one_line(tmp_path):
    write_classes(tmp_path, {f"{index:03}": 2 for index in range(40)})
    report = audit(make_splits(read_source("ImageFolder", tmp_path)))
    lines = [line for line in report.warnings if "never occur" in line]
    assert sum("of 40 classes never occur in" in line for line in lines) == 2 and len(lines) <= 12


def test_fingerprint_is_over_images_and_labels(tmp_path):
    write_classes(tmp_path / "one", {"cat": 8, "dog": 8})
    splits = make_splits(read_source("ImageFolder", tmp_path / "one"))
    before = fingerprint(splits)
    lines = sorted(
        f"{split}\t{sample.name}\t{hashlib.sha256(sample.image.read_bytes()).hexdigest()}\tlabel {sample.label}"
        for split, samples in splits
        for sample in samples
    )
    assert before == fingerprint_of(lines) == audit(splits).fingerprint
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert fingerprint(make_splits(read_source("ImageFolder", tmp_path / "two"))) == before
    assert (
        fingerprint(
            replace(splits, train=[replace(splits.train[0], label=1 - splits.train[0].label), *splits.train[1:]])
        )
        != before
    )
    write_image(splits.train[0].image, noise(77))
    assert fingerprint(replace(splits, facts={})) != before


def test_damaged_images_and_unknown_labels_stop_the_run(tmp_path):
    write_classes(tmp_path, {"cat": 8, "dog": 8})
    splits = make_splits(read_source("ImageFolder", tmp_path))
    one_line(
        audit(replace(splits, classes=Classes(("a", "b", "c")), val=[replace(splits.val[0], label=3)])).raise_if_fatal,
        "found the label 3",
    )
    path = splits.val[0].image
    path.write_bytes(path.read_bytes()[:200])
    one_line(audit(replace(splits, facts={})).raise_if_fatal, path.name, "damaged")


def test_copies_in_other_splits_are_found(tmp_path):
    write_classes(tmp_path / "train", {"cat": 20, "dog": 20})
    write_classes(tmp_path / "test", {"cat": 2, "dog": 2}, start=50_000)
    write_image(tmp_path / "test/dog/1.png", read_image(tmp_path / "train/cat/3.png")[:, ::-1])
    report = audit(make_splits(read_source("ImageFolder", tmp_path)))
    assert report.overlapping_test_names == ["test/dog/1"] and report.problems == []
    assert any("test/dog/1 nearly repeats" in line and "train/cat/3" in line for line in report.warnings)


# ---------------------------------------------------------------- textures


def test_textures_are_functions_of_the_generator():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for name in TEXTURES:
        for size in ((32, 32), (33, 100), (100, 33), [64, np.int64(48)]):
            images = [synthesize_texture(name, size, np.random.default_rng(3)) for _ in range(2)]
            assert images[0].shape == (*size, 3) and images[0].dtype == np.uint8 and np.array_equal(*images)
    assert (
        random.getstate() == before[0]
        and (np.random.get_state()[1] == before[1]).all()
        and torch.equal(torch.get_rng_state(), before[2])
    )
    assert (
        len(
            {
                synthesize_texture(name, (64, 64), np.random.default_rng(seed)).tobytes()
                for name in TEXTURES
                for seed in range(4)
            }
        )
        == 32
    )


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_folder_of_textures_is_reused_completed_or_refused(tmp_path):
    root = write_textures(tmp_path / "textures", 3, (32, 40), seed=2)
    before = contents(root)
    assert write_textures(str(root), 3, [32, 40], seed=2) == root and contents(root) == before
    manifest = read_yaml(root / "synthetic.yaml")
    assert manifest["complete"] and manifest["classes"] == list(TEXTURES) and manifest["count"] == 3
    for settings in ((4, (32, 40), 2), (3, (40, 32), 2), (3, (32, 40), 1)):
        one_line(
            lambda settings=settings: write_textures(root, *settings),
            str(root),
            "found synthetic textures with",
            "another folder",
        )
    (root / "brick/0001.png").unlink()
    write_yaml(root / "synthetic.yaml", {**manifest, "complete": False, "count": 9})
    write_image(root / "wood/0008.png", noise(1))  # of the interrupted writing of nine
    assert contents(write_textures(root, 3, (32, 40), seed=2)) == before


def test_more_textures_begin_with_the_same(tmp_path):
    few, more = (contents(write_textures(tmp_path / str(count), count, (32, 32))) for count in (2, 3))
    assert {name: more[name] for name in few if name.endswith("png")} == {
        name: few[name] for name in few if name.endswith("png")
    }


def test_other_folders_are_left_alone(tmp_path):
    write_image(tmp_path / "photos/0000.png", noise(1))
    (tmp_path / "file").write_text("")
    (tmp_path / "damage").mkdir()
    write_yaml(tmp_path / "damage/synthetic.yaml", {"generator": "crackseg_nb.data.damage", "complete": True})
    for name in ("photos", "file", "damage"):
        one_line(lambda name=name: write_textures(tmp_path / name, 2, (32, 32)), str(tmp_path / name), "expected")
    assert (tmp_path / "photos/0000.png").is_file()


def test_textures_are_read_and_pass_the_audit(tmp_path):
    source = read_source("ImageFolder", write_textures(tmp_path / "textures", 12, (48, 48)))
    assert source.classes.names == tuple(TEXTURES) and len(source) == 96
    report = audit(make_splits(source))
    assert report.problems == [] and not any("repeats" in line for line in report.warnings)


# ---------------------------------------------------------------- views and batches


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for index in range(21):
        write_image(root / f"{index % 3}/{index}.jpg", noise(index, (32 + index, 48)))
    return read_source("ImageFolder", root).samples


def states():
    return [hash(random.getstate()), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()]


def collect(dataset, epoch, num_workers, batch_size=4, **options):
    loader = create_loader(
        dataset, batch_size, train=True, seed=7, num_workers=num_workers, pin_memory=False, **options
    )
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", list(LABEL_AUGMENTATIONS))
def test_an_item_depends_on_seed_epoch_and_index_only(name, samples, one_thread):
    dataset, other = (LabelDataset(samples, create_label_augmentation(name, (40, 48)), seed=seed) for seed in (1, 2))
    first = [dataset[epoch, index]["image"] for epoch in range(3) for index in range(len(samples))]
    before = states()
    again = [dataset[epoch, index]["image"] for epoch in reversed(range(3)) for index in reversed(range(len(samples)))][
        ::-1
    ]
    assert states() == before
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(9)
    dataset = LabelDataset(samples, create_label_augmentation(name, (40, 48)), seed=1)
    fresh = [dataset[epoch, index]["image"] for epoch in range(3) for index in range(len(samples))]
    assert all(torch.equal(one, two) and torch.equal(one, three) for one, two, three in zip(first, again, fresh))
    assert all(image.shape == (3, 40, 48) and image.dtype == torch.float32 and image.is_contiguous() for image in first)
    differ = [not torch.equal(dataset[0, index]["image"], other[0, index]["image"]) for index in range(21)]
    epochs = [not torch.equal(first[index], first[21 + index]) for index in range(21)]
    least = {"none": 0, "basic": 4, "advanced": 21}[name]
    assert (sum(differ) >= least and sum(epochs) >= least) if least else not any(differ + epochs)


def test_an_error_gives_the_generator_back(samples):
    augmentation, before = create_label_augmentation("advanced", 40), states()
    with pytest.raises(TypeError):
        augmentation(np.zeros((8, 8, 3), np.complex64), 1)
    assert states() == before


def test_workers_change_nothing(samples):
    dataset = LabelDataset(samples, create_label_augmentation("advanced", 40), seed=3)
    alone = collect(dataset, 2, 0)
    for workers in (1, 2):
        torch.manual_seed(workers)
        helped = collect(dataset, 2, workers)
        assert len(helped) == len(alone)
        for ours, theirs in zip(alone, helped):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not all(torch.equal(one["image"], two["image"]) for one, two in zip(alone, collect(dataset, 3, 0)))


def test_a_batch_is_that_of_the_contract(samples):
    dataset = LabelDataset(samples, create_label_augmentation("basic", 40))
    batches = collect(dataset, 0, 0)
    assert sorted(int(index) for batch in batches for index in batch["index"]) == list(range(21))
    for batch in batches:
        assert (
            set(batch) == {"image", "target", "index"}
            and batch["target"].dtype == torch.int64
            and batch["target"].ndim == 1
        )
        assert batch["target"].tolist() == [samples[index].label for index in batch["index"]]
    parts = [collect(dataset, 1, 0, accumulation=2, rank=rank, world=2) for rank in range(2)]
    whole = collect(dataset, 1, 0, accumulation=2)
    images = {int(index): image for batch in whole for index, image in zip(batch["index"], batch["image"])}
    found = {
        int(index): image for part in parts for batch in part for index, image in zip(batch["index"], batch["image"])
    }
    assert set(found) == set(images) and all(torch.equal(found[index], images[index]) for index in images)


def test_evaluation_sees_each_image_whole_and_once(samples):
    dataset = LabelDataset(samples, create_label_augmentation("none", 40), seed=5)
    for workers in (0, 2):
        batches = list(create_loader(dataset, 8, train=False, num_workers=workers, pin_memory=False))
        assert [int(index) for batch in batches for index in batch["index"]] == list(range(21))
    small = LabelDataset(samples[:1], create_label_augmentation("none", read_image(samples[0].image).shape[:2]))
    pixels = torch.from_numpy(read_image(samples[0].image).copy()).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(small[0]["image"], (pixels - mean) / deviation)


def test_advanced_is_the_recipe_of_the_guide():
    names = [type(step).__name__ for step in create_label_augmentation("advanced", 224).change.transforms]
    assert names == ["Resize", "RandomCrop", "RandomHorizontalFlip", "RandAugment"]
    augmentation = create_label_augmentation("advanced", 224)
    resize, crop, _, change = augmentation.change.transforms
    assert resize.size == [256, 256] and tuple(crop.size) == (224, 224)
    assert (change.num_ops, change.magnitude, augmentation.erase.p) == (2, 9, 0.25)
    assert [type(step).__name__ for step in create_label_augmentation("basic", 64).change.transforms] == [
        "Resize",
        "RandomHorizontalFlip",
    ]


def test_odd_requests(samples):
    one_line(lambda: create_label_augmentation("Basic", 32), "augmentation: found 'Basic' (did you mean 'basic'?)")
    one_line(lambda: create_label_augmentation("basic", "large"), "image_size: found 'large'")
    one_line(lambda: LabelDataset([], create_label_augmentation("none", 32)), "samples: found an empty list")
    masked = Sample("a", samples[0].image, samples[0].image, "a")
    one_line(
        lambda: LabelDataset([samples[0], masked], create_label_augmentation("none", 32)),
        "found no label",
        "CrackDataset",
    )
    dataset = LabelDataset(samples, create_label_augmentation("none", 32))
    for index in (-1, 21):
        with pytest.raises(IndexError):
            dataset[0, index]
    one_line(lambda: create_loader(dataset, 22, train=True), "batch_size: found 22 for 21 training images")


def test_a_damaged_image_is_named_from_a_worker(samples, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(samples[0].image.read_bytes()[:300])
    dataset = LabelDataset(
        [*samples, replace(samples[0], image=tmp_path / "broken.jpg")], create_label_augmentation("basic", 32)
    )
    for workers in (0, 1):
        one_line(lambda workers=workers: collect(dataset, 0, workers), "broken.jpg", "damaged")


# ---------------------------------------------------------------- real images


@pytest.mark.slow
@pytest.mark.real_data
def test_cifar10(data_folder, one_thread):
    root = data_folder / "cifar10"
    if not root.is_dir():
        pytest.skip("no cifar10 in CRACKSEG_DATA")
    source = read_source("ImageFolder", root)
    assert source.classes.names == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    splits = make_splits(source)
    assert splits.lengths["test"] == 1000 and splits.lengths["train"] + splits.lengths["val"] == 5000
    report = audit(splits)
    assert report.problems == [] and report.images["test"].tolist() == [100] * 10
    assert (report.images["train"] + report.images["val"]).tolist() == [500] * 10
    dataset = LabelDataset(splits.train, create_label_augmentation("advanced", 48), seed=1)
    batch = next(iter(create_loader(dataset, 16, train=True)))
    assert batch["image"].shape == (16, 3, 48, 48) and batch["target"].tolist() == [
        splits.train[index].label for index in batch["index"]
    ]


def test_sources_of_masks_are_as_they_were():
    assert repr(Source("x", [Sample("a", "a.png", "b.png", "a")])) == "Source('x', 1 image, 1 group, masks 'ids')"
    assert Sample("a", "a.png", "b.png", "a") == Sample("a", "a.png", "b.png", "a", None, None)
    one_line(lambda: read_mask("a.png", LABELS), "mask_encoding: found 'labels'")


def test_what_the_disk_refuses_is_named(tmp_path, monkeypatch):
    write_classes(tmp_path, {"cat": 2, "dog": 2})

    def refuse(place):
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr("crackseg_nb.sources.labelled.subfolders", refuse)
    for read in (read_source, label_classes):
        one_line(
            lambda read=read: read("ImageFolder", tmp_path),
            f"{tmp_path}: cannot read it (Permission denied), expected <class>/",
        )
