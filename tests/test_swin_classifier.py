"""The Swin classifier: timm's network with any layout and at any size, and an encoder for the segmentation models."""

import itertools

import pytest
import timm
import torch
from images import photos
from torch import nn

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.models.encoders import create_encoder
from crackseg_nb.models.pretrained import plain_name
from crackseg_nb.models.settings import (
    SWIN_ENCODERS,
    SWINV2_ENCODERS,
    SwinClassifierConfig,
    SwinV2HybridConfig,
    swin_layout,
)
from crackseg_nb.models.swin_classifier import SwinClassifier
from crackseg_nb.training.memory import enable_gradient_checkpointing
from crackseg_nb.training.optim import parameter_groups, undecayed_names
from crackseg_nb.training.settings import OptimConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dict(
    image_size=64,
    num_classes=7,
    pretrained="false",
    embed_dim=16,
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 4, 8),
    drop_path_rate=0.0,
)
VERSIONS = ["swin_tiny", "swinv2_tiny"]


def make(encoder="swin_tiny", **settings):
    torch.manual_seed(0)
    return SwinClassifier(SwinClassifierConfig(encoder, **TINY | settings))


@pytest.mark.parametrize("name", ["swin_small", "swin_base", "swinv2", "swinv2_small", "swinv2_base_window16"])
def test_a_name_and_its_layout_build_the_same_network(name):
    def built(**options):
        with torch.device("meta"):
            network = timm.create_model(SWIN_ENCODERS[name], num_classes=0, **options)
        return {key: value.shape for key, value in network.state_dict().items()}, [
            block.window_size for stage in network.layers for block in stage.blocks
        ]

    assert built() == built(**swin_layout(name))


@pytest.mark.parametrize("name", ["swin_tiny", "swinv2_tiny"])
def test_the_published_sizes_compute_what_timm_computes(name):
    size = 224 if name == "swin_tiny" else 256
    whole = timm.create_model(SWIN_ENCODERS[name], num_classes=11).eval()
    for value in whole.parameters():
        if value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    model = SwinClassifier(SwinClassifierConfig(name, image_size=size, num_classes=11, pretrained="false")).eval()
    theirs = {plain_name(key): value for key, value in whole.state_dict().items()}
    model.encoder.body.load_state_dict({key: theirs[plain_name(key)] for key in model.encoder.body.state_dict()})
    for part, other in ((model.norm, whole.norm), (model.head, whole.head.fc)):
        part.load_state_dict(other.state_dict())
    images = photos(size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), whole(images), atol=1e-4, rtol=1e-4)


def test_every_position_is_normalised_before_the_mean():
    class Deepest(nn.Module):
        def forward(self, images):
            return [10 * torch.arange(2 * 128 * 15).view(2, 128, 3, 5).sin().cumsum(-1)]

    model = make().eval()
    nn.init.normal_(model.norm.weight)
    whole = timm.create_model(SWIN_ENCODERS["swin_tiny"], num_classes=7, img_size=64, **model.encoder.options).eval()
    for part, other in ((model.norm, whole.norm), (model.head, whole.head.fc)):
        other.load_state_dict(part.state_dict())
    model.encoder = Deepest()
    features, images = model.encoder(None)[0], photos(64, 64, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(model(images), whole.forward_head(whole.norm(features.permute(0, 2, 3, 1))))
        assert not torch.allclose(model(images), model.head(model.norm(features.mean((2, 3)))), atol=0.01)


@pytest.mark.parametrize("name, image_size", list(itertools.product(VERSIONS, [32, 33, 96])))
def test_any_size_gives_finite_logits_and_gradients(name, image_size):
    model = make(name, image_size=image_size, window_size=16).train()
    for height, width in ((32, 32), (33, 47), (64, 64), (130, 70)):
        logits = model(photos(height, width, batch=2))
        assert logits.shape == (2, 7) and logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.tensor([1, 6])).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("name", VERSIONS)
def test_padding_to_whole_patches_repeats_the_border(name):
    model, images = make(name).eval(), photos(61, 64, batch=2)
    padded = torch.cat([images, images[:, :, -1:].expand(-1, -1, 3, -1)], dim=2)
    with torch.no_grad():
        assert torch.equal(model(images), model(padded))


