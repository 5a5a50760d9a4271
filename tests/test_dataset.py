"""Loaders beyond the chapter: many workers, resuming with workers, spawned workers, decoded images in memory and
on disk and what they cost, bad files, workers that die or hang."""

import gc
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from messages import line_of
from PIL import Image

from crackseg_nb.core import machine
from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.data import store
from crackseg_nb.data.augment import AUGMENTATIONS, create_augmentation
from crackseg_nb.data.dataset import CrackDataset
from crackseg_nb.data.loaders import EpochSampler, Loader, SameSizeBatches, create_loader
from crackseg_nb.data.store import ImageStore
from crackseg_nb.sources import images
from crackseg_nb.sources.registry import read_source
from crackseg_nb.sources.samples import Sample
from crackseg_nb.studies import race
from crackseg_nb.synthetic.cracks import write_synthetic

NUM_IMAGES = 13


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read_source(
        "folder", write_synthetic(tmp_path_factory.mktemp("data") / "cracks", NUM_IMAGES, (80, 96), seed=1)
    )


def make_loader(source, num_workers=0, preload=True, seed=3, epoch=0, position=0, cache=None, **settings):
    dataset = CrackDataset(
        source.samples,
        source.mask_encoding,
        create_augmentation("crack", 64),
        seed=seed,
        preload=preload,
        cache=cache,
        progress=False,
    )
    loader = create_loader(dataset, 4, train=True, seed=seed, num_workers=num_workers, **settings)
    loader.batch_sampler.set_epoch(epoch)
    loader.batch_sampler.set_position(position)
    return loader


def child_processes():
    gc.collect()  # loaders of other tests may wait for it
    return multiprocessing.active_children()


def contents(loader):
    return [tuple(batch[name].numpy().tobytes() for name in ("index", "image", "target")) for batch in loader]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2, 4])
@pytest.mark.parametrize("preload", [False, True, "auto", "disk"])
def test_workers_and_preloading_change_no_byte(source, tmp_path, num_workers, preload):
    from_files = contents(make_loader(source, preload=False, epoch=2))
    assert len(set(from_files)) == 4
    assert contents(make_loader(source, num_workers, preload, epoch=2, cache=tmp_path)) == from_files


# macOS starts workers by the first, Python 3.14 on Linux by the second
@pytest.mark.few(1)
@pytest.mark.parametrize("start_method, preload", [("spawn", "disk"), ("forkserver", True)])
def test_workers_that_are_not_forked_read_the_same_bytes(source, tmp_path, start_method, preload):
    started = make_loader(source, 1, preload, cache=tmp_path)
    started.multiprocessing_context = multiprocessing.get_context(start_method)
    assert contents(started) == contents(make_loader(source, preload=False))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_in_mid_epoch_delivers_the_rest(source, num_workers):
    whole = contents(make_loader(source, epoch=1))
    late = make_loader(source, num_workers, epoch=1, position=2)
    assert contents(late) == whole[2:]
    late.batch_sampler.set_epoch(2)
    assert contents(late) == contents(make_loader(source, epoch=2))


def test_an_interrupted_epoch_leaves_no_trace(source):
    loader = make_loader(source, num_workers=2)
    next(iter(loader))
    loader.batch_sampler.set_epoch(1)
    assert contents(loader) == contents(make_loader(source, epoch=1))


