"""What a GPU would do, shown without one: tensors without numbers say which type and device an operation has."""

import contextlib
import copy
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gpu_day
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml
from crackseg_nb.core.seeds import allow_fused_attention, seed_everything
from crackseg_nb.models import base, kernels
from crackseg_nb.models.kernels import KernelCounter
from crackseg_nb.models.registry import count_flops, create_model
from crackseg_nb.runs import experiment as experiment_module
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import load_splits, make_datasets, make_loaders, prepare, run
from crackseg_nb.runs.verify import images_at_a_time
from crackseg_nb.studies.training_speed import algorithms
from crackseg_nb.training import memory
from crackseg_nb.training.memory import OUT_OF_MEMORY, enable_gradient_checkpointing, is_out_of_memory

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


# What `torch.use_deterministic_algorithms` names as an error on CUDA, by its documentation of torch 2.14, as far as a
# network could use it; enlargements and sums over indices have forms that repeat, which the flag puts in their place.
NOT_REPEATABLE = {
    *("upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *(
        "_adaptive_avg_pool2d_backward",
        "adaptive_max_pool2d_backward",
        "avg_pool3d_backward",
        "grid_sampler_2d_backward",
    ),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "replication_pad2d_backward", "nll_loss2d_forward"),
    *("bincount", "histc", "kthvalue", "median", "cumsum", "put_", "_embedding_bag", "scatter_reduce", "max_unpool2d"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"),
    "_scaled_dot_product_efficient_attention that may not repeat",
    "_scaled_dot_product_efficient_attention_backward that may not repeat",
}
STEPS_OF = {**FAMILIES, "unet": dict(encoder="test_resnet"), "unet convnext": dict(encoder="convnext")}


class Audit(KernelCounter):
    "Count operations; the fused attention may only occur where torch refuses what does not repeat."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "efficient_attention" in name and torch.is_deterministic_algorithms_warn_only_enabled():
            name = f"{name} that may not repeat"
            self.counts[name] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def operations_of(name, settings, size=96, checkpointing=False):
    "Return how often each operation occurs in a step, forward and backward, on a device that computes nothing."
    seed_everything(1)
    model = create_model(name, image_size=size, pretrained="false", **settings).train().to("meta")
    if checkpointing:
        enable_gradient_checkpointing(model)
    images = torch.empty(2, 3, size, size, device="meta")
    model(images)  # what is kept from one step to the next is made here
    with Audit() as found:
        model(images).float().square().mean().backward()
    return found


@pytest.mark.parametrize("family", STEPS_OF)
def test_a_step_uses_no_operation_that_torch_cannot_repeat_on_a_gpu(family):
    "On every device but the CPU the flag for repeatable results puts other operations in place of an enlargement's."
    assert not operations_of(family.split()[0], STEPS_OF[family]).counts.keys() & NOT_REPEATABLE


def test_the_audit_sees_an_operation_that_cannot_be_repeated():
    with KernelCounter() as found:
        image = torch.empty(1, 3, 8, 8, device="meta", requires_grad=True)
        nn.functional.pad(image, (1, 1, 1, 1), mode="reflect").mean().backward()
    assert found.counts.keys() & NOT_REPEATABLE == {"reflection_pad2d_backward"}


@pytest.mark.parametrize(("checkpointing", "most"), [(True, 1850), (False, 1250)])
def test_the_hybrid_starts_half_of_the_kernels_that_it_did(checkpointing, most):
    "Starts limit its published recipe: 2,802 for two images with timm's and torch's own operations, blocks recomputed."
    found = operations_of("swinv2_hybrid", dict(encoder="swinv2_tiny"), 360, checkpointing)
    assert most * 0.9 < found.total <= most
    blocks = 12 * (2 if checkpointing else 1)
    assert 24 <= found.counts["_scaled_dot_product_efficient_attention"] <= blocks + 12  # once more for the gradients
    assert found.counts["_scaled_dot_product_efficient_attention_backward"] == 12
    assert not found.counts.keys() & {"_unsafe_index", "upsample_bilinear2d"}


