"""What a run does with GPUs, shown without one: who touches which, what waits, and what happens where memory ends."""

import functools
import importlib
import inspect
import math
import os
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from images import Noise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crackseg_nb.core.checks import CrackSegError, Stopped
from crackseg_nb.core.run_folder import RunFolder, create_run_folder
from crackseg_nb.core.seeds import allow_fused_attention, capture_rng_state, restore_rng_state
from crackseg_nb.data.loaders import create_loader
from crackseg_nb.runs import experiment as experiment_module
from crackseg_nb.runs import launch as launch_module
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import find_precision, prepare
from crackseg_nb.runs.jobs import visible_gpus
from crackseg_nb.runs.recipes import RECIPES
from crackseg_nb.training import exchange as exchange_module
from crackseg_nb.training import losses as losses_module
from crackseg_nb.training import optim as optim_module
from crackseg_nb.training import trainer as trainer_module
from crackseg_nb.training.checkpoint import latest_checkpoint, load_checkpoint
from crackseg_nb.training.diagnosis import FiniteGuard
from crackseg_nb.training.exchange import any_process, host_group, sum_gradients
from crackseg_nb.training.losses import create_loss
from crackseg_nb.training.memory import NoRoom
from crackseg_nb.training.optim import create_optimizer
from crackseg_nb.training.precision import choose_precision
from crackseg_nb.training.settings import OptimConfig, TrainConfig
from crackseg_nb.training.trainer import (
    Trainer,
    TrainSettings,
    fit,
    load_optimizer_state,
    next_step,
    restore,
    train_window,
    training_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# What asks the driver, or keeps a number on the host, and takes no memory on a card.
HARMLESS = {
    "device_count": lambda: 2,
    "get_arch_list": lambda: ["sm_80"],
    "get_device_capability": lambda device=None: (8, 0),
    "get_device_name": lambda device=None: "a card",
    "is_available": lambda: True,
    "manual_seed_all": lambda seed: None,
}


class Launched(Exception):
    "The processes would train now."


def tiny(folder, **settings):
    usual = dict(synthetic_images=12, image_size=32, epochs=1, batch_size=4, pretrained="false", model="unet")
    return configure(**{**usual, "encoder": "test_resnet", "outputs": str(folder), "num_workers": 0, **settings})


@pytest.fixture
def cards(monkeypatch):
    "A machine with two cards; the names of what would begin to use one, which is refused."
    importlib.import_module("torch._dynamo")  # looks at the functions of torch.cuda once
    used = []

    def refusing(name):
        @functools.wraps(getattr(torch.cuda, name))
        def refused(*args, **kwargs):
            used.append(name)
            raise RuntimeError(f"torch.cuda.{name} uses a card")

        return refused

    for name in ("_lazy_init", *torch.cuda.__all__):  # torch itself calls the first before a tensor goes to a card
        if name not in HARMLESS and inspect.isfunction(getattr(torch.cuda, name)) and not name.startswith("is_"):
            monkeypatch.setattr(torch.cuda, name, refusing(name))
    for name, function in HARMLESS.items():
        monkeypatch.setattr(torch.cuda, name, function)
    yield used
    monkeypatch.undo()
    allow_fused_attention(True)


def test_the_starting_process_leaves_the_cards_to_those_that_train(tmp_path, monkeypatch, cards):
    "A context of its own would take half a gigabyte of the first card, and be refused where a card admits one process."

    def launch(function, arguments, devices, device):
        assert (devices, device.type, arguments[2]) == (2, "cuda", None)  # they ask the cards what fits
        raise Launched

    monkeypatch.setattr(experiment_module, "launch", launch)
    experiment = prepare(tiny(tmp_path, device="cuda", devices=2))
    with pytest.raises(Launched):
        experiment.train()
    assert cards == [] and experiment.config.train.amp == "bf16"
    assert {value.device.type for value in experiment.built.model.parameters()} == {"cpu"}


def test_a_single_process_measures_on_the_card(tmp_path, cards):
    "The recorder would see a model that goes to a card."
    with pytest.raises(RuntimeError, match="uses a card"):
        prepare(tiny(tmp_path, device="cuda"))
    assert cards


def test_the_fullest_card_decides_how_many_images_fit(monkeypatch):
    monkeypatch.setattr(experiment_module, "fitting_batch", lambda config, model, device: 4)
    monkeypatch.setattr(experiment_module, "gather_objects", lambda value, accelerator: [value, 3])
    trainer = SimpleNamespace(model=nn.Linear(1, 1), accelerator=SimpleNamespace(device="cpu"))
    assert experiment_module.fitting_everywhere(None, trainer) == 3


def test_the_cache_is_cleared_once_a_trial_has_let_go(monkeypatch):
    "While the error is handled its traceback holds every activation of the trial."
    tried, gone = [], []

    def estimate(*args):
        activation = nn.Linear(1, 1)
        tried.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(experiment_module, "estimate_memory", estimate)
    monkeypatch.setattr(experiment_module, "clear_cache", lambda device: gone.append(tried[0]() is None))
    assert experiment_module.fitting_batch(configure(device="cpu", amp="off"), None, torch.device("cpu")) == 1
    assert gone == [True]


class Remembering(nn.Linear):
    "A model that remembers where it went."

    def to(self, device, **how):
        self.last = device
        return self


def test_a_launcher_s_first_process_puts_its_first_model_aside(tmp_path, monkeypatch):
    "The model that trains is another; beside this one it would have less room than was estimated."
    model, trained = Remembering(1, 1).to("cuda"), []
    experiment = SimpleNamespace(
        built=SimpleNamespace(model=model),
        device="cuda",
        config=None,
        folder=RunFolder(tmp_path),
        share=lambda: (str(tmp_path),),
    )
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1)
    monkeypatch.setattr(launch_module, "create_accelerator", lambda device: accelerator)
    monkeypatch.setattr(launch_module, "prepare", lambda config: experiment)
    monkeypatch.setattr(launch_module, "marking", lambda method: method)
    monkeypatch.setattr(launch_module, "train_in_process", lambda path: trained.append(model.last))
    monkeypatch.setattr(launch_module, "run", lambda config, experiment: experiment)
    config = SimpleNamespace(run=SimpleNamespace(device="cpu"))
    assert launch_module.run_launched(config) is experiment and trained == ["cpu"]


