"Optimiser, memory and checkpoints: what would bore a reader of the chapters."

import errno
import json
import logging
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import sha256_file
from crackseg_nb.core.seeds import capture_rng_state, restore_rng_state
from crackseg_nb.training.checkpoint import (
    checkpoint_names,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from crackseg_nb.training.memory import (
    CacheCleaner,
    MemoryMonitor,
    enable_gradient_checkpointing,
    estimate_memory,
    saved_bytes,
)
from crackseg_nb.training.optim import (
    create_optimizer,
    create_scheduler,
    learning_rate_curve,
    parameter_groups,
    undecayed_names,
)
from crackseg_nb.training.settings import SCHEDULERS, OptimConfig
from crackseg_nb.training.weights import load_weights


class Net(nn.Module):
    "A small network with an encoder, every common norm, and dropout."

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 1, 1)
        )

    def forward(self, image):
        return self.head(self.encoder(image))


def make_training(config=None, total_steps=8):
    torch.manual_seed(0)
    model = Net()
    config = config or OptimConfig(lr=1e-2, scheduler="onecycle", encoder_lr_scale=0.1)
    optimizer = create_optimizer(model, config)
    return model, optimizer, create_scheduler(optimizer, config, total_steps)


def train(model, optimizer, scheduler, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 16, 16)).square().mean().backward()
        optimizer.step()
        scheduler.step()


def state_of(model, optimizer, scheduler):
    return dict(optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(), rng=capture_rng_state())


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# ---------------------------------------------------------------- optimiser and schedule
def test_every_norm_and_bias_is_exempt_from_decay():
    model = Net()
    decayed = {
        id(parameter)
        for group in parameter_groups(model, OptimConfig())
        if group["weight_decay"]
        for parameter in group["params"]
    }
    kernels = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert decayed == kernels


SMALL = dict(depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("swinv2_tiny_window8_256", SMALL),
        ("swin_tiny_patch4_window7_224", SMALL),
        ("maxvit_pico_rw_256", {}),
        ("convnext_atto", {}),
        ("vit_tiny_patch16_224", {}),
    ],
)
def test_agrees_with_timm_on_what_decays(name, settings):
    import timm
    import timm.optim

    model = timm.create_model(name, pretrained=False, **settings)
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    expected = timm.optim.param_groups_weight_decay(model, 0.01, no_weight_decay_list=listed)
    theirs = {id(parameter) for group in expected if group["weight_decay"] for parameter in group["params"]}
    ours = {
        id(parameter)
        for group in parameter_groups(model, OptimConfig())
        if group["weight_decay"]
        for parameter in group["params"]
    }
    assert ours == theirs


def test_encoder_has_its_own_rate():
    model = Net()
    groups = parameter_groups(model, OptimConfig(lr=1e-3, encoder_lr_scale=0.1))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert all(rates[id(parameter)] == pytest.approx(1e-4) for parameter in model.encoder.parameters())
    assert all(rates[id(parameter)] == 1e-3 for parameter in model.head.parameters())


def test_features_encoder_keeps_the_exemptions_of_the_full_model():
    import timm

    model = timm.create_model(
        "swinv2_tiny_window8_256",
        pretrained=False,
        features_only=True,
        embed_dim=12,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
    )
    exempt = undecayed_names(model)
    for name, _ in model.named_parameters():
        if "logit_scale" in name or "cpb_mlp" in name:
            assert name in exempt


@pytest.mark.parametrize("total_steps", [5, 17, 100])
def test_curves_equal_torch(total_steps):
    def rates(make):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler, found = make(optimizer), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(total_steps):
                found.append(optimizer.param_groups[0]["lr"])
                scheduler.step()
        return found

    cosine = learning_rate_curve(OptimConfig(lr=1e-3, min_lr_fraction=0.1), total_steps)
    assert np.allclose(
        cosine, rates(lambda optimizer: CosineAnnealingLR(optimizer, total_steps, eta_min=1e-4)), rtol=1e-9
    )
    for share in (0.3, 0.5):
        onecycle = learning_rate_curve(OptimConfig(lr=1e-3, scheduler="onecycle", warmup_fraction=share), total_steps)
        theirs = rates(
            lambda optimizer, share=share: OneCycleLR(
                optimizer, 1e-3, total_steps=total_steps, pct_start=share, cycle_momentum=False
            )
        )
        assert np.allclose(onecycle, theirs, rtol=1e-6)