def test_threads_share_what_is_kept():
    "Tiles of one photo are computed in threads, which forget what others are about to take."
    kept, like = kernels.Kept(most=4), torch.zeros(1)

    def take(first):
        for number in range(first, first + 2000):
            key = number % 7
            assert kept.get((key,), lambda key=key: torch.full((1,), float(key)), like).item() == key

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(take, range(8)))
    finally:
        sys.setswitchinterval(before)
    assert len(kept.values) <= 4


def test_what_is_computed_in_fewer_kernels_is_the_same():
    "A whole SwinV2 hybrid, its enlargements and attentions taken as on a GPU, with and without shared biases."
    seed_everything(1)
    model = create_model("swinv2_hybrid", image_size=64, pretrained="false", **FAMILIES["swinv2_hybrid"]).double()
    for name, value in model.named_parameters():
        if "norm" in name or "cpb_mlp" in name:  # fresh ones multiply what attention finds by 0
            nn.init.normal_(value, std=0.5)
    images, found = torch.rand(2, 3, 96, 160, dtype=torch.double), []
    for few, recompute in ((False, False), (True, False), (True, True)):
        enable_gradient_checkpointing(model, recompute)
        with pytest.MonkeyPatch.context() as patch:
            if few:
                for module in (kernels, base):
                    patch.setattr(module, "counts_starts", lambda tensor: True)
            model.zero_grad()
            torch.manual_seed(2)
            logits = model.train()(images)
            logits.square().mean().backward()
            found.append([logits, *(parameter.grad for parameter in model.parameters())])
        assert all(part.shared is None for part in model.modules() if isinstance(part, kernels.FewKernelAttention))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    assert all(gradient.abs().max() > 0 for gradient in found[0][1:])


def test_an_interrupted_pass_leaves_nothing_behind(monkeypatch):
    "Shared biases hold a graph, which can neither be copied nor used again."
    monkeypatch.setattr(kernels, "counts_starts", lambda tensor: True)
    model = create_model("swinv2_hybrid", image_size=64, pretrained="false", **FAMILIES["swinv2_hybrid"]).eval()
    image = torch.rand(1, 3, 64, 64)

    def interrupt(module, inputs):
        raise KeyboardInterrupt

    stage = next(part for part in model.encoder.modules() if isinstance(part, kernels.FewKernelAttention))
    handle = stage.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(image)
    handle.remove()
    assert stage.shared is not None
    copied = copy.deepcopy(model)
    for one in (model, copied):  # where blocks are recomputed none are shared, and the old ones would be wrong
        enable_gradient_checkpointing(one)
        torch.manual_seed(2)
        for name, value in one.named_parameters():
            if "norm" in name or "cpb_mlp" in name:
                nn.init.normal_(value, std=0.5)
    assert torch.equal(model(image), copied(image)) and stage.shared is None


def test_flops_do_not_depend_on_how_they_are_counted():
    "The matrix products in the place of an enlargement are dense, and would count more."
    with torch.device("meta"):
        model = create_model("deeplab_original", image_size=64, pretrained="false")
    found = []
    for strict in (False, True):
        torch.use_deterministic_algorithms(strict, warn_only=True)
        found.append(count_flops(model, (96, 128)))
    assert found[0] == found[1]


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


TINY = dict(
    synthetic_images=12, image_size=64, epochs=2, batch_size=2, accumulation=2, device="cpu", amp="off", run_name="tiny"
)