def test_settings_reach_the_network():
    model = make("swinv2_small", window_size=4, drop_path_rate=0.3)
    blocks = [part for part in model.encoder.modules() if hasattr(part, "shift_size")]
    assert len(blocks) == 5 and model.encoder.channels == (16, 32, 64, 128)
    assert [block.window_size[0] for block in blocks] == [4, 4, 4, 4, 2]
    assert [block.attn.num_heads for block in blocks] == [1, 2, 2, 4, 8]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.075, 0.15, 0.225, 0.3])
    assert model.head.out_features == 7 and model.head.bias.abs().sum() == 0 and 0.015 < model.head.weight.std() < 0.025
    assert any("logit_scale" in name for name in model.state_dict()) and not any(
        "logit_scale" in name for name in make().state_dict()
    )


def test_only_published_layouts_have_published_weights():
    with torch.device("meta"):
        model = SwinClassifier(
            SwinClassifierConfig("swin_tiny", image_size=64, pretrained="false", **swin_layout("swin_tiny"))
        )
    assert model.encoder.options == {}
    with pytest.raises(
        CrackSegError,
        match=r"^pretrained: no weights of swin_tiny_patch4_window7_224 with embed_dim=16[^\n]* are published",
    ):
        make(pretrained="true")
    assert make(pretrained="auto").weights == {"requested": "auto", "loaded": "from scratch"}


@pytest.mark.parametrize("name", ["swin_small", "swin_base", "swinv2_base_window16"])
def test_encoders_are_those_of_the_segmentation_models(name):
    with torch.device("meta"):
        ours = SwinClassifier(SwinClassifierConfig(name, image_size=96, pretrained="false")).encoder
        theirs = create_encoder(name if name in SWINV2_ENCODERS else SWIN_ENCODERS[name], 96)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize("name", VERSIONS)
def test_biases_norms_and_position_tables_are_not_decayed(name):
    model = make(name)
    exempt = undecayed_names(model)
    for key, value in model.named_parameters():
        free = value.ndim == 1 or any(
            word in key for word in ("relative_position_bias_table", "logit_scale", "cpb_mlp")
        )
        assert (key in exempt) == free, key
    groups = {group["name"]: group for group in parameter_groups(model, OptimConfig(weight_decay=0.05))}
    assert groups.keys() == {"encoder_decay", "encoder_no_decay", "decoder_decay", "decoder_no_decay"}
    assert groups["encoder_no_decay"]["weight_decay"] == groups["decoder_no_decay"]["weight_decay"] == 0
    assert [tuple(value.shape) for value in groups["decoder_decay"]["params"]] == [(7, 128)]


@pytest.mark.parametrize("name", VERSIONS)
def test_recomputed_activations_give_the_same_gradients(name):
    gradients = []
    for recompute in (False, True):
        model = make(name).train()
        if recompute:
            assert enable_gradient_checkpointing(model)
        nn.functional.cross_entropy(model(photos(64, 64, batch=2)), torch.tensor([1, 6])).backward()
        gradients.append([value.grad for value in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"encoder": "swin_tinny"}, "encoder: found 'swin_tinny' \\(did you mean 'swin_tiny'"),
        ({"encoder": "resnet34"}, "encoder: found 'resnet34'"),
        ({"image_size": 31}, "image_size: found 31"),
        ({"num_classes": 1}, "num_classes: found 1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: found 1.0"),
        ({"embed_dim": -96}, "embed_dim: found -96"),
        ({"embed_dim": 97}, "num_heads: found 3 heads for the 97 channels of stage 1"),
        ({"num_heads": (3, 6, 12, 25)}, "num_heads: found 25 heads for the 768 channels of stage 4"),
        ({"num_heads": (3, 6)}, "num_heads: found \\(3, 6\\), expected four"),
        ({"depths": (2, 2, 6, 2, 2)}, "depths: found [^:]*, expected four numbers"),
        ({"depths": "big"}, "depths: found 'big', expected four"),
        ({"depths": (2, 2, 0, 2)}, "depths: found 0"),
        ({"depths": (2, 2, 1.5, 2)}, "depths: found 1.5"),
        ({"window_size": 1}, "window_size: found 1"),
        ({"window_size": -7}, "window_size: found -7"),
        ({"pretrained": "imagenet"}, "found no file imagenet"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(CrackSegError, match=rf"^(pretrained: )?{message}[^\n]*$"):
        SwinClassifierConfig(**settings)


def test_shared_settings_keep_their_types():
    kinds = SwinClassifierConfig.__annotations__
    assert {name: kinds[name] for name in ("encoder", "pretrained", "image_size", "num_classes", "drop_path_rate")} == {
        "encoder": str,
        "pretrained": str,
        "image_size": int,
        "num_classes": int,
        "drop_path_rate": float,
    }
    for name, kind in SwinV2HybridConfig.__annotations__.items():
        assert kinds.get(name, kind) == kind
