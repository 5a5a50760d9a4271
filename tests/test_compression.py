"""Compression steps on models of the study: with trainer and evaluation, and INT8 on the layers of mobile networks."""

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import nn

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.run_folder import create_run_folder
from crackseg_nb.core.seeds import seed_everything
from crackseg_nb.data.augment import create_augmentation
from crackseg_nb.data.dataset import CrackDataset
from crackseg_nb.data.loaders import create_loader
from crackseg_nb.data.splits import make_splits
from crackseg_nb.models import deeplab_lite
from crackseg_nb.models.encoders import pad_to_multiple
from crackseg_nb.models.layers import conv_norm_relu
from crackseg_nb.sources.registry import read_source
from crackseg_nb.studies import compression
from crackseg_nb.studies.compression import (
    DistillationLoss,
    Ensemble,
    Int8Model,
    divergence,
    keep_zeros,
    mean_logits,
    operators,
    prune_weights,
    quantize_int8,
    sparsity,
    taught_by,
)
from crackseg_nb.synthetic.cracks import write_synthetic
from crackseg_nb.training.checkpoint import latest_checkpoint, load_checkpoint
from crackseg_nb.training.evaluation import evaluate
from crackseg_nb.training.losses import create_loss
from crackseg_nb.training.settings import OptimConfig, TrainConfig
from crackseg_nb.training.trainer import Trainer, TrainSettings, fit
from crackseg_nb.training.weights import load_weights
from crackseg_nb.training.window import create_accelerator

pytestmark = pytest.mark.usefixtures("one_thread")


def settle(model):
    "Give batch norms statistics and weights as training leaves them; a deep fresh network predicts one value."
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return model.eval()


class Mobile(nn.Module):
    "The layers of DeepLab on MobileNetV3: hard swish, squeeze-and-excitation, depthwise, padding, resizing."

    def __init__(self, num_classes=1):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish()
        )
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.fuse, self.head = conv_norm_relu(32, 16, 3), nn.Conv2d(16, num_classes, 1)

    def forward(self, images):
        height, width = images.shape[-2:]
        fine = F.hardswish(self.norm(self.stem(pad_to_multiple(images, 32))))
        coarse = self.depthwise(fine)
        coarse = coarse * F.hardsigmoid(self.excite(F.relu(self.squeeze(coarse.mean((2, 3), keepdim=True)))))
        joined = torch.cat(
            [F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False), fine], dim=1
        )
        return F.interpolate(
            self.head(self.fuse(joined)),
            size=(2 * fine.shape[-2], 2 * fine.shape[-1]),
            mode="bilinear",
            align_corners=False,
        )[..., :height, :width]


def make(seed=0, num_classes=1):
    torch.manual_seed(seed)
    return settle(Mobile(num_classes))


