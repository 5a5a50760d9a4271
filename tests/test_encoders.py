"""Every encoder in a U-Net: it trains, takes any size, loads weights whole or not at all, computes what timm does."""

import copy

import pytest
import segmentation_models_pytorch
import timm
import torch
from images import photos
from safetensors.torch import load_file, save_file
from torch import nn

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.models import encoders, pretrained
from crackseg_nb.models.encoders import create_encoder, find_encoder
from crackseg_nb.models.layers import BatchNorm2d
from crackseg_nb.models.pretrained import load_pretrained, load_weights_file, plain_name
from crackseg_nb.models.registry import MODELS, count_flops, create_model
from crackseg_nb.models.settings import ENCODERS, UnetConfig
from crackseg_nb.models.unet import Unet
from crackseg_nb.runs.config import configure
from crackseg_nb.training.memory import enable_gradient_checkpointing

pytestmark = pytest.mark.usefixtures("one_thread")

FRIENDLY = [
    "swinv2",
    "convnext",
    "swin",
    "coatnet",
    "segformer",
    "maxvit",
    "resnet34",
    "mobilenet",
    "mobilenet_v2_same",
    "mobilenet_v3",
    "mobilenet_v3_small",
]
TINY = [
    "test_resnet",
    "test_coatnet",
    "test_convnext",
    "test_maxvit",
    "mit_b0",
    "mobilenet_v3_small",
]  # one of each kind, fast; without --slow the first two, of convolutions and of attention, stand for most properties
OTHERS = [
    "vgg11",
    "densenet121",
    "swinv2_cr_tiny_ns_224",
    "pvt_v2_b0",
    "twins_svt_small",
    "coatnet_rmlp_nano_rw_224",
    "maxvit_rmlp_pico_rw_256",
    "efficientnet_b0.ra_in1k",
]
DISTINCT = list({(entry.name, str(entry.options)): name for name, entry in reversed(ENCODERS.items())}.values())
SIZES = [(32, 32), (225, 225), (360, 360), (384, 384), (384, 544)]


def make(name, image_size=64, **settings):
    torch.manual_seed(0)
    return Unet(UnetConfig(name, image_size=image_size, pretrained="false", **settings))


def train_a_step(model, images):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    loss = nn.functional.binary_cross_entropy_with_logits(model(images), (images[:, :1] > 0.5).float())
    loss.backward()
    assert loss.isfinite()
    for part in (model.decoder, model.head):
        assert all(
            value.grad is not None and value.grad.isfinite().all() and value.grad.abs().sum() > 0
            for value in part.parameters()
        )
    assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in model.encoder.parameters())
    optimizer.step()


def predict(model, *sizes):
    model.eval()
    for height, width in sizes:
        with torch.no_grad():
            logits = model(photos(height, width))
        assert logits.shape == (1, model.config.num_classes, height, width)
        assert logits.isfinite().all()


@pytest.mark.slow  # the chapter of the U-Net builds each of them without its numbers
@pytest.mark.parametrize("name", FRIENDLY)
def test_every_friendly_encoder_trains_and_predicts(name):
    model = make(name)
    train_a_step(model, photos(64, 64, batch=2))
    predict(model, (32, 32), (75, 100))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", TINY)
def test_large_images_that_are_no_multiple_of_anything(name):
    predict(make(name), *SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DISTINCT, *OTHERS])
def test_every_encoder_at_every_size(name):
    model = make(name, image_size=384)
    train_a_step(model, photos(64, 96, batch=2))
    predict(model, *SIZES)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", OTHERS[-3:])
def test_any_timm_name_that_yields_falling_strides(name):
    assert find_encoder(name).family == "timm"
    model = make(name)
    train_a_step(model, photos(64, 64, batch=2))
    predict(model, (32, 32), (75, 100))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", TINY)
def test_batches_of_one_and_single_positions(name):
    model = make(name)
    train_a_step(model, photos(32, 32))
    model = make(name, image_size=32)
    train_a_step(model, photos(32, 32))
    predict(model, (32, 32), (97, 64))