def make_trainer(folder, optim=None, **settings):
    "Return a trainer with four steps in an epoch."
    torch.manual_seed(0)
    usual = dict(epochs=2, batch_size=2, accumulation=1, gradient_checkpointing=False, amp="off", channels_last=False)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Conv2d(2, 1, 1))
    return Trainer(
        model,
        create_loss("bce"),
        create_loader(Noise(8), 2, train=True, accumulation=1),
        None,
        TrainSettings(
            TrainConfig(**usual | settings),
            optim or OptimConfig(),
            create_run_folder(folder, "run"),
            torch.device("cpu"),
        ),
    )


@pytest.fixture
def half(tmp_path, monkeypatch):
    "Return a function that makes a trainer for fp16, as far as the CPU allows: it scales the loss and may skip steps."
    create = trainer_module.create_accelerator

    def create_scaled(device, precision):
        accelerator = create(device, precision)
        accelerator.scaler = torch.amp.GradScaler("cpu", **accelerator.scaler_handler.to_kwargs())
        return accelerator

    def make(**settings):
        monkeypatch.setattr(trainer_module, "create_accelerator", create_scaled)
        trainer = make_trainer(tmp_path, **settings)
        trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"  # to clip with
        return trainer

    return make


def overflow_in(trainer, steps):
    "Let the gradients overflow in some steps, counted from 0 over the whole run."
    taken = Counter()

    def hook(gradient):
        taken["step"] += 1
        return gradient * math.inf if taken["step"] - 1 in steps else gradient

    next(trainer.model.parameters()).register_hook(hook)


def test_steps_that_overflow_in_fp16_are_counted(half, caplog):
    "They use up the schedule, so the history says how many there were; torch has nothing to warn of."
    trainer = half()
    assert trainer.accelerator.scaler.get_scale() == 2**12
    overflow_in(trainer, {0, 2, 3, 6})
    caplog.set_level("INFO", "crackseg_nb")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = fit(trainer)
    assert history["train_skipped_steps"].tolist() == [3, 1] and trainer.accelerator.scaler.get_scale() == 2**8
    assert "3 of 4 steps skipped, which overflowed in fp16" in caplog.text


def test_the_count_of_skipped_steps_is_resumed(half):
    first, second = half(), half()
    overflow_in(first, {0, 1})
    first.model.train()
    for window in islice(first.train_loader, 3):
        train_window(first, [window])
    state = training_state(first)
    restore(second, SimpleNamespace(name="a", model_state=first.model.state_dict(), training_state=state))
    assert second.skipped.item() == 2
    del state["skipped"]  # as version 0.1 wrote it
    restore(second, SimpleNamespace(name="a", model_state=first.model.state_dict(), training_state=state))