def test_the_global_generators_are_left_alone(source):
    torch.manual_seed(0)
    np.random.seed(0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for num_workers in (0, 1):
        contents(make_loader(source, num_workers))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_an_epoch_is_a_permutation_that_other_epochs_do_not_repeat():
    orders = set()
    for seed in range(3):
        for epoch in range(20):
            sampler = EpochSampler(101, 8, seed=seed)
            sampler.set_epoch(epoch)
            order = sum(list(sampler), [])
            assert sorted(order) == [(epoch, index) for index in range(101)]
            orders.add(tuple(index for _, index in order))
    assert len(orders) == 60


def test_same_size_batches_hold_every_image_once():
    generator = np.random.default_rng(0)
    sizes = [(int(height), 64) for height in generator.integers(64, 70, 57)]
    batches = list(SameSizeBatches(sizes, 4))
    assert sorted(index for batch in batches for _, index in batch) == list(range(57))
    assert all(len({sizes[index] for _, index in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_survive_pickling(source, name):
    image, mask = CrackDataset(source.samples, source.mask_encoding).pair(0)
    augmentation = create_augmentation(name, (48, 72))
    copied = pickle.loads(pickle.dumps(augmentation))
    for one, two in zip(augmentation(image, mask, 9), copied(image, mask, 9)):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("fit", ["crop", "resize"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_void_and_crack_never_mix(name, fit):
    generator = np.random.default_rng(1)
    image = generator.integers(0, 256, (90, 70, 3), np.uint8)
    mask = generator.choice(np.array([0, 1, 255], np.uint8), (90, 70))
    augmentation = create_augmentation(name, (64, 80), fit)
    for seed in range(30):
        result = augmentation(image, mask, seed)[1]
        assert result.dtype == np.uint8 and result.shape == (64, 80) and set(np.unique(result)) <= {0, 1, 255}


def test_inputs_are_not_written_to(source):
    dataset = CrackDataset(
        source.samples, source.mask_encoding, create_augmentation("crack", 64), preload=True, progress=False
    )
    before = [tuple(array.copy() for array in dataset.pair(index)) for index in range(NUM_IMAGES)]
    for epoch in range(5):
        for index in range(NUM_IMAGES):
            dataset[epoch, index]["target"].fill_(7)
    for index, pair in enumerate(before):
        for old, new in zip(pair, dataset.pair(index)):
            np.testing.assert_array_equal(old, new)


def make_dataset(source, preload, cache=None, samples=None, **settings):
    return CrackDataset(
        samples or source.samples, source.mask_encoding, preload=preload, cache=cache, progress=False, **settings
    )


def assert_same_pairs(dataset, other):
    assert len(dataset) == len(other)
    for index in range(len(other)):
        for one, two in zip(dataset.pair(index), other.pair(index)):
            np.testing.assert_array_equal(one, two)


class TouchesAll(CrackDataset):
    "Read no image in epoch 0, and every byte of every image and mask for the first item that a process gives later."

    total = None

    def __getitem__(self, key):
        if key[0] and self.total is None:
            self.total = sum(int(part.sum()) for index in range(len(self)) for part in self.pair(index))
        return {"index": key[1], "total": self.total or 0}


class Unshared(ImageStore):
    "Copy all bytes into the memory of each process that reads them."

    def __getitem__(self, index):
        if type(self.block) is np.ndarray and not self.block.flags.owndata:
            self.block = np.array(self.block)
        return super().__getitem__(index)


def proportional_bytes(processes):
    "The memory of processes, each page counted once however many map it (PSS), without the libraries."
    total = 0
    for pid in processes:
        counts = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            first, *rest = line.split()
            if not first.endswith(":"):
                counts = len(rest) < 5 or rest[4].startswith(("[", "/memfd:")) or line.endswith(".images")
            elif first == "Pss:" and counts:
                total += 1024 * int(rest[0])
    return total


@pytest.fixture(scope="module")
def large_samples(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(generator.integers(0, 256, (1000, 1000, 3), np.uint8)).save(folder / f"{number}.bmp")
        Image.fromarray(generator.integers(0, 2, (1000, 1000), np.uint8)).save(folder / f"{number}_mask.bmp")
    return [
        Sample(str(number), folder / f"{number}.bmp", folder / f"{number}_mask.bmp", str(number))
        for number in range(40)
    ]


def growth(samples, preload, cache, start_method, kind=None):
    "How much memory grows, here and in two workers that each read all images, in multiples of their bytes."
    dataset = TouchesAll(samples, "ids", create_augmentation("none", 32), preload=preload, cache=cache, progress=False)
    if kind:
        dataset.store.__class__ = kind
    loader = create_loader(dataset, 20, train=True, num_workers=2)
    loader.multiprocessing_context = multiprocessing.get_context(start_method)
    list(loader)
    processes = [os.getpid(), *(worker.pid for worker in loader._iterator._workers)]
    before = proportional_bytes(processes)
    loader.batch_sampler.set_epoch(1)
    totals = {int(total) for batch in loader for total in batch["total"]}
    grown = proportional_bytes(processes) - before
    loader.stop_workers()
    assert totals == {sum(int(part.sum()) for index in range(len(samples)) for part in dataset.pair(index))}
    return grown / (4 * 1000 * 1000 * len(samples))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what processes share")
@pytest.mark.parametrize(
    "start_method",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("preload", [True, "disk"])
def test_workers_share_one_copy_of_the_images(large_samples, tmp_path, preload, start_method):
    assert 0.9 < growth(large_samples, preload, tmp_path, start_method) < 1.2


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what processes share")
def test_the_measurement_sees_copies_that_are_not_shared(large_samples, tmp_path):
    assert growth(large_samples, True, tmp_path, "fork", Unshared) > 1.9


def test_memory_needs_no_room_in_the_file_system_of_shared_memory(large_samples):
    used = psutil.disk_usage("/dev/shm").used
    dataset = CrackDataset(large_samples, "ids", preload=True, progress=False)
    assert psutil.disk_usage("/dev/shm").used - used < 2**25 < dataset.store.block.nbytes
    file = dataset.store.file
    del dataset
    assert not file.exists()


def test_a_temporary_file_stands_in_where_the_system_has_no_files_in_memory(source, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dataset = make_dataset(source, True)
    assert dataset.store.file.parent == tmp_path
    assert_same_pairs(dataset, make_dataset(source, False))
    del dataset
    assert not list(tmp_path.iterdir())


def test_images_that_memory_cannot_hold_go_to_disk_and_then_to_the_files(source, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "crackseg_nb")

    def last(dataset):
        return caplog.messages[-1], dataset.store and dataset.store.file.parent

    needed = NUM_IMAGES * 4 * 80 * 96
    monkeypatch.setattr(store, "free_disk", lambda folder: 2 * needed)
    monkeypatch.setattr(store, "free_memory", lambda: 2 * needed)
    line, folder = last(make_dataset(source, "auto", tmp_path))
    assert (
        line == "preload: 13 images need 0.4 MiB; 0.8 MiB of memory and 0.8 MiB of disk are available: kept in memory"
        and folder != tmp_path
    )
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(store, "free_memory", lambda: 2 * needed - 1)
    line, folder = last(make_dataset(source, "auto", tmp_path))
    assert (
        line.endswith(f"are available: more than 50 % of the memory, memory-mapped in {tmp_path}")
        and folder == tmp_path
    )
    assert last(make_dataset(source, "auto", tmp_path))[0].endswith(f"memory-mapped in {tmp_path}, as written before")
    for cache, found in ((tmp_path / "other", "0.4 MiB of disk"), (None, "no cache folder")):
        monkeypatch.setattr(store, "free_disk", lambda folder: needed)
        dataset = make_dataset(source, "auto", cache)
        line, folder = last(dataset)
        assert (
            line.endswith(
                "more than 50 % of the memory, no room on disk, images are read from their files in every epoch"
            )
            and found in line
        )
        assert folder is None and caplog.records[-1].levelname == "WARNING"
        assert_same_pairs(dataset, make_dataset(source, False))
    assert not (tmp_path / "other").exists()


def test_preloading_that_does_not_fit_is_refused_with_all_numbers(source, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "free_disk", lambda folder: 300_000)
    monkeypatch.setattr(store, "free_memory", lambda: 400_000)
    room = (
        "but 13 images need 0.4 MiB; 0.4 MiB of memory and 0.3 MiB of disk are available; expected at most 90 % of the"
    )
    for preload, found, place in ((True, "true", "memory"), ("disk", "disk", "disk")):
        with pytest.raises(CrackSegError, match=f"^preload: found {found}, {room} {place}") as caught:
            make_dataset(source, preload, tmp_path)
        line_of(caught)
    with pytest.raises(CrackSegError, match="no cache folder .*expected a cache folder"):
        make_dataset(source, "disk")
    monkeypatch.setattr(store, "free_memory", lambda: 500_000)
    assert make_dataset(source, True).store


GROUPS = {
    "version 2": ("0::/job/task\n", "", "memory.max", "max", "anon 1000\nfile 9000\nshmem 500\n"),
    "version 1": (
        "4:memory:/job/task\n0::/\n",
        "memory",
        "memory.limit_in_bytes",
        str(2**63 - 4096),
        "total_rss 1000\ntotal_cache 9000\ntotal_shmem 500\n",
    ),
}


@pytest.mark.parametrize("version", GROUPS)
@pytest.mark.parametrize("limited", ["job/task", "job", "."])
def test_a_limit_of_a_control_group_or_of_one_around_it_counts(tmp_path, monkeypatch, version, limited):
    own, controller, name, unlimited, counts = GROUPS[version]
    for group in (".", "job", "job/task"):
        folder = tmp_path / "groups" / controller / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("10000\n" if group == limited else f"{unlimited}\n")
        (folder / "memory.stat").write_text(counts)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    assert machine.free_memory() == 8500
    (tmp_path / "groups" / controller / limited / name).write_text(f"{unlimited}\n")
    assert machine.free_memory() > 2**20
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "absent")
    assert machine.free_memory() > 2**20


WRITER = """
import sys, time
from pathlib import Path
from crackseg_nb.data import dataset, store
from crackseg_nb.sources.registry import read_source
folder, cache = map(Path, sys.argv[1:])
read = store.read_pair
def slow(sample, *arguments):
    if sample.name == source.samples[-1].name: (cache/'nearly').touch(); time.sleep(60)
    return read(sample, *arguments)
source, store.read_pair = read_source('folder', folder), slow
dataset.CrackDataset(source.samples, source.mask_encoding, preload='disk', cache=cache, progress=False)
"""


def test_a_writer_that_is_killed_leaves_nothing_that_is_taken_for_a_cache(source, tmp_path):
    folder = source.samples[0].image.parents[1]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(tmp_path)])
    try:
        while not (tmp_path / "nearly").exists():
            assert writer.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
    finally:
        writer.kill()
        writer.wait()
    (tmp_path / "nearly").unlink()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and left.stat().st_size > 0
    dataset = make_dataset(source, "disk", tmp_path)
    assert_same_pairs(dataset, make_dataset(source, False))
    # what is left could still be written to
    assert {file.name for file in tmp_path.iterdir()} == {left.name, dataset.store.file.name}
    os.utime(left, (0, 0))
    (tmp_path / ".another.images.1").symlink_to("gone")  # as if its writer moved it away at this moment
    make_dataset(source, "disk", tmp_path, samples=source.samples[:2])
    assert not left.exists() and dataset.store.file.exists()


def test_a_cache_is_found_again_and_not_decoded_again(source, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "crackseg_nb")
    make_dataset(source, "disk", tmp_path)
    assert "as written before" not in caplog.text
    expected = make_dataset(source, True)
    monkeypatch.setattr(store, "read_pair", None)
    again = make_dataset(source, "disk", tmp_path)
    assert caplog.messages[-1].endswith(f"memory-mapped in {tmp_path}, as written before")
    assert_same_pairs(again, expected)
    monkeypatch.setattr(store, "free_disk", lambda folder: 0)
    assert_same_pairs(make_dataset(source, "disk", tmp_path), expected)  # what is there needs no room


def test_a_cache_of_another_length_is_written_again(source, tmp_path):
    file = make_dataset(source, "disk", tmp_path).store.file
    os.truncate(file, file.stat().st_size - 1)
    assert_same_pairs(make_dataset(source, "disk", tmp_path), make_dataset(source, False))


@pytest.mark.parametrize("change", ["pixels", "kept", "size", "mask", "resize", "encoding", "order", "format"])
def test_whatever_decides_the_content_decides_the_name(source, tmp_path, monkeypatch, change):
    write_synthetic(tmp_path / "own", 3, (64, 72), seed=5)
    own = read_source("folder", tmp_path / "own")
    settings = dict(samples=own.samples, preload="disk", cache=tmp_path / "cache")
    before = make_dataset(own, **settings).store.file
    image, mask = own.samples[1].image, own.samples[1].mask
    times = {file: file.stat().st_mtime_ns for file in (image, mask)}
    if change == "pixels":
        Image.fromarray(255 - np.array(Image.open(image))).save(image)
    if change == "kept":  # another mask of the same size and time of change, as after `cp -p`
        own.samples[1] = replace(own.samples[1], mask=mask.with_suffix(".bmp"))
        Image.open(mask).save(own.samples[1].mask)
        before = make_dataset(own, **settings).store.file
        state, mask = own.samples[1].mask.stat(), own.samples[1].mask
        Image.fromarray(255 - np.array(Image.open(mask))).save(mask)
        os.utime(mask, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert mask.stat().st_size == state.st_size
    if change == "size":
        with open(mask, "ab") as handle:
            handle.write(b"more")
        os.utime(mask, ns=(0, times[mask]))
    if change == "mask":
        Image.fromarray(255 - np.array(Image.open(mask))).save(mask)
    if change == "resize":
        settings["resize"] = (32, 36)
    if change == "encoding":
        own.mask_encoding = "threshold"
    if change == "order":
        settings["samples"] = own.samples[::-1]
    if change == "format":
        monkeypatch.setattr(store, "CACHE_FORMAT", 0)
    after = make_dataset(own, **settings)
    assert after.store.file != before and before.exists()
    assert_same_pairs(
        after,
        make_dataset(
            own, False, **{name: value for name, value in settings.items() if name not in ("preload", "cache")}
        ),
    )


def test_two_processes_may_write_one_cache_at_the_same_time(source, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(make_dataset(source, "disk", tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(list(tmp_path.iterdir())) == 1
    for dataset in found:
        assert_same_pairs(dataset, make_dataset(source, False))


def refuse(*arguments, **settings):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("fault", ["folder is a file", "no permission", "file limit"])
def test_a_place_that_refuses_is_one_line_or_left_for_the_files(source, tmp_path, monkeypatch, caplog, fault):
    cache, limits = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    preloads = ["disk", "auto"]
    if fault == "folder is a file":
        cache.touch()
    if fault == "no permission":
        monkeypatch.setattr(store, "atomic_write", refuse)
    if fault == "file limit":
        preloads.append(True)
    try:
        if fault == "file limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        for preload in preloads:
            with monkeypatch.context() as little:
                if preload == "auto":
                    little.setattr(store, "free_memory", lambda: 0)
                if preload != "auto":
                    with pytest.raises(
                        CrackSegError,
                        match=f"^preload: {'memory' if preload is True else cache} cannot hold 0.4 MiB of decoded",
                    ) as caught:
                        make_dataset(source, preload, cache)
                    line_of(caught)
                    continue
                dataset = make_dataset(source, "auto", cache)
                assert (
                    dataset.store is None and "images are read from their files in every epoch" in caplog.messages[-1]
                )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not cache.is_dir() or not list(cache.iterdir())
    assert_same_pairs(dataset, make_dataset(source, False))


@pytest.mark.parametrize("preload", [True, "disk"])
def test_a_damaged_file_leaves_nothing_behind(source, tmp_path, preload):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(source.samples[0].mask.read_bytes()[:100])
    samples = [*source.samples, Sample("damaged", source.samples[0].image, damaged, "damaged")]

    def files_in_memory():
        return [link for link in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if "memfd:crackseg" in link]

    gc.collect()
    before = files_in_memory()
    with pytest.raises(CrackSegError, match=f"^{damaged}: found a damaged") as caught:
        make_dataset(source, preload, tmp_path / "cache", samples)
    line_of(caught)
    assert files_in_memory() == before
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.few(1)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("augmentation", [None, create_augmentation("crack", 48)])
def test_loading_is_measured_from_every_place(source, tmp_path, num_workers, augmentation):
    table = race.measure_loading(
        source.samples, source.mask_encoding, augmentation, rounds=2, cache=tmp_path, num_workers=num_workers
    )
    assert list(table.index) == ["files", "disk cache", "memory"] and (table > 0).all(axis=None)
    assert len(list(tmp_path.iterdir())) == 1 and not child_processes()


def test_the_first_pass_over_the_images_does_not_count(source, monkeypatch):
    class SlowAtFirst(list):
        def __iter__(self):
            if not self:
                time.sleep(0.5)
            self.append("seen")
            return iter(())

    monkeypatch.setattr(race, "create_loader", lambda *arguments, **settings: SlowAtFirst())
    table = race.measure_loading(source.samples, source.mask_encoding, rounds=1)
    assert (table["slowest"] > NUM_IMAGES / 0.4).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_file_is_named_in_line_of(source, tmp_path, num_workers):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(source.samples[0].image.read_bytes()[:200])
    samples = [*source.samples[:3], type(source.samples[0])("damaged", damaged, source.samples[0].mask, "damaged")]
    dataset = CrackDataset(samples, source.mask_encoding, create_augmentation("none", 64))
    loader = Loader(dataset, batch_sampler=EpochSampler(len(dataset), 2), num_workers=num_workers)
    with pytest.raises(CrackSegError) as caught:
        list(loader)
    assert str(caught.value).startswith(str(damaged)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["no image", "a deep mask"])
def test_an_error_in_a_worker_reads_as_it_does_without_one(source, tmp_path, fault):
    sample, mask = source.samples[0], tmp_path / "mask.tif"
    Image.fromarray(np.full((90, 90), 300, np.int32)).save(mask)
    sample = replace(sample, image=tmp_path / "lost.png") if fault == "no image" else replace(sample, mask=mask)
    messages = []
    for num_workers in (0, 1):
        dataset = CrackDataset([sample], source.mask_encoding, create_augmentation("none", 64))
        with pytest.raises(CrackSegError) as caught:
            list(Loader(dataset, batch_sampler=EpochSampler(1, 1), num_workers=num_workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and messages[0].startswith(str(tmp_path))


def test_turned_photos_keep_their_masks(source, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.zeros((60, 40), np.uint8)).save(tmp_path / "mask.png")
    sample = type(source.samples[0])("turned", tmp_path / "turned.jpg", tmp_path / "mask.png", "turned")
    for preload in (False, True, "disk"):
        dataset = CrackDataset([sample], "ids", preload=preload, cache=tmp_path / "cache", progress=False)
        assert dataset.sizes == [(60, 40)] and dataset[0]["image"].shape == (3, 60, 40)


class Faulty(CrackDataset):
    "Do something to the worker that reads image 5, once for each file in the folder `faults`."

    def __getitem__(self, key):
        fault = next(self.faults.iterdir(), None)
        if key[1] == 5 and fault:
            fault.unlink()
            if fault.name == "sleep":
                time.sleep(60)
            else:
                os.kill(os.getpid(), getattr(signal, fault.name))
        return super().__getitem__(key)


def faulty_loader(source, faults, num_workers=2, **settings):
    dataset = Faulty(source.samples, source.mask_encoding, create_augmentation("crack", 64), seed=3, progress=False)
    dataset.faults = faults
    faults.mkdir()
    return create_loader(dataset, 4, train=True, seed=3, num_workers=num_workers, **settings)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "fault, found",
    [
        (
            "SIGKILL",
            "num_workers: worker process [0-9]+ was ended by the system .killed by signal 9., often for lack of memory",
        ),
        ("SIGBUS", "num_workers: .*killed by signal 7.*lack of shared memory"),
        ("sleep", "num_workers: no batch came for 1 seconds"),
    ],
)
def test_a_lost_worker_is_one_line_and_the_loader_works_again(source, tmp_path, fault, found):
    loader = faulty_loader(source, tmp_path / "faults", timeout=1)
    (tmp_path / "faults" / fault).touch()
    started = time.monotonic()
    with pytest.raises(CrackSegError, match=f"^{found}") as caught:
        list(loader)
    # On a busy machine torch waits for 5 seconds until a process has ended.
    assert "\n" not in str(caught.value) and time.monotonic() - started < 8
    assert contents(loader) == contents(make_loader(source))
    loader.stop_workers()
    assert not child_processes()


def test_a_worker_that_ends_between_two_batches_is_named_where_the_news_arrives(source, tmp_path):
    loader = faulty_loader(source, tmp_path / "faults")
    with pytest.raises(CrackSegError, match="^num_workers: worker process .*killed by signal 9"), loader.named_faults():
        next(iter(loader))
        os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
        for _ in range(100):
            time.sleep(0.1)  # torch's signal handler raises here
    assert contents(loader) == contents(make_loader(source))


def test_a_worker_that_ends_between_two_epochs_is_replaced(source, tmp_path):
    loader = faulty_loader(source, tmp_path / "faults")
    list(loader)
    try:
        os.kill(loader._iterator._workers[1].pid, signal.SIGKILL)
        for _ in range(20):
            time.sleep(0.1)
    except RuntimeError:
        pass
    assert contents(loader) == contents(make_loader(source))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is unknown here")
def test_workers_outlive_the_signals_that_a_cluster_sends_to_all(source):
    loader = make_loader(source, num_workers=2)
    found = []
    for batch in loader:
        found.append(tuple(batch[name].numpy().tobytes() for name in ("index", "image", "target")))
        if len(found) < 2:
            continue  # the second worker may still be starting
        for worker in loader._iterator._workers:
            for name in ("TERM", "USR1"):
                subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        time.sleep(0.2)
    assert found == contents(make_loader(source))
    started = time.monotonic()
    loader.stop_workers()
    assert not child_processes() and time.monotonic() - started < 4


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_disk_that_fails_is_one_line_naming_the_file(source, monkeypatch, num_workers):
    def fail(*arguments, **settings):
        raise OSError(5, "Input/output error")

    loader = make_loader(source, num_workers, preload=False)
    assert loader.dataset.sizes  # reads headers
    monkeypatch.setattr(images.Image, "open", fail)
    with pytest.raises(CrackSegError, match="^/.*Input/output error") as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    loader.stop_workers()
    assert contents(loader) == contents(make_loader(source))


@pytest.mark.few(1)
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_windows_with_workers_and_after_a_stop(source, world):
    def indices(loader, step):
        return [index for batch in loader.batch_sampler.window(step) for _, index in batch]

    alone = make_loader(source, accumulation=2)
    for position in (0, 1):
        parts = [
            make_loader(source, 2, accumulation=2, rank=rank, world=world, position=position) for rank in range(world)
        ]
        seen = [[int(index) for batch in part for index in batch["index"]] for part in parts]
        assert sorted(sum(seen, [])) == sorted(sum((indices(alone, step) for step in range(position, 2)), []))
        assert seen == [sum((indices(part, step) for step in range(position, 2)), []) for part in parts]
    assert make_loader(source, timeout=5).timeout == 0  # without workers there is nothing to wait for


def test_names_of_augmentations_are_known_without_the_libraries_that_transform():
    script = """
import sys
from crackseg_nb.data.augment import AUGMENTATIONS
from crackseg_nb.data.label_augment import LABEL_AUGMENTATIONS
from crackseg_nb.data import audit, class_weights, splits, store
from crackseg_nb.figures import cases, charts, photos
print(len(AUGMENTATIONS), len(LABEL_AUGMENTATIONS), *{"albumentations", "torchvision", "timm"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["6", "3"]), done.stderr