@pytest.mark.parametrize("name", TINY)
def test_constant_images_and_padding(name):
    model = make(name).eval()
    with torch.no_grad():
        logits = model(torch.full((2, 3, 45, 70), 0.5))
        assert logits.isfinite().all() and torch.equal(logits[0], logits[1])
        images, multiple = photos(45, 70), model.encoder.multiple
        rows, columns = (torch.arange(side + -side % multiple).clamp(max=side - 1) for side in (45, 70))
        assert torch.equal(
            model(images), model(images[..., rows, :][..., columns])[..., :45, :70]
        )  # the border is repeated at the right and bottom


@pytest.mark.few(2)
@pytest.mark.parametrize("name", TINY + ["swin"])
def test_other_sizes_leave_no_trace(name):
    model = make(name).eval()
    keys, images = list(model.state_dict()), photos(64, 64)
    with torch.no_grad():
        first = model(images)
        model(photos(96, 128))
        assert torch.equal(model(images), first)
    assert list(model.state_dict()) == keys
    with torch.inference_mode():
        model(photos(96, 64))
    train_a_step(model, photos(96, 64, batch=2))  # what inference made cannot be trained with


@pytest.mark.few(2)
@pytest.mark.parametrize("name", TINY)
def test_state_goes_into_another_model(name, tmp_path):
    model = make(name)
    train_a_step(model, photos(64, 64, batch=2))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = Unet(UnetConfig(name, image_size=64, pretrained="false"))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    images = photos(50, 80)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), other.eval()(images))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(images), model(images))
    encoder = create_encoder(name, 64)  # a model of the study is a source of weights, too
    load_weights_file(encoder, tmp_path / "model.safetensors")
    assert all(
        torch.equal(value, model.encoder.body.state_dict()[key]) for key, value in encoder.body.state_dict().items()
    )


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name",
    [
        "coatnet_0_rw_224",
        "coatnet_rmlp_nano_rw_224",
        "test_maxvit",
        "swin_tiny_patch4_window7_224",
        "test_convnext",
        "resnet34",
    ],
)
def test_at_its_built_size_an_encoder_is_timms_network(name):
    encoder = create_encoder(name, 96)
    expected = timm.create_model(name, **encoders.size_options(name, 96), num_classes=0).eval()
    found = {plain_name(key): value for key, value in encoder.body.state_dict().items()}
    state = expected.state_dict()
    expected.load_state_dict({**state, **{key: found[plain_name(key)] for key in state if plain_name(key) in found}})
    images = photos(96, 96, batch=2)
    with torch.no_grad():
        ours = encoder.eval()(images)
        theirs = expected.forward_intermediates(images, intermediates_only=True)
    assert len(theirs) == len(ours)
    for level, other in zip(ours, theirs):
        assert torch.equal(level, other)


def test_an_offset_keeps_its_bias_at_every_size():
    attention = next(
        part
        for part in create_encoder("test_coatnet", 128).body.modules()
        if isinstance(getattr(part, "rel_pos", None), encoders.AnySizeBias)
    )
    table = attention.rel_pos.relative_position_bias_table.view(
        15, 15, -1
    )  # 128 pixels at stride 16: offsets from -7 to 7

    def bias(height, width):
        attention(torch.rand(1, attention.qkv.in_channels, height, width))
        return attention.rel_pos.get_bias()[0].unflatten(2, (height, width)).unflatten(1, (height, width))

    for height, width in ((8, 8), (3, 5), (12, 20)):
        values = bias(height, width)
        for row, column, other_row, other_column in (
            torch.randint(0, 60, (100, 4)).remainder(torch.tensor([height, width, height, width])).tolist()
        ):
            down, right = max(-7, min(7, row - other_row)), max(-7, min(7, column - other_column))
            assert torch.equal(values[:, row, column, other_row, other_column], table[7 + down, 7 + right])


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [*TINY, "swinv2", "hrnet_w18_small", "cspnext_tiny"])
def test_recomputed_activations_give_the_same_gradients(name):
    model, images = make(name, drop_path_rate=0.0).train(), photos(64, 64, batch=2)
    model(images).square().mean().backward()
    expected = [value.grad.clone() for value in model.parameters()]
    model.zero_grad()
    if name in ("mit_b0", "hrnet_w18_small"):
        for function in (enable_gradient_checkpointing, Unet.set_grad_checkpointing):
            with pytest.raises(
                CrackSegError, match=r"^gradient_checkpointing: [^\n]*cannot recompute its blocks[^\n]*$"
            ):
                function(model)
        return model.set_grad_checkpointing(False)
    enable_gradient_checkpointing(model)
    calls, deepest = [], list(model.encoder.body.modules())[-1]
    deepest.register_forward_hook(lambda *_: calls.append(1))
    model(images).square().mean().backward()
    for value, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(value.grad, gradient)
    assert any(module.__dict__.get("grad_checkpointing") for module in model.encoder.modules())