def test_photos_that_travel_as_bytes_change_no_digit(tmp_path, monkeypatch):
    "A run on a GPU has them normalised there; the whole run, training, validation and test, is the same."
    found, plain = [], experiment_module.CrackDataset

    def as_bytes(*args, raw, **settings):
        found.append(raw)
        return plain(*args, raw=True, **settings)

    settings = TINY | dict(model="unet", encoder="test_resnet", pretrained="false")
    runs = [run(configure(**settings, outputs=str(tmp_path / "floats")))]
    monkeypatch.setattr(experiment_module, "CrackDataset", as_bytes)
    runs.append(run(configure(**settings, outputs=str(tmp_path / "bytes"))))
    assert next(iter(runs[1].prepared.loaders["train"]))["image"].dtype == torch.uint8 and not any(found)
    for name in ("history.csv", "predictions/per_image.csv"):
        assert (runs[0].folder / name).read_bytes() == (runs[1].folder / name).read_bytes()
    weights = [dict(one.trained.model.state_dict()) for one in runs]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(("device", "raw"), [("cpu", False), ("cuda", True)])
def test_only_a_gpu_gets_bytes(tmp_path, monkeypatch, device, raw):
    config = configure(synthetic_images=12, image_size=32, device="cpu", outputs=str(tmp_path))
    monkeypatch.setattr(experiment_module, "get_device", lambda name: torch.device(device))
    assert {dataset.raw for dataset in make_datasets(config, load_splits(config)).values()} == {raw}


@pytest.mark.parametrize(
    ("asked", "device", "devices", "processes"),
    [(None, "cpu", 1, 0), (None, "cuda", 1, 5), (None, "cuda", 2, 2), (None, "cuda", 8, 0), (3, "cuda", 1, 3)],
)
def test_a_gpu_gets_a_share_of_the_cores_to_prepare_its_batches(monkeypatch, asked, device, devices, processes):
    monkeypatch.setattr(experiment_module, "get_device", lambda name: torch.device(device))
    monkeypatch.setattr(experiment_module, "cores", lambda: 6)
    given = {} if asked is None else dict(num_workers=asked)
    config = configure(device="cpu", devices=devices, **given)
    assert experiment_module.loader_processes(config) == processes
    assert configure(num_workers="auto").data.num_workers is None


@pytest.mark.parametrize(
    ("room", "asked", "recomputed"), [(2**40, None, False), (2**29, None, True), (2**40, True, True)]
)
def test_activations_are_recomputed_where_they_would_fill_the_memory(tmp_path, monkeypatch, room, asked, recomputed):
    monkeypatch.setattr(memory, "available_memory", lambda device: room)
    given = {} if asked is None else dict(gradient_checkpointing=asked)
    settings = TINY | dict(recipe="swinv2_hybrid_360", **FAMILIES["swinv2_hybrid"], pretrained="false")
    experiment = prepare(configure(**settings, **given, outputs=str(tmp_path)))
    stages = [part for part in experiment.built.model.modules() if hasattr(part, "grad_checkpointing")]
    assert any(part.grad_checkpointing for part in stages) == recomputed
    kept = read_yaml(experiment.folder / "config.yaml")["train"]["gradient_checkpointing"]
    assert kept == recomputed and experiment.built.micro_batch == 2
    assert configure(recipe="swinv2_hybrid_360").train.gradient_checkpointing is None
    again = configure(config=str(experiment.folder / "config.yaml"), gradient_checkpointing="auto")
    assert again.train.gradient_checkpointing is None


@pytest.mark.parametrize("settings", [dict(data="synthetic_damage"), dict(recipe="swin_classifier")])
def test_sizes_of_validation_images_are_for_thresholds(settings):
    with pytest.raises(CrackSegError, match="^val_scales: found sizes for several classes"):
        configure(**settings, val_scales="1,2")


def test_a_repetition_with_other_batches_says_so():
    runs = [SimpleNamespace(results={"performance": {"images_at_a_time": number}}) for number in (8, 4)]
    assert images_at_a_time(runs[0], runs[0]) == []
    (told,) = images_at_a_time(*runs)
    assert told.outcome == "noted" and "8 in the run, 4 now" in told.lines[0]


@pytest.mark.slow
def test_the_checks_for_a_card_go_through_without_one(tmp_path):
    assert gpu_day.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    answers = json.loads((tmp_path / "gpu_day.json").read_text())
    assert list(answers) == [check.__name__ for check in gpu_day.CHECKS] and answers["repeats"]["found"]