def photos(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(quantised, model, images):
    with torch.no_grad():
        logits, answer = model(images), quantised(images)
    assert answer.shape == logits.shape and answer.dtype == torch.float32
    return ((answer - logits).square().mean().sqrt() / logits.std()).item()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = read_source("folder", write_synthetic(folder / "photos", 24, (64, 64), seed=1))
    return folder, source, make_splits(source, seed=1)


def make_trainer(data, model, criterion, run_id, epochs=2):
    seed_everything(7)
    folder, source, splits = data
    train = CrackDataset(splits.train, source.mask_encoding, create_augmentation("basic", (64, 64)), seed=7)
    val = CrackDataset(splits.val, source.mask_encoding, seed=7)
    config = TrainConfig(
        epochs=epochs, batch_size=3, accumulation=2, gradient_checkpointing=False, checkpoint_every=1, amp="off"
    )
    loaders = create_loader(train, 3, train=True, seed=7, accumulation=2), create_loader(val, 4, train=False, seed=7)
    return Trainer(
        model,
        criterion,
        *loaders,
        TrainSettings(config, OptimConfig(lr=1e-2), create_run_folder(folder / "outputs", run_id), torch.device("cpu")),
    )


def val_loader(data):
    return create_loader(CrackDataset(data[2].val, data[1].mask_encoding), 4, train=False)


def test_the_trainer_distils_and_its_checkpoint_is_the_student(data):
    teacher, student = make(1), make(2)
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(data, student, DistillationLoss(create_loss("focal_dice"), alpha=0.7), "distil")
    with taught_by(student, teacher):
        history = fit(trainer)
    assert history[["train_loss", "val_loss"]].notna().all(axis=None)
    assert not teacher.training and all(
        torch.equal(value, before[name]) for name, value in teacher.state_dict().items()
    )
    plain = make()
    load_weights(plain, trainer.folder / "checkpoints" / "best")
    metrics, _ = evaluate(plain, val_loader(data), create_accelerator(torch.device("cpu")))
    assert metrics.compute(0.5)["pooled"]["iou"] == pytest.approx(history["val_iou"].max(), abs=1e-6)


def test_distillation_without_the_teacher_is_plain_training(data):
    "alpha 0 leaves the plain loss and so the same weights."
    weights = []
    for alpha in (None, 0):
        model, criterion = make(2), create_loss("focal_dice")
        if alpha is None:
            fit(make_trainer(data, model, criterion, "plain", epochs=1))
        else:
            with taught_by(model, make(1)):
                fit(make_trainer(data, model, DistillationLoss(criterion, alpha=alpha), "nothing", epochs=1))
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_channels", [1, 4])
def test_accumulated_distillation_equals_the_whole_batch(num_channels):
    target = torch.randint(0, max(2, num_channels), (6, 9, 7), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    target[0], target[1, :5], target[2, :, ::2] = 255, 255, 255
    criterion = DistillationLoss(create_loss("focal_dice"), num_channels, 0.4, 3.0)
    logits = photos(6, 2 * num_channels, 9, 7)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = criterion(whole, target)
    loss.backward()
    normalizers, total = criterion.normalizers(target), 0
    for start in range(0, 6, 2):
        part = criterion(parts[start : start + 2], target[start : start + 2], normalizers)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(parts.grad, whole.grad)
    assert not whole.grad[:, num_channels:].any()
    under_void = logits.masked_fill((target == 255)[:, None], 1e4)
    assert criterion(under_void, target).item() == pytest.approx(loss.item(), rel=1e-6)


def test_divergence_by_the_definition():
    student, teacher = photos(2, 3, 4, 5), photos(2, 3, 4, 5, seed=1)
    own, wanted = (student / 2.5).softmax(1), (teacher / 2.5).softmax(1)
    torch.testing.assert_close(
        divergence(student, teacher, 2.5), (wanted * (wanted / own).log()).sum(1), rtol=1e-4, atol=1e-6
    )
    one, other = student[:, :1], teacher[:, :1]  # one channel is two classes, the first with logit 0
    torch.testing.assert_close(
        divergence(one, other, 2), divergence(F.pad(one, (0, 0, 0, 0, 1, 0)), F.pad(other, (0, 0, 0, 0, 1, 0)), 2)
    )
    assert divergence(1e4 * student, 1e4 * teacher, 1).isfinite().all()


def test_zeros_stay_through_training_and_resuming(data):
    model = make(3)
    assert prune_weights(model, 0.5).loc["all prunable", "share"] == pytest.approx(0.5, abs=0.01)
    start, zeros = (
        copy.deepcopy(model.state_dict()),
        {name: value == 0 for name, value in model.named_parameters() if value.ndim == 4},
    )
    with keep_zeros(model):
        fit(make_trainer(data, model, create_loss("focal_dice"), "pruned", epochs=2))
    for name, value in model.named_parameters():
        if name in zeros:
            assert torch.equal(value == 0, zeros[name]) and not torch.equal(value, start[name])
    again = make(9)
    again.load_state_dict(start)
    trainer = make_trainer(data, again, create_loss("focal_dice"), "resumed", epochs=2)
    checkpoints = data[0] / "outputs" / "pruned" / "checkpoints"
    state = (
        load_checkpoint(checkpoints, "epoch_0001")
        if (checkpoints / "epoch_0001").exists()
        else load_checkpoint(checkpoints, latest_checkpoint(checkpoints))
    )
    with keep_zeros(again):
        fit(trainer, resume=state)
    for name, value in again.named_parameters():
        assert torch.equal(value, dict(model.named_parameters())[name])


def test_pruning_is_global_and_changes_nothing_else():
    model = make(4)
    with torch.no_grad():
        model.fuse[0].weight.mul_(1e6)  # no weight of this layer is among the smallest
    before = copy.deepcopy(model.state_dict())
    names, order = list(before), [id(value) for value in model.parameters()]
    table = prune_weights(model, 0.1)
    assert table.loc["fuse.0", "zeros"] == 0 and table.loc["all prunable", "share"] == pytest.approx(0.1, abs=1e-3)
    assert list(model.state_dict()) == names and [id(value) for value in model.parameters()] == order
    for name, value in model.state_dict().items():
        assert torch.equal(value[value != 0], before[name][value != 0])
    for name in names:
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(model.state_dict()[name], before[name])
    assert sparsity(model).equals(table)


def test_ensemble_is_evaluated_as_one_model(data):
    models = [make(seed) for seed in (1, 2, 3)]
    ensemble, images = Ensemble(models), photos(2, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(ensemble(images).sigmoid(), sum(model(images).sigmoid() for model in models) / 3)
        several = [make(seed, 4) for seed in (1, 2)]
        torch.testing.assert_close(
            Ensemble(several)(images).softmax(1), sum(model(images).softmax(1) for model in several) / 2
        )
    metrics, loss = evaluate(
        ensemble, val_loader(data), create_accelerator(torch.device("cpu")), create_loss("focal_dice")
    )
    assert 0 <= metrics.compute(0.5)["pooled"]["iou"] <= 1 and loss > 0
    with pytest.raises(CrackSegError, match="expected the same classes"):
        Ensemble([models[0], several[0]])(images)
    sure = mean_logits([torch.full((1, 1, 1, 1), 300.0), torch.full((1, 1, 1, 1), -300.0)])
    assert sure.item() == pytest.approx(0, abs=1e-4)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory):
    model = make(5)
    return model, quantize_int8(
        model, [photos(2, 3, 64, 96), photos(1, 3, 50, 40, seed=1)], tmp_path_factory.mktemp("int8") / "mobile.onnx"
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("shape", [(2, 3, 64, 96), (1, 3, 75, 101), (3, 3, 33, 160), (1, 3, 32, 32)])
def test_int8_answers_like_the_model_at_any_size(mobile, shape):
    model, quantised = mobile
    assert 0 < relative_error(quantised, model, photos(*shape, seed=2)) < 0.12


# What decides about INT8 here is arithmetic, not the processor that runs the tests: only some of them cut sums off.


@pytest.mark.parametrize("shape", [(2, 3, 64, 96), (1, 3, 32, 32)])
def test_int8_is_right_in_exact_arithmetic_and_here(mobile, shape):
    model, quantised = mobile
    images = photos(*shape, seed=2)

    def exact(images):
        return torch.from_numpy(
            ReferenceEvaluator(str(quantised.path)).run(None, {compression.INPUT: images.numpy()})[0]
        )

    assert 0 < relative_error(exact, model, images) < 0.12
    assert relative_error(quantised, exact, images) < 0.04  # values between two steps may be rounded the other way


def sums_of_pairs(path, images):
    """Yield each dense convolution's integer weights, in a quantised file, and its sums of two neighbouring products.

    Processors without VNNI keep these sums in 16 bits. Neighbours are channels of one pixel, as ONNX Runtime lays maps
    out. It computes depthwise convolutions otherwise.
    """
    graph = onnx.load(path).graph
    values = ReferenceEvaluator(str(path)).run(None, {compression.INPUT: images.numpy()}, intermediate=True)
    values |= {constant.name: onnx.numpy_helper.to_array(constant) for constant in graph.initializer}
    integers = {node.output[0]: node.input for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        settings = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type != "Conv" or settings.get("group", 1) > 1:
            continue
        (pixels, _, zero), (weights, *_) = (integers[name] for name in node.input[:2])
        assert (values[pixels].dtype, values[weights].dtype) == (np.uint8, np.int8)
        top, left, bottom, right = settings["pads"]
        padded = F.pad(torch.tensor(values[pixels]).float(), (left, right, top, bottom), value=float(values[zero]))
        kernel = torch.tensor(values[weights]).float()
        columns = F.unfold(padded, kernel.shape[2:], settings["dilations"], stride=settings["strides"])
        columns = columns.unflatten(1, (kernel.shape[1], -1)).transpose(1, 2).flatten(1, 2)
        products = kernel.permute(0, 2, 3, 1).flatten(1)[:, :, None] * columns[:, None]
        yield kernel, torch.stack([pair.sum(2) for pair in products.split(2, dim=2)], dim=2)


def test_int8_sums_of_two_products_fit_16_bits(mobile):
    found = list(sums_of_pairs(mobile[1].path, photos(1, 3, 64, 96, seed=2)))
    assert len(found) == 5
    for kernel, sums in found:
        assert -(2**15) <= sums.min() and sums.max() < 2**15
        assert 2 * 255 * kernel.abs().max() < 2**15  # whatever the image
    eight_bits = [127 / 64 * sums for _, sums in found]
    assert sum((sums.abs() > 2**15).sum() for sums in eight_bits) > 1000  # so it matters


def test_int8_convolutions_are_integers(mobile):
    found = operators(mobile[1])
    convolutions = sum(isinstance(part, nn.Conv2d) for part in mobile[0].modules())
    assert found.loc["QLinearConv", "int8"] == convolutions
    assert not {"Conv", "BatchNormalization"} & set(found.index)


def test_int8_is_evaluated_as_the_model(mobile, data):
    model, quantised = mobile
    scores = [
        evaluate(network, val_loader(data), create_accelerator(torch.device("cpu")), create_loss("focal_dice"))[1]
        for network in mobile
    ]
    assert scores[1] == pytest.approx(scores[0], rel=0.1)
    assert not model.training and quantised.state_dict() == {}


def test_int8_follows_the_threads_of_torch(mobile):
    quantised, images = mobile[1], photos(1, 3, 64, 64)
    one = quantised(images)
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(quantised(images), one)
        assert quantised.threads == 2
    finally:
        torch.set_num_threads(1)


def test_quantising_leaves_the_model_and_needs_packages(mobile, tmp_path, monkeypatch):
    model = mobile[0]
    before, model.training = copy.deepcopy(model.state_dict()), True
    try:
        quantize_int8(model, [photos(2, 3, 64, 64)], tmp_path / "again.onnx")
    finally:
        was, model.training = model.training, False
    assert was and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]
    monkeypatch.setattr(compression.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(CrackSegError, match="found no package onnxruntime; expected pip install"):
        Int8Model(tmp_path / "again.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Optimized", "Original"])
def test_int8_deeplab_is_small_and_close(kind, tmp_path):
    config = getattr(deeplab_lite, f"DeepLab{kind}Config")(image_size=64, pretrained="false")
    torch.manual_seed(0)
    model = settle(getattr(deeplab_lite, f"DeepLab{kind}")(config))
    quantised = quantize_int8(model, [photos(2, 3, 64, 96, seed=seed) for seed in range(4)], tmp_path / "deeplab.onnx")
    assert quantised.path.stat().st_size < 0.3 * sum(value.nbytes for value in model.state_dict().values())
    for shape in ((2, 3, 64, 96), (1, 3, 75, 101)):
        assert relative_error(quantised, model, photos(*shape, seed=9)) < 0.2
    found = operators(quantised)
    assert found.loc["QLinearConv", "int8"] == sum(isinstance(part, nn.Conv2d) for part in model.modules())
    assert not {"Conv", "BatchNormalization"} & set(found.index)