def test_without_fp16_there_is_no_such_column(tmp_path):
    assert "train_skipped_steps" not in fit(make_trainer(tmp_path))


NUMBERS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")  # ask a tensor for its number


def fused_sgd(model, optim):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)


@pytest.mark.parametrize("clip_norm", (0.0, 1.0))
@pytest.mark.parametrize("fp16", (False, True))
@pytest.mark.parametrize("create", (create_optimizer, fused_sgd))
def test_a_step_asks_the_device_for_no_number(half, tmp_path, monkeypatch, create, fp16, clip_norm):
    "Each would make the host wait for all that the device has to do."
    monkeypatch.setattr(trainer_module, "create_optimizer", create)
    # On the CPU the class ids of each batch are looked at, on a card those of the first one.
    monkeypatch.setattr(losses_module.Loss, "sums", lambda self, *both: self.terms(losses_module.prepare(*both)))
    trainer = half(clip_norm=clip_norm) if fp16 else make_trainer(tmp_path, clip_norm=clip_norm)
    trainer.model.train()
    windows, asked = list(trainer.train_loader), []
    train_window(trainer, windows[:1])
    with monkeypatch.context() as patch:
        for name in NUMBERS:
            real = getattr(torch.Tensor, name)
            patch.setattr(torch.Tensor, name, lambda *args, name=name, real=real: asked.append(name) or real(*args))
        train_window(trainer, windows[1:2])
    assert asked == []


@pytest.mark.parametrize("clip_norm", (0.0, 1.0))
def test_a_loss_that_is_infinite_while_gradients_are_not_moves_no_weight_in_fp16(half, monkeypatch, clip_norm):
    "A scaler looks at gradients alone, and an activation that overflows can leave them finite."
    trainer = half(clip_norm=clip_norm)
    gradient, before = trainer_module.window_gradient, []

    def window_gradient(trainer, window):
        found = gradient(trainer, window)
        if trainer.step == 1:
            before.extend(value.detach().clone() for value in trainer.model.parameters())
            found[0] = math.inf
        return found

    monkeypatch.setattr(trainer_module, "window_gradient", window_gradient)
    monkeypatch.setattr(trainer_module, "keep_evidence", lambda *args: None)
    monkeypatch.setattr(trainer_module, "suspect_files", lambda *args: [])
    with pytest.raises(CrackSegError, match="step 2 of 4"):
        fit(trainer)
    assert trainer.step == 4 and all(map(torch.equal, before, trainer.model.parameters()))


def test_sgd_takes_its_fused_form_on_a_card_alone(monkeypatch):
    "On the CPU its last digits would be others; on a card a first step that is left out may not leave momenta unset."
    optim, model = OptimConfig(optimizer="sgd"), nn.Linear(3, 2)
    assert not create_optimizer(model, optim).param_groups[0]["fused"]
    monkeypatch.setattr(optim_module, "fused_available", lambda *args: True)  # which a card would have to say
    with FakeTensorMode():
        optimizer = create_optimizer(nn.Linear(3, 2, device="cuda"), optim)
        assert all(group["fused"] for group in optimizer.param_groups)
        assert [len(state) for state in optimizer.state.values()] == [1, 1]
        assert FiniteGuard(optimizer, "cuda").on_device


def test_a_state_of_an_optimiser_that_is_not_fused_goes_on_in_fp16():
    "A scaler would hand over a switch that only fused ones have."
    weight = nn.Parameter(torch.ones(3))
    plain, fused = (torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=fused) for fused in (None, True))
    load_optimizer_state(fused, plain.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    scaler.step(fused)
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_momenta_that_begin_at_zero_change_no_step():
    found = []
    for zeros in (False, True):
        weight = nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(0)))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True, fused=True)
        if zeros:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        for _ in range(3):
            weight.grad = weight.detach().sin()
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.fixture
def world(tmp_path):
    "A process group of one."
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/world", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    exchange_module.close()


def test_hosts_answer_each_other_without_their_devices(world, monkeypatch):
    "Beside a group of devices there is one of hosts, made once; a tensor on a card would fail here."
    accelerator, made = SimpleNamespace(num_processes=2, device=torch.device("cuda")), []
    assert [any_process(flag, accelerator) for flag in (True, False)] == [True, False]
    assert host_group(world) is world
    host_group.cache_clear()
    create = torch.distributed.new_group
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(torch.distributed, "new_group", lambda **how: made.append(how) or create(**how))
    assert [any_process(flag, accelerator) for flag in (True, False)] == [True, False]
    assert made == [dict(backend="gloo", timeout=exchange_module.PATIENCE)]