@pytest.mark.few(2)
@pytest.mark.parametrize("name", TINY)
def test_memory_format_and_bf16(name):
    model, images = make(name, drop_path_rate=0.0).eval(), photos(64, 96, batch=2)
    with torch.no_grad():
        expected = model(images)
    model, images = model.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.train()(images)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())


def test_batch_norms_are_replaced_and_nothing_else():
    for name in ("resnet34", "mobilenet", "maxvit"):
        kinds = {type(part) for part in create_encoder(name, 64).body.modules() if isinstance(part, nn.BatchNorm2d)}
        assert kinds <= {BatchNorm2d, encoders.BatchNormAct2d} and kinds
    expected, ours = timm.layers.BatchNormAct2d(4), timm.layers.BatchNormAct2d(4)
    encoders.accept_any_size(nn.Sequential(ours))
    features = torch.rand(2, 4, 3, 3)
    assert torch.equal(ours(features), expected(features)) and torch.equal(ours.running_var, expected.running_var)
    before = ours.running_mean.clone()
    single = torch.tensor([-1.0, 0.2, 1.0, 5.0]).view(1, 4, 1, 1)
    assert torch.equal(ours(single), expected.eval()(single)) and torch.equal(ours.running_mean, before)


# Weights


@pytest.fixture
def weights_file(data_folder):
    files = sorted((data_folder.parent / "weights").glob("mobilenetv2_100*padsame.safetensors"))
    if not files:
        pytest.skip("no weights beside CRACKSEG_DATA")
    return files[0]


@pytest.mark.real_data
def test_real_weights_change_the_encoder_and_compute_what_timm_computes(weights_file):
    fresh = create_encoder("mobilenet_v2_same", 224)
    model = Unet(UnetConfig("mobilenet_v2_same", image_size=224, pretrained=str(weights_file))).eval()
    assert model.weights == {"requested": str(weights_file), "loaded": str(weights_file)}
    assert not torch.equal(fresh.body.conv_stem.weight, model.encoder.body.conv_stem.weight)
    whole = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    whole.load_state_dict(load_file(weights_file))
    images = photos(224, 224)
    with torch.no_grad():
        levels = model.encoder(images)
        for level, other in zip(levels, whole.forward_intermediates(images, intermediates_only=True), strict=True):
            assert torch.equal(level, other)
        plain = create_encoder("mobilenet_v2", 224).eval()
        load_pretrained(plain, weights_file)
        assert not torch.allclose(plain(images)[-1], levels[-1], atol=0.1)  # the padding is part of what was trained


@pytest.mark.real_data
def test_real_weights_fit_no_other_network(weights_file, tmp_path):
    for name in ("mobilenet_v3", "resnet34", "mit_b0", "mobilenetv2_110d"):
        encoder = create_encoder(name, 64)
        before = copy.deepcopy(encoder.body.state_dict())
        with pytest.raises(
            CrackSegError, match=rf"^pretrained: [^\n]* tensors of {encoder.architecture}, first [^\n]*$"
        ):
            load_pretrained(encoder, weights_file)
        assert all(torch.equal(value, before[key]) for key, value in encoder.body.state_dict().items())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights_file.read_bytes()[:-100])
    with pytest.raises(CrackSegError, match=r"^pretrained: [^\n]*no readable weights[^\n]*$"):
        load_pretrained(create_encoder("mobilenet"), cut)