def test_peaks_and_ends():
    onecycle = learning_rate_curve(OptimConfig(lr=1.0, scheduler="onecycle"), 1000)
    assert int(np.argmax(onecycle)) == 299 and onecycle[299] == 1.0 and onecycle[0] == pytest.approx(0.04)
    warm = learning_rate_curve(OptimConfig(lr=1.0, scheduler="warmup_cosine", min_lr_fraction=0.1), 1000)
    assert int(np.argmax(warm)) == 50 and 0 < warm[0] < 0.03 and warm[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(later < sooner for sooner, later in zip(warm[50:], warm[51:]))


def test_more_steps_than_planned_keep_the_last_rate():
    for name in SCHEDULERS:
        config = OptimConfig(scheduler=name, min_lr_fraction=0.1)
        model, optimizer, scheduler = make_training(config, total_steps=3)
        train(model, optimizer, scheduler, 6)
        rate = optimizer.param_groups[0]["lr"]
        train(model, optimizer, scheduler, 1)
        assert optimizer.param_groups[0]["lr"] == rate >= 0


def test_foreach_and_fused_agree(monkeypatch):
    results = []
    for fused in (True, False):
        monkeypatch.setattr("crackseg_nb.training.optim.fused_available", lambda parameters, fused=fused: fused)
        model, optimizer, _ = make_training()
        for _ in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        assert optimizer.defaults["fused"] is (True if fused else None)
        results.append(model.state_dict())
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], atol=1e-6), name


@pytest.mark.parametrize("name", SCHEDULERS)
def test_resume_through_a_checkpoint_equals_not_stopping(tmp_path, name):
    config = OptimConfig(lr=1e-2, scheduler=name, encoder_lr_scale=0.1)
    whole = make_training(config)
    train(*whole, 8)
    first = make_training(config)
    train(*first, 3)
    save_checkpoint(tmp_path, "epoch_0003", first[0].state_dict(), state_of(*first), {"step": 3})
    torch.rand(100), random.random(), np.random.rand()  # the new process is somewhere else
    model, optimizer, scheduler = make_training(config)
    loaded = load_checkpoint(tmp_path, "epoch_0003")
    model.load_state_dict(loaded.model_state)
    optimizer.load_state_dict(loaded.training_state["optimizer"])
    scheduler.load_state_dict(loaded.training_state["scheduler"])
    restore_rng_state(loaded.training_state["rng"])
    train(model, optimizer, scheduler, 5)
    assert_same(model.state_dict(), whole[0].state_dict())
    assert scheduler.get_last_lr() == whole[2].get_last_lr()


def test_settings_survive_yaml():
    from dataclasses import asdict

    from crackseg_nb.core.files import to_plain

    config = OptimConfig(scheduler="warmup_cosine", betas=(0.9, 0.95))
    assert OptimConfig(**to_plain(asdict(config))) == config


# ---------------------------------------------------------------- memory
def test_monitor_sees_a_short_peak_and_forgets_it():
    with MemoryMonitor(interval=0.005) as monitor:
        before = monitor.read()["peak_rss_mib"]
        block = mmap.mmap(
            -1, 96 * 2**20
        )  # not from the allocator, which may still hold memory that earlier tests freed
        np.frombuffer(block, np.uint8)[:] = 1
        time.sleep(0.1)
        block.close()
        assert monitor.read()["peak_rss_mib"] > before + 80
        monitor.reset()
        time.sleep(0.02)
        assert monitor.read()["peak_rss_mib"] < before + 40


def test_monitor_ends_with_an_error():
    with pytest.raises(RuntimeError), MemoryMonitor() as monitor:
        raise RuntimeError
    assert not monitor.thread.is_alive()


