"""What a GPU would do, shown without one: tensors without numbers say which type and device an operation has."""

import contextlib
import json

import gpu_day
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from crackseg_nb.core.seeds import allow_fused_attention, seed_everything
from crackseg_nb.models.registry import create_model
from crackseg_nb.runs import experiment as experiment_module
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import load_splits, make_datasets, make_loaders
from crackseg_nb.studies.training_speed import algorithms
from crackseg_nb.training.memory import OUT_OF_MEMORY, is_out_of_memory

FAMILIES = {
    "swinv2_hybrid": dict(encoder="swinv2", aspp_channels=16, decoder_channels=(16, 8, 8)),
    "deeplab_original": {},
    "deeplab_optimized": {},
}  # of the U-Net, whose head is a convolution at full size, the logits have the type of that convolution


@contextlib.contextmanager
def cuda_autocast(dtype):
    "Switch autocast of CUDA on; torch.autocast itself refuses where there is no card."
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def on_fake_gpu(model):
    "Give a model parameters and buffers without numbers, on a GPU that is not there; within FakeTensorMode."
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cuda"))
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return model


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_not_rounded_to_half_precision(name, dtype):
    "The repeatable enlargement leaves autocast's list of operations in float32; validation would see rounded logits."
    model = create_model(name, image_size=64, pretrained="false", **FAMILIES[name]).eval()
    seed_everything(1)
    with FakeTensorMode(), torch.no_grad(), cuda_autocast(dtype):
        logits = on_fake_gpu(model)(torch.empty(2, 3, 64, 64, device="cuda"))
    assert logits.dtype == torch.float32 and logits.device.type == "cuda"


@pytest.mark.parametrize("words", OUT_OF_MEMORY)
def test_every_way_to_say_that_memory_is_used_up(words):
    assert is_out_of_memory(RuntimeError(f"cuDNN error: {words} (see the log)"))
    assert not is_out_of_memory(ValueError(words)) and not is_out_of_memory(RuntimeError("CUDNN_STATUS_BAD_PARAM"))


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


def test_the_benchmark_compares_what_it_says(monkeypatch):
    "A run without the demand to repeat is one in which nothing is left of it."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)  # would ask the card
    before = switches()
    try:
        seed_everything(1)
        assert switches() == (True, True, False, False, False)
        with algorithms(repeatable=False, fill=False):
            assert switches() == (False, False, True, True, True)
        assert switches() == (True, True, False, False, False)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.backends.cudnn.deterministic = before[1]
        allow_fused_attention(before[2])


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_only_a_run_on_a_gpu_pins_memory(tmp_path, monkeypatch, device, pinned):
    "Pinned memory is the driver's: a run on the CPU would take room on a card that is somebody else's."
    config = configure(synthetic_images=12, image_size=32, device="cpu", outputs=str(tmp_path))
    datasets = make_datasets(config, load_splits(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(experiment_module, "get_device", lambda name: torch.device(device))
    assert {loader.pin_memory for loader in make_loaders(config, datasets).values()} == {pinned}


@pytest.mark.slow
def test_the_checks_for_a_card_go_through_without_one(tmp_path):
    assert gpu_day.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    answers = json.loads((tmp_path / "gpu_day.json").read_text())
    assert list(answers) == [check.__name__ for check in gpu_day.CHECKS] and answers["repeats"]["found"]