class Large(TorchDispatchMode):
    "Count the operations that make a new tensor of at least `size` numbers."

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made._base is None and made.numel() >= self.size:
            self.found.append(func.overloadpacket.__name__)
        return made


def test_the_exchange_takes_one_copy_of_the_gradients(monkeypatch):
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    model(torch.ones(1, 30)).sum().backward()
    before = [value.grad.clone() for value in model.parameters()]
    monkeypatch.setattr(exchange_module, "any_process", lambda flag, accelerator: flag)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    with Large(sum(value.numel() for value in before)) as large:
        sum_gradients(model.parameters(), SimpleNamespace(num_processes=2))
    assert [name for name in large.found if name != "mul_"] == ["cat"]
    assert all(torch.equal(value.grad, 2 * old) for value, old in zip(model.parameters(), before))


def test_the_exchange_without_room_ends_all_processes_alike(monkeypatch):
    "Also that which had the room: alone it would wait for the others."
    monkeypatch.setattr(exchange_module, "any_process", lambda flag, accelerator: True)
    accelerator = SimpleNamespace(num_processes=2, device="cuda:0")
    with pytest.raises(NoRoom, match="expected GPUs that nothing else uses") as caught:
        sum_gradients(nn.Linear(1, 1).parameters(), accelerator)
    assert "\n" not in str(caught.value)

    def full(parameters):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(exchange_module, "join_gradients", full)
    monkeypatch.setattr(exchange_module, "any_process", lambda flag, accelerator: flag)
    with pytest.raises(NoRoom):
        sum_gradients([], accelerator)


def test_what_was_learned_before_an_exchange_without_room_is_kept(tmp_path, monkeypatch):
    "The state is that before the step: a resumed training, with its dropout and its statistics, repeats the whole one."
    whole = make_trainer(tmp_path)
    fit(whole)
    cut = make_trainer(tmp_path)

    def full(parameters, accelerator):
        if cut.step == 2:
            raise NoRoom("memory: full")

    monkeypatch.setattr(trainer_module, "sum_gradients", full)
    with pytest.raises(NoRoom):
        fit(cut)
    monkeypatch.undo()
    name = latest_checkpoint(cut.folder / "checkpoints")
    assert name == "epoch_0001_step_00002"
    resumed = make_trainer(tmp_path)
    fit(resumed, load_checkpoint(cut.folder / "checkpoints", name))
    assert resumed.model.state_dict().keys() == whole.model.state_dict().keys()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize(("error", "saved"), [(NoRoom("memory: full"), 1), (CrackSegError("a worker died"), 0)])
def test_several_processes_save_what_all_of_them_know(tmp_path, monkeypatch, error, saved):
    trainer, states = make_trainer(tmp_path), []
    trainer.accelerator = SimpleNamespace(num_processes=2)

    def fail(*args):
        raise error

    monkeypatch.setattr(trainer_module, "train_window", fail)
    monkeypatch.setattr(trainer_module, "save_state", states.append)
    with pytest.raises(type(error)):
        next_step(trainer, iter(()))
    assert len(states) == saved