def test_a_network_inside_a_larger_one_is_not_taken_for_it(tmp_path):
    save_file(timm.create_model("resnet34").state_dict(), tmp_path / "resnet34.safetensors")
    with pytest.raises(CrackSegError, match=r"tensors that resnet18 lacks, first [^\n]*$"):
        load_weights_file(create_encoder("resnet18"), tmp_path / "resnet34.safetensors")
    load_weights_file(create_encoder("resnet34"), tmp_path / "resnet34.safetensors")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_coatnet", "test_maxvit", "test_efficientnet", "mobilenet_v3", "swin"]
)
def test_whole_networks_are_files_of_weights(name, tmp_path):
    encoder = create_encoder(name, 64)
    whole = timm.create_model(encoder.architecture, **encoders.size_options(encoder.architecture, 64))
    save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    load_weights_file(encoder, tmp_path / "whole.safetensors")
    images = photos(64, 64)
    with torch.no_grad():
        assert torch.equal(
            encoder.eval()(images)[-1], whole.eval().forward_intermediates(images, intermediates_only=True)[-1]
        )


def test_tables_of_another_size_are_refused(tmp_path):
    for name in ("test_coatnet", "test_maxvit", "swin"):  # Swin's last window shrinks to the map
        save_file(create_encoder(name, 256).body.state_dict(), tmp_path / f"{name}.safetensors")
        with pytest.raises(CrackSegError, match=r"^pretrained: [^\n]*built for 64 pixels$"):
            load_weights_file(create_encoder(name, 64), tmp_path / f"{name}.safetensors")


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["swin", "coatnet_nano_rw_224", "maxvit_nano_rw_256", "resnet18"])
def test_published_weights_come_through_timm(name, monkeypatch):
    torch.manual_seed(1)
    published = timm.create_model(find_encoder(name).name)
    monkeypatch.setattr(pretrained, "hub_reason", lambda *_: None)
    monkeypatch.setattr(
        timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: copy.deepcopy(published.state_dict())
    )
    encoder = create_encoder(name, 96)
    report = load_pretrained(encoder, "true")
    assert report["loaded"].startswith("timm/")
    expected = {plain_name(key): value for key, value in published.state_dict().items()}
    same = [
        torch.equal(value, expected[plain_name(key)])
        for key, value in encoder.body.state_dict().items()
        if value.shape == expected[plain_name(key)].shape
    ]
    assert all(same) and len(same) > 0.8 * len(encoder.body.state_dict())  # timm fits position tables to the size


