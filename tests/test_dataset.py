"""Loaders beyond the chapter: many workers, resuming with workers, spawned workers, little shared memory, bad files,
workers that die or hang."""
import multiprocessing
import os
import pickle
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

from crackseg_nb.core import CrackSegError
from crackseg_nb.data import dataset as dataset_module
from crackseg_nb.data import sources as sources_module
from crackseg_nb.data.augment import AUGMENTATIONS, create_augmentation
from crackseg_nb.data.dataset import CrackDataset, EpochSampler, Loader, SameSizeBatches, create_loader
from crackseg_nb.data.sources import read_source
from crackseg_nb.data.synthetic import write_synthetic

NUM_IMAGES = 13


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return read_source('folder', write_synthetic(tmp_path_factory.mktemp('data')/'cracks', NUM_IMAGES, (80, 96), seed=1))


def make_loader(source, num_workers=0, preload=True, seed=3, epoch=0, position=0, **settings):
    dataset = CrackDataset(source.samples, source.mask_encoding, create_augmentation('crack', 64), seed=seed,
                           preload=preload, progress=False)
    loader = create_loader(dataset, 4, train=True, seed=seed, num_workers=num_workers, **settings)
    loader.batch_sampler.set_epoch(epoch)
    loader.batch_sampler.set_position(position)
    return loader


def contents(loader):
    return [tuple(batch[name].numpy().tobytes() for name in ('index', 'image', 'mask')) for batch in loader]


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('num_workers', [2, 4])
@pytest.mark.parametrize('preload', [True, False])
def test_workers_and_preloading_change_no_byte(source, num_workers, preload):
    assert contents(make_loader(source, num_workers, preload, epoch=2)) == contents(make_loader(source, epoch=2))


def test_spawned_workers_read_the_same_bytes(source):
    spawned = make_loader(source, num_workers=1)
    spawned.multiprocessing_context = multiprocessing.get_context('spawn')
    assert contents(spawned) == contents(make_loader(source))


@pytest.mark.parametrize('num_workers', [0, 2])
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
    for num_workers in (0, 1): contents(make_loader(source, num_workers))
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


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_augmentations_survive_pickling(source, name):
    image, mask = CrackDataset(source.samples, source.mask_encoding).pair(0)
    augmentation = create_augmentation(name, (48, 72))
    copied = pickle.loads(pickle.dumps(augmentation))
    for one, two in zip(augmentation(image, mask, 9), copied(image, mask, 9)): np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize('fit', ['crop', 'resize'])
@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_void_and_crack_never_mix(name, fit):
    generator = np.random.default_rng(1)
    image = generator.integers(0, 256, (90, 70, 3), np.uint8)
    mask = generator.choice(np.array([0, 1, 255], np.uint8), (90, 70))
    augmentation = create_augmentation(name, (64, 80), fit)
    for seed in range(30):
        result = augmentation(image, mask, seed)[1]
        assert result.dtype == np.uint8 and result.shape == (64, 80) and set(np.unique(result)) <= {0, 1, 255}


def test_inputs_are_not_written_to(source):
    dataset = CrackDataset(source.samples, source.mask_encoding, create_augmentation('crack', 64), preload=True, progress=False)
    before = [tuple(array.copy() for array in dataset.pair(index)) for index in range(NUM_IMAGES)]
    for epoch in range(5):
        for index in range(NUM_IMAGES): dataset[epoch, index]['mask'].fill_(7)
    for index, pair in enumerate(before):
        for old, new in zip(pair, dataset.pair(index)): np.testing.assert_array_equal(old, new)


def test_little_shared_memory_is_avoided(source, monkeypatch):
    monkeypatch.setattr(dataset_module, 'can_share', lambda needed: False)
    private = make_loader(source, num_workers=2)
    assert not any(block.is_shared() for block in private.dataset.store.images.values())
    monkeypatch.undo()
    assert contents(private) == contents(make_loader(source))


def test_preloading_that_does_not_fit(source, monkeypatch, caplog):
    class LittleMemory: available = 100_000
    monkeypatch.setattr(dataset_module.psutil, 'virtual_memory', lambda: LittleMemory)
    with caplog.at_level('WARNING', 'crackseg_nb'):
        assert CrackDataset(source.samples, source.mask_encoding, preload='auto').store is None
    assert 'images are read from disk' in caplog.text
    with pytest.raises(CrackSegError, match='^preload: the decoded images need'):
        CrackDataset(source.samples, source.mask_encoding, preload=True)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_a_damaged_file_is_named_in_one_line(source, tmp_path, num_workers):
    damaged = tmp_path/'damaged.png'
    damaged.write_bytes(source.samples[0].image.read_bytes()[:200])
    samples = [*source.samples[:3], type(source.samples[0])('damaged', damaged, source.samples[0].mask, 'damaged')]
    dataset = CrackDataset(samples, source.mask_encoding, create_augmentation('none', 64))
    loader = Loader(dataset, batch_sampler=EpochSampler(len(dataset), 2), num_workers=num_workers)
    with pytest.raises(CrackSegError) as caught: list(loader)
    assert str(caught.value).startswith(str(damaged)) and '\n' not in str(caught.value)


