"""What a run does with GPUs, shown without one: who touches which, what waits, and what happens where memory ends."""

import functools
import importlib
import inspect
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.core.seeds import allow_fused_attention
from crackseg_nb.runs import experiment as experiment_module
from crackseg_nb.runs import launch as launch_module
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import prepare

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
        built=SimpleNamespace(model=model), device="cuda", config=None, folder=RunFolder(tmp_path), share=lambda: ()
    )
    accelerator = SimpleNamespace(is_main_process=True, num_processes=1)
    monkeypatch.setattr(launch_module, "create_accelerator", lambda device: accelerator)
    monkeypatch.setattr(launch_module, "prepare", lambda config: experiment)
    monkeypatch.setattr(launch_module, "marking", lambda method: method)
    monkeypatch.setattr(launch_module, "train_in_process", lambda: trained.append(model.last))
    monkeypatch.setattr(launch_module, "run", lambda config, experiment: experiment)
    config = SimpleNamespace(run=SimpleNamespace(device="cpu"))
    assert launch_module.run_launched(config) is experiment and trained == ["cpu"]