def test_an_optimiser_without_room_says_so_in_one_line(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(trainer.optimizer, "step", full)
    with pytest.raises(CrackSegError, match="expected a smaller encoder, optimizer sgd") as caught:
        fit(trainer)
    assert "\n" not in str(caught.value) and caught.value.__context__ is None
    assert latest_checkpoint(trainer.folder / "checkpoints") is None  # the weights may be between two steps


def test_evaluation_remembers_from_epoch_to_epoch_how_many_images_fit(tmp_path, monkeypatch):
    "Else each validation would begin with the same errors of memory."
    trainer, calls = make_trainer(tmp_path, epochs=3), []
    trainer.val_loader = create_loader(Noise(8), 4, train=False)

    def greedy(self, image):
        if not self.training:
            calls.append(len(image))
            if len(image) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return nn.Sequential.forward(self, image)

    trainer.model.forward = functools.partial(greedy, trainer.model)
    fit(trainer)
    assert Counter(calls) == {4: 1, 2: 1, 1: 24}


@pytest.mark.parametrize(
    ("saved", "device", "warned"),
    [(8, "cuda", False), (8, "cuda:0", False), (1, "cuda:0", False), (1, None, False)]  # others are no matter
    + [(0, "cuda", True), (1, "cuda:1", True), (0, None, True), (0, "cpu", False)],
)
def test_random_numbers_of_other_cards_are_not_missed(monkeypatch, caplog, saved, device, warned):
    "A state of a node with eight cards goes on on one with two, and that of a run on the CPU anywhere."
    state = {**capture_rng_state(), "cuda": [torch.zeros(1, dtype=torch.uint8)] * saved}
    found = dict(is_available=lambda: True, device_count=lambda: 2, current_device=lambda: 0)
    for name, function in (found | dict(set_rng_state=lambda state, index: None)).items():
        monkeypatch.setattr(torch.cuda, name, function)
    restore_rng_state(state, device and torch.device(device))
    assert ("the resumed run will differ" in caplog.text) == warned


@pytest.mark.parametrize(("capability", "amp", "warned"), [(7, "bf16", 1), (8, "bf16", 0), (7, "fp16", 0)])
def test_bf16_on_a_card_that_emulates_it_is_said_once(monkeypatch, caplog, capability, amp, warned):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    config = SimpleNamespace(train=TrainConfig(amp=amp), data=SimpleNamespace(image_size=32))
    find_precision(config, None, torch.device("cuda"))
    assert caplog.text.count("found bf16 on Tesla T4, which emulates it") == warned
    assert choose_precision("auto", torch.device("cuda")) == ("bf16" if capability >= 8 else "fp16")


@pytest.mark.parametrize(
    ("named", "there", "expected"),
    [("0,3", 2, ["0", "3"]), ("0,-1,1", 1, ["0"]), ("MIG-a,MIG-b", 1, ["MIG-a", "MIG-b"]), (None, 2, ["0", "1"])],
)
def test_local_runs_take_the_cards_that_are_named(monkeypatch, named, there, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == expected


def test_a_card_that_is_not_there_is_refused(monkeypatch):
    "Its run would see no GPU and train on the CPU."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7")
    with pytest.raises(CrackSegError, match="^CUDA_VISIBLE_DEVICES: found 0,7, of which only the first 1 can be used"):
        visible_gpus()


WHERE_IT_GOES_ON = "a process failed, and its launcher ends the others, which wait for it: -p resume"


def test_a_process_that_fails_says_where_the_run_goes_on(tmp_path, monkeypatch):
    def launch(*arguments):
        raise CrackSegError("devices: process 1 was ended by SIGKILL")

    monkeypatch.setattr(experiment_module, "launch", launch)
    experiment = prepare(tiny(tmp_path, device="cpu", devices=2, amp="off"))
    with pytest.raises(CrackSegError, match="SIGKILL"):
        experiment.train()
    log = (experiment.folder / "training.log").read_text()
    assert log.count(WHERE_IT_GOES_ON) == 1 and "goes on from the beginning" in log


@pytest.mark.parametrize(("error", "lines"), [(CrackSegError("full"), 1), (Stopped("in time"), 0)])
def test_a_process_of_a_launcher_says_it_too(tmp_path, monkeypatch, caplog, error, lines):
    (tmp_path / "checkpoints").mkdir()

    def fail(path):
        raise error

    monkeypatch.setattr(launch_module, "create_accelerator", lambda device: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(launch_module, "gather_objects", lambda share, accelerator: [(str(tmp_path),)])
    monkeypatch.setattr(launch_module, "train_in_process", fail)
    with pytest.raises(type(error)):
        launch_module.run_launched(SimpleNamespace(run=SimpleNamespace(device="cpu")))
    assert caplog.text.count(WHERE_IT_GOES_ON) == lines


def test_no_step_clears_the_memory_that_torch_keeps():
    "It waits for the card, gives all back, and asks for it anew; who wants it says so."
    assert TrainConfig().empty_cache_every == 0
    assert not any("empty_cache_every" in recipe.settings for recipe in RECIPES.values())


ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot")
@pytest.mark.parametrize(
    ("given", "found"),
    [({}, EXPANDABLE)] + [(own, own) for own in ({name: "backend:native"} for name in ALLOCATOR)],
)
def test_a_card_s_memory_grows_in_segments_unless_the_user_says_otherwise(given, found):
    code = f"import os, crackseg_nb; print({{name: os.environ[name] for name in {ALLOCATOR} if name in os.environ}})"
    own = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    done = subprocess.run([sys.executable, "-c", code], env=own | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(found)