def test_turned_photos_keep_their_masks(source, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path/'turned.jpg', exif=exif)
    Image.fromarray(np.zeros((60, 40), np.uint8)).save(tmp_path/'mask.png')
    sample = type(source.samples[0])('turned', tmp_path/'turned.jpg', tmp_path/'mask.png', 'turned')
    for preload in (False, True):
        dataset = CrackDataset([sample], 'ids', preload=preload, progress=False)
        assert dataset.sizes == [(60, 40)] and dataset[0]['image'].shape == (3, 60, 40)


class Faulty(CrackDataset):
    'Do something to the worker that reads image 5, once for each file in the folder `faults`.'
    def __getitem__(self, key):
        fault = next(self.faults.iterdir(), None)
        if key[1] == 5 and fault:
            fault.unlink()
            if fault.name == 'sleep': time.sleep(60)
            else: os.kill(os.getpid(), getattr(signal, fault.name))
        return super().__getitem__(key)


def faulty_loader(source, faults, num_workers=2, **settings):
    dataset = Faulty(source.samples, source.mask_encoding, create_augmentation('crack', 64), seed=3, progress=False)
    dataset.faults = faults
    faults.mkdir()
    return create_loader(dataset, 4, train=True, seed=3, num_workers=num_workers, **settings)


@pytest.mark.parametrize('fault, found', [('SIGKILL', 'num_workers: worker process [0-9]+ was ended by the system .killed by signal 9., often for lack of memory'),
                                          ('SIGBUS', 'num_workers: .*killed by signal 7.*lack of shared memory'),
                                          ('sleep', 'num_workers: no batch came for 1 seconds')])
def test_a_lost_worker_is_one_line_and_the_loader_works_again(source, tmp_path, fault, found):
    loader = faulty_loader(source, tmp_path/'faults', timeout=1)
    (tmp_path/'faults'/fault).touch()
    started = time.monotonic()
    with pytest.raises(CrackSegError, match=f'^{found}') as caught: list(loader)
    assert '\n' not in str(caught.value) and time.monotonic() - started < 4
    assert contents(loader) == contents(make_loader(source))
    loader.stop_workers()
    assert not multiprocessing.active_children()


def test_a_worker_that_ends_between_two_batches_is_named_where_the_news_arrives(source, tmp_path):
    loader = faulty_loader(source, tmp_path/'faults')
    with pytest.raises(CrackSegError, match='^num_workers: worker process .*killed by signal 9'), loader.named_faults():
        next(iter(loader))
        os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
        for _ in range(100): time.sleep(0.1)  # torch's signal handler raises here
    assert contents(loader) == contents(make_loader(source))


def test_a_worker_that_ends_between_two_epochs_is_replaced(source, tmp_path):
    loader = faulty_loader(source, tmp_path/'faults')
    list(loader)
    try:
        os.kill(loader._iterator._workers[1].pid, signal.SIGKILL)
        for _ in range(20): time.sleep(0.1)
    except RuntimeError: pass
    assert contents(loader) == contents(make_loader(source))


@pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='the sender of a signal is unknown here')
def test_workers_outlive_the_signals_that_a_cluster_sends_to_all(source):
    loader = make_loader(source, num_workers=2)
    found = []
    for batch in loader:
        found.append(tuple(batch[name].numpy().tobytes() for name in ('index', 'image', 'mask')))
        if len(found) < 2: continue  # the second worker may still be starting
        for worker in loader._iterator._workers:
            for name in ('TERM', 'USR1'): subprocess.run(['kill', f'-{name}', str(worker.pid)], check=True)
        time.sleep(0.2)
    assert found == contents(make_loader(source))
    started = time.monotonic()
    loader.stop_workers()
    assert not multiprocessing.active_children() and time.monotonic() - started < 4


@pytest.mark.parametrize('num_workers', [0, 1])
def test_a_disk_that_fails_is_one_line_naming_the_file(source, monkeypatch, num_workers):
    def fail(*arguments, **settings): raise OSError(5, 'Input/output error')
    loader = make_loader(source, num_workers, preload=False)
    loader.dataset.sizes  # reads headers
    monkeypatch.setattr(sources_module.Image, 'open', fail)
    with pytest.raises(CrackSegError, match='^/.*Input/output error') as caught: list(loader)
    assert '\n' not in str(caught.value)
    monkeypatch.undo()
    loader.stop_workers()
    assert contents(loader) == contents(make_loader(source))


@pytest.mark.parametrize('world', [2, 3])
def test_processes_share_windows_with_workers_and_after_a_stop(source, world):
    def indices(loader, step): return [index for batch in loader.batch_sampler.window(step) for _, index in batch]
    alone = make_loader(source, accumulation=2)
    for position in (0, 1):
        parts = [make_loader(source, 2, accumulation=2, rank=rank, world=world, position=position) for rank in range(world)]
        seen = [[int(index) for batch in part for index in batch['index']] for part in parts]
        assert sorted(sum(seen, [])) == sorted(sum((indices(alone, step) for step in range(position, 2)), []))
        assert seen == [sum((indices(part, step) for step in range(position, 2)), []) for part in parts]
    assert make_loader(source, timeout=5).timeout == 0  # without workers there is nothing to wait for