def test_published_weights_of_segformer_come_through_smp(monkeypatch, tmp_path):
    published = create_encoder("mit_b0").body.state_dict()
    save_file(
        {**published, "head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)},
        tmp_path / "model.safetensors",
    )
    monkeypatch.setattr(pretrained, "hub_reason", lambda *_: None)
    monkeypatch.setattr(
        segmentation_models_pytorch.encoders, "hf_hub_download", lambda *_, filename, **__: tmp_path / filename
    )
    encoder = create_encoder("mit_b0")
    assert load_pretrained(encoder, "true")["loaded"] == "smp-hub/mit_b0.imagenet"
    assert all(torch.equal(value, published[key]) for key, value in encoder.body.state_dict().items())
    load_weights_file(create_encoder("mit_b0"), tmp_path / "model.safetensors")
    with pytest.raises(CrackSegError, match="tensors of mit_b1"):
        load_weights_file(create_encoder("mit_b1"), tmp_path / "model.safetensors")


def test_without_a_hub_auto_says_so_and_true_fails(monkeypatch, caplog):
    monkeypatch.setattr(pretrained, "hub_reason", lambda *_: "the moon is in the way")
    monkeypatch.setattr(encoders.logger, "propagate", True)
    for name in ("coatnet", "mit_b0", "resnet18"):
        with pytest.raises(CrackSegError, match=r"^pretrained: the weights [^\n]*can't be had: the moon[^\n]*$"):
            load_pretrained(create_encoder(name, 64), "true")
        assert load_pretrained(create_encoder(name, 64), "auto")["loaded"] == "from scratch"
    assert caplog.text.count("TRAINING FROM SCRATCH") == 3


# Names and settings


@pytest.mark.parametrize(
    "name, message",
    [
        ("convnxt", "did you mean 'convnext'"),
        ("SwinV2-tiny", "did you mean 'swinv2_tiny'"),
        ("resnet-50", "did you mean 'resnet50'"),
        ("", "expected one of"),
        ("mit_b9", "did you mean 'mit_b"),
        ("vit_base_patch16_224", "at stride 16;"),
        ("levit_128", "at stride 16, 32, 64;"),
        ("hiera_tiny_224", "every size"),
        ("hf-hub:timm/resnet18", "expected one of"),
        ("resnet18.", "did you mean"),
        ("convnext_tiny.nonsense", "did you mean"),
        ("inception_v3", "every size"),
        ("mvitv2_tiny", "at 256x320"),
    ],
)
def test_wrong_encoders_are_refused_in_one_line(name, message):
    for function in (create_encoder, lambda name: configure(encoder=name)):
        with pytest.raises(CrackSegError) as error:
            function(name)
        assert (
            message in str(error.value)
            and str(error.value).startswith("encoder: found")
            and "\n" not in str(error.value)
        )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"image_size": 31}, "image_size: found 31"),
        ({"num_classes": 0}, "num_classes: found 0"),
        ({"unet_channels": (8, 8, 8)}, "expected five widths"),
        ({"unet_channels": (8, 8, 8, 8, 0)}, "unet_channels: found 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: found 1.0"),
        ({"prior": -0.1}, "prior: found -0.1"),
        ({"prior": 0.1, "num_classes": 2}, "prior: found 0.1 with 2 classes"),
        ({"pretrained": "imagenet"}, "found no file imagenet"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(CrackSegError) as error:
        UnetConfig(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_prior_and_classes():
    model = make("test_resnet", prior=0.05).eval()
    nn.init.zeros_(model.head[0].weight)
    with torch.no_grad():
        torch.testing.assert_close(model(photos(64, 64)).sigmoid(), torch.full((1, 1, 64, 64), 0.05))
    predict(make("test_resnet", num_classes=16), (50, 60))
    with pytest.raises(CrackSegError, match="images: found 31x64, expected at least 32x32"):
        model(photos(31, 64))


def test_a_fresh_decoder_begins_as_smps_does():
    decoder = make("test_resnet").decoder
    for conv in (
        part for part in decoder.modules() if isinstance(part, nn.Conv2d)
    ):  # He et al. 2015, uniform; PyTorch's own is 2.4 times narrower
        assert 0.95 < conv.weight.abs().max() * (conv.weight[0].numel() / 6) ** 0.5 <= 1


def test_drop_path_is_used_and_missed(caplog, monkeypatch):
    monkeypatch.setattr(encoders.logger, "propagate", True)
    for name in ("convnext", "resnet34", "swin", "coatnet", "mobilenet", "mit_b0"):
        with torch.device("cpu" if name == "mit_b0" else "meta"):
            encoder = create_encoder(name, 64, drop_path_rate=0.3)
        rates = {part.drop_prob for part in encoder.body.modules() if hasattr(part, "drop_prob")}
        assert max(rates) == pytest.approx(0.3, abs=0.03), name
    assert not caplog.text
    create_encoder("dla46_c", 64, drop_path_rate=0.3)
    assert "drop_path_rate has no effect" in caplog.text


def test_settings_of_all_families_share_their_types():
    names = {name: kind for config_class, _ in MODELS.values() for name, kind in config_class.__annotations__.items()}
    for config_class, _ in MODELS.values():
        assert all(names[name] == kind for name, kind in config_class.__annotations__.items())
    assert isinstance(create_model("unet", encoder="test_resnet", pretrained="false"), Unet)


def test_flops_of_a_convolution_and_of_attention():
    assert count_flops(nn.Conv2d(3, 5, 3, padding=1), (7, 11)) == 2 * 3 * 9 * 5 * 7 * 11
    model = make("test_coatnet")
    model.decoder.eval()
    modes = [part.training for part in model.modules()]
    found = count_flops(model, (64, 96))
    assert [part.training for part in model.modules()] == modes
    assert (
        count_flops(model.to("meta"), (64, 96)) == found
    )  # fused attention on the CPU is counted like matrix products