def test_estimate_leaves_no_trace():
    model = Net().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    estimate_memory(model, 2, (32, 32))
    assert torch.equal(torch.rand(2), expected)
    assert not model.training and not any(module.training for module in model.modules())
    assert_same(model.state_dict(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_model_with_its_own_switch_and_refusals():
    model = Net()
    with pytest.raises(CrackSegError, match="found Net with encoder Sequential"):
        enable_gradient_checkpointing(model)
    calls = []
    model.set_grad_checkpointing = calls.append
    assert enable_gradient_checkpointing(model) == ["Net"] and calls == [True]

    def refuse(enable):
        raise AssertionError("not supported")

    model.set_grad_checkpointing = refuse
    with pytest.raises(CrackSegError, match="gradient_checkpointing"):
        enable_gradient_checkpointing(model)


def test_checkpointing_an_smp_model_keeps_gradients_and_saves_memory():
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.Unet("tu-convnext_atto", encoder_weights=None, decoder_channels=(16, 8, 8, 8), encoder_depth=4)
    image = torch.randn(1, 3, 64, 64)

    def gradients():
        model.zero_grad()
        model.eval()(image).square().mean().backward()  # BatchNorm of the decoder out of the way
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    plain, memory = gradients(), saved_bytes(model, torch.cat([image, image]))
    assert enable_gradient_checkpointing(model)
    assert_same(plain, gradients())
    assert saved_bytes(model, torch.cat([image, image])) < 0.8 * memory


def test_cleaner_counts_steps():
    cleaner = CacheCleaner(50)
    assert sum(cleaner.step() for _ in range(149)) == 2


# ---------------------------------------------------------------- checkpoints
@pytest.fixture
def saved(tmp_path):
    "A folder with two whole checkpoints of different epochs."
    parts = make_training()
    for epoch in (1, 2):
        train(*parts, 1)
        save_checkpoint(tmp_path, f"epoch_{epoch:04d}", parts[0].state_dict(), state_of(*parts), {"epoch": epoch})
    return tmp_path


def file_of(folder, name, part):
    return folder / json.loads((folder / f"{name}.json").read_text())["files"][part]["file"]


def listing(folder):
    return {path.name: sha256_file(path) for path in folder.iterdir()}


@pytest.mark.parametrize("part", ["weights", "training"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "longer", "gone"])
def test_damage_is_named_and_the_one_before_is_taken(saved, part, how, caplog, monkeypatch):
    path = file_of(saved, "epoch_0002", part)
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[random.Random(0).randrange(len(data))] ^= 0x10
    changed = {"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b"", "longer": bytes(data) + b"0"}
    path.unlink() if how == "gone" else path.write_bytes(changed[how])
    with pytest.raises(CrackSegError) as error:
        load_checkpoint(saved, "epoch_0002")
    assert path.name in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(logging.getLogger("crackseg_nb"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(saved) == "epoch_0001"
    assert "DAMAGED CHECKPOINT" in caplog.text and path.name in caplog.text


def test_every_flipped_byte_of_a_manifest_is_noticed(saved):
    path = saved / "epoch_0002.json"
    data = path.read_bytes()
    whole = json.loads(data)
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            assert load_checkpoint(saved, "epoch_0002").metadata == whole["metadata"]  # only white space may change
        except CrackSegError as error:
            assert "epoch_0002" in str(error) and "\n" not in str(error)


def test_all_damaged_is_an_error_and_none_is_none(saved, tmp_path):
    for name in ("epoch_0001", "epoch_0002"):
        file_of(saved, name, "weights").write_bytes(b"")
    with pytest.raises(CrackSegError, match="no whole one"):
        latest_checkpoint(saved)
    assert latest_checkpoint(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("call", [0, 1, 2])
def test_crash_before_each_move_keeps_the_old_one(saved, monkeypatch, call):
    before, replace, calls = listing(saved), os.replace, []

    def crash(*arguments):
        calls.append(arguments)
        if len(calls) > call:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, "epoch_0002", {"weight": torch.ones(2)}, {"epoch": 9})
    assert listing(saved) == before


@pytest.mark.parametrize("file", [0, 1, 2])
def test_full_disk_keeps_the_old_one_and_says_so(saved, monkeypatch, file):
    before, opened, make = listing(saved), [], tempfile.NamedTemporaryFile

    def full(*arguments, **settings):
        handle = make(*arguments, **settings)
        opened.append(handle)

        def write(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if len(opened) > file:
            handle.write = write
        return handle

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    for name in ("epoch_0002", "epoch_0003"):
        with pytest.raises(CrackSegError) as error:
            save_checkpoint(saved, name, {"weight": torch.ones(2)}, {"epoch": 9})
        assert "No space left on device" in str(error.value) and "\n" not in str(error.value)
        assert listing(saved) == before
        del opened[:]
    assert latest_checkpoint(saved) == "epoch_0002"


SAVER = """
import sys, torch
from crackseg_nb.training.checkpoint import save_checkpoint
for epoch in range(10**6):
    weights = {"weight": torch.full((50_000,), float(epoch))}
    save_checkpoint(sys.argv[1], "last", weights, {"epoch": epoch, "noise": torch.rand(50_000)}, {"epoch": epoch})
"""


def test_a_process_killed_at_any_instant_leaves_a_whole_checkpoint(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)])
    pause = random.Random(1)
    try:
        limit = time.monotonic() + 30
        while not (tmp_path / "last.json").exists():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        for _ in range(25):  # stop it at 25 instants, look, and let it go on
            time.sleep(pause.uniform(0.001, 0.02))
            process.send_signal(signal.SIGSTOP)
            while process_state(process.pid) not in "tT":
                time.sleep(0.0005)
            copy = tmp_path.parent / f"{tmp_path.name}-copy"
            shutil.copytree(tmp_path, copy)
            process.send_signal(signal.SIGCONT)
            loaded = load_checkpoint(copy, latest_checkpoint(copy))  # what a kill at this instant would leave
            assert loaded.training_state["epoch"] == loaded.metadata["epoch"] == loaded.model_state["weight"][0]
            save_checkpoint(copy, "last", {"weight": torch.zeros(1)}, {})
            assert len(list(copy.iterdir())) == 3  # the next save sweeps what the killed one left
            shutil.rmtree(copy)
    finally:
        process.kill()
        process.wait()
    assert latest_checkpoint(tmp_path) == "last"


def process_state(pid):
    if not os.path.exists(f"/proc/{pid}/stat"):
        pytest.skip("needs Linux's /proc")
    with open(f"/proc/{pid}/stat") as handle:
        return handle.read().rsplit(")", 1)[1].split()[0]


def test_no_temporary_files_and_no_superseded_ones(saved):
    for value in range(3):
        save_checkpoint(saved, "best", {"weight": torch.full((2,), float(value))}, {"epoch": value})
    assert len(listing(saved)) == 9
    assert not [name for name in listing(saved) if name.startswith(".")]


def test_names_that_share_a_beginning_do_not_touch_each_other(tmp_path):
    for name in ("best", "best-2", "best.old", "best-2-1"):
        save_checkpoint(tmp_path, name, {"weight": torch.rand(2)}, {"name": name})
    save_checkpoint(tmp_path, "best", {"weight": torch.rand(2)}, {"name": "best"})
    for name in ("best", "best-2", "best.old", "best-2-1"):
        assert load_checkpoint(tmp_path, name).training_state["name"] == name


def test_prune_keeps_best_and_the_last(tmp_path):
    save_checkpoint(tmp_path, "best", {"weight": torch.rand(2)}, {})
    for epoch in range(5):
        save_checkpoint(tmp_path, f"epoch_{epoch:04d}", {"weight": torch.rand(2)}, {"epoch": epoch})
    file_of(tmp_path, "epoch_0004", "weights").unlink()
    assert prune_checkpoints(tmp_path, keep_last=2) == ["epoch_0000", "epoch_0001"]  # the damaged one does not count
    assert checkpoint_names(tmp_path) == ["best", "epoch_0002", "epoch_0003", "epoch_0004"]
    assert latest_checkpoint(tmp_path) == "epoch_0003"
    with pytest.raises(CrackSegError, match="keep_last"):
        prune_checkpoints(tmp_path, keep_last=-1)


def test_newest_is_by_order_of_saving_not_by_clock(saved):
    for path in saved.iterdir():
        if "0001" in path.name:
            os.utime(path, (2e9, 2e9))
    assert latest_checkpoint(saved) == "epoch_0002"


def test_random_numbers_continue():
    dropout = nn.Dropout(0.5).train()

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.standard_normal(),
            dropout(torch.ones(16)).tolist(),
        )

    draw()
    state = capture_rng_state()
    expected = [draw() for _ in range(4)]
    restore_rng_state(state)
    assert [draw() for _ in range(4)] == expected


def test_equal_weights_give_equal_files(tmp_path):
    parts = make_training()
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name, "best", parts[0].state_dict(), metadata={"run": name})
    assert sha256_file(file_of(tmp_path / "one", "best", "weights")) == sha256_file(
        file_of(tmp_path / "two", "best", "weights")
    )


def test_manifest_cannot_point_elsewhere(saved):
    from crackseg_nb.core.files import manifest_sum

    path = saved / "epoch_0002.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["weights"]["file"] = "../secret.safetensors"
    manifest["sum"] = manifest_sum(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CrackSegError, match="plain name"):
        load_checkpoint(saved, "epoch_0002")


def test_training_file_with_code_is_refused_even_with_a_right_sum(saved, tmp_path):
    from crackseg_nb.core.files import manifest_sum

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    path = file_of(saved, "epoch_0002", "training")
    torch.save({"epoch": Attack()}, path)
    manifest = json.loads((saved / "epoch_0002.json").read_text())
    manifest["files"]["training"] |= {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    manifest["sum"] = manifest_sum(manifest)
    (saved / "epoch_0002.json").write_text(json.dumps(manifest))
    with pytest.raises(CrackSegError, match="needs code to load"):
        load_checkpoint(saved, "epoch_0002")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".bin"])
def test_garbage_weights_give_one_line(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    for data in (b"", b"no weights", b"\x80\x04" + bytes(100), b"PK\x03\x04" + bytes(100), b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(CrackSegError) as error:
            load_weights(Net(), path)
        assert path.name in str(error.value) and "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_counted(saved):
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CrackSegError, match=r"0 loaded, 2 missing \(first: 0.weight\), \d+ unexpected"):
        load_weights(other, saved)
    with pytest.raises(CrackSegError):
        load_weights(other, saved, strict=False)  # nothing fits
    model = Net()
    model.head[3] = nn.Conv2d(8, 2, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CrackSegError, match=r"2 mismatched \(first: head.3.weight, found \(.*expected \("):
        load_weights(model, saved)
    assert_same(model.state_dict(), before)
    assert load_weights(model, saved, strict=False).mismatched[1].startswith("head.3.bias, found (")


def test_weights_of_a_wrapped_model(tmp_path):
    model = Net()
    torch.save(
        {"model": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, tmp_path / "ddp.pth"
    )
    copy = Net()
    load_weights(copy, tmp_path / "ddp.pth")
    assert_same(copy.state_dict(), model.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_resume_and_peak(tmp_path):
    model, optimizer, scheduler = make_training()
    model.cuda()
    monitor = MemoryMonitor("cuda")

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 64, 64, device="cuda")).square().mean().backward()
            optimizer.step()
            scheduler.step()

    steps(2)
    assert monitor.read()["peak_cuda_mib"] > 0
    save_checkpoint(tmp_path, "last", model.state_dict(), state_of(model, optimizer, scheduler))
    steps(2)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = load_checkpoint(tmp_path, "last")
    model.load_state_dict(loaded.model_state)
    optimizer.load_state_dict(loaded.training_state["optimizer"])
    scheduler.load_state_dict(loaded.training_state["scheduler"])
    restore_rng_state(loaded.training_state["rng"])
    steps(2)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
