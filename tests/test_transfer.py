"Transfer of weights: whole or not at all, with a true report, between all models of the study and from others' files."

import copy
import json
import re

import pytest
import timm
import torch
from images import photos
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_simple
from torch import nn

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml, write_yaml
from crackseg_nb.models.encoders import create_encoder
from crackseg_nb.models.pretrained import plain_name
from crackseg_nb.models.settings import SwinClassifierConfig, SwinV2HybridConfig, UnetConfig
from crackseg_nb.models.swin_classifier import SwinClassifier
from crackseg_nb.models.swinv2_hybrid import SwinV2Hybrid
from crackseg_nb.models.unet import Unet
from crackseg_nb.training.checkpoint import save_checkpoint
from crackseg_nb.training.weights import load_encoder_weights, load_model_weights, resize_table

pytestmark = pytest.mark.usefixtures("one_thread")


def scrambled(model, seed=0):
    "Replace all weights of `model`, and the running statistics, by values that no fresh model has."
    generator = torch.Generator().manual_seed(seed)
    for value in (*model.parameters(), *model.buffers()):
        if value.dtype == torch.float32 and value.requires_grad:
            nn.init.normal_(value, std=0.2, generator=generator)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(generator=generator)
        if name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
    return model.eval()


def classifier(encoder="swinv2_tiny", seed=0, **settings):
    small = dict(
        image_size=64,
        num_classes=5,
        pretrained="false",
        embed_dim=16,
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        drop_path_rate=0.0,
    )
    return scrambled(SwinClassifier(SwinClassifierConfig(encoder, **small | settings)), seed)


def unet(encoder, seed=0, **settings):
    return scrambled(Unet(UnetConfig(encoder, **dict(image_size=64, pretrained="false") | settings)), seed)


def saved(model, folder, name="source.safetensors"):
    save_file(model.state_dict(), folder / name)
    return folder / name


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def refused(load, model, source, message):
    "Expect one line that matches `message`, and that nothing has changed."
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CrackSegError) as error:
        load(model, source)
    assert "\n" not in str(error.value) and re.search(message, str(error.value)), str(error.value)
    assert not changed(model, before)


# Sources


def test_a_run_gives_its_best_checkpoint_and_else_its_newest(tmp_path):
    models = [classifier(seed=seed) for seed in range(3)]
    run = tmp_path / "run"
    for name, model in zip(("best", "epoch_0001", "epoch_0002"), models):
        save_checkpoint(run / "checkpoints", name, model.state_dict(), {"epoch": 1})

    def source_of(source):
        model = classifier(seed=7)
        load_encoder_weights(model, source)
        return next(
            index for index, other in enumerate(models) if not changed(model.encoder, other.encoder.state_dict())
        )

    assert source_of(run) == source_of(str(run)) == source_of(run / "checkpoints") == 0
    assert source_of(run / "checkpoints" / "epoch_0001") == source_of(run / "checkpoints" / "epoch_0001.json") == 1
    (run / "checkpoints" / "best.json").unlink()
    assert source_of(run) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "weights gone", "no checkpoint", "no folder"])
def test_damaged_runs_are_refused(tmp_path, damage):
    run, model = tmp_path / "run", classifier()
    save_checkpoint(run / "checkpoints", "best", model.state_dict())
    weights = next((run / "checkpoints").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    match damage:
        case "cut":
            weights.write_bytes(data[:-4])
        case "flipped":
            weights.write_bytes(data)
        case "weights gone":
            weights.unlink()
        case "no checkpoint":
            (run / "checkpoints" / "best.json").unlink()
        case "no folder":
            run = tmp_path / "rum"
    for load in (load_encoder_weights, load_model_weights):
        refused(load, classifier(seed=1), run, "expected")


class Attack:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('code_ran').touch()",)


def test_files_that_are_no_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = saved(classifier(), tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"model": {"encoder.body.x": Attack()}}, tmp_path / "attack.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    torch.save(classifier().state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-5000])
    for name, message in (
        ("cut.safetensors", "no readable weights"),
        ("empty.safetensors", "no readable weights"),
        ("text.pt", "found"),
        ("attack.pt", "pickle that needs code"),
        ("numbers.pth", "other things than tensors"),
        ("cut.pth", "no readable torch file"),
    ):
        for load in (load_encoder_weights, load_model_weights):
            refused(load, classifier(seed=1), tmp_path / name, message)
    assert not (tmp_path / "code_ran").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {f"module.{name}": value for name, value in state.items()},
    ],
)
def test_torch_files_of_tensors_are_read(tmp_path, wrap):
    source, model = classifier(), classifier(seed=1)
    torch.save(wrap(source.state_dict()), tmp_path / "source.pth")
    load_encoder_weights(model, tmp_path / "source.pth")
    assert not changed(model.encoder, source.encoder.state_dict())


# What is taken over


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "test_maxvit", "test_coatnet", "mobilenet_v3_small", "mit_b0"]
)
def test_encoders_of_every_kind_go_from_model_to_model(tmp_path, name):
    source, model = unet(name, num_classes=4), unet(name, seed=1)
    before = copy.deepcopy(model.state_dict())
    report = load_encoder_weights(model, saved(source, tmp_path))
    with torch.no_grad():
        for level, expected in zip(model.encoder(photos(64, 64)), source.encoder(photos(64, 64)), strict=True):
            assert torch.equal(level, expected)
    assert (
        report.share == 1
        and not report.of("left", "resized")
        and all(key.startswith("encoder.") for key in changed(model, before))
    )
    outside = [key for key in source.state_dict() if not key.startswith("encoder.")]
    assert sorted(fate.name for fate in report.of("ignored")) == sorted(outside)


@pytest.mark.parametrize("name", ["test_resnet", "test_maxvit", "mobilenet_v3_small", "swin"])
def test_whole_networks_of_timm_are_sources(tmp_path, name):
    encoder = create_encoder(name, 224)
    whole = scrambled(timm.create_model(encoder.architecture))
    report = load_encoder_weights(encoder, saved(whole, tmp_path))
    theirs = {plain_name(key): value for key, value in whole.state_dict().items()}
    resized = {fate.name for fate in report.of("resized")}
    assert (
        report.share == 1
        and all(fate.why == "not of the encoder" for fate in report.of("ignored"))
        and report.of("ignored")
    )
    assert all(
        torch.equal(value, theirs[plain_name(key)])
        for key, value in encoder.body.state_dict().items()
        if key not in resized
    )


def test_the_encoder_alone_is_a_source_and_a_target(tmp_path):
    source, encoder = classifier(), classifier(seed=1).encoder
    for part, name in ((source.encoder, "encoder"), (source.encoder.body, "body")):
        report = load_encoder_weights(encoder, saved(part, tmp_path, f"{name}.safetensors"))
        assert report.share == 1 and not report.of("ignored") and not changed(encoder, source.encoder.state_dict())
        encoder = classifier(seed=1).encoder


def test_a_classifier_trains_the_hybrids_encoder(tmp_path):
    source = classifier(embed_dim=0, depths=(), num_heads=(), image_size=96)
    hybrid = SwinV2Hybrid(SwinV2HybridConfig("swinv2_tiny_window16", image_size=64, pretrained="false")).eval()
    before = copy.deepcopy(hybrid.state_dict())
    report = load_encoder_weights(hybrid, saved(source, tmp_path))
    assert (
        report.share == 1
        and not report.of("resized", "left")
        and {name.split(".")[0] for name in changed(hybrid, before)} == {"encoder"}
    )
    for name, value in hybrid.encoder.named_parameters():
        assert torch.equal(value, source.encoder.get_parameter(name))
    with torch.no_grad():
        assert hybrid(photos(75, 100)).isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda **settings: classifier("swin_tiny", **settings),
        lambda **settings: unet("test_maxvit", **settings),
        lambda **settings: unet("test_coatnet", **settings),
    ],
    ids=["swin", "maxvit", "coatnet"],
)
@pytest.mark.parametrize("sizes", [(64, 224), (224, 64)])
def test_tables_are_resized_as_timm_does(tmp_path, make, sizes):
    source, model = make(image_size=sizes[0]), make(image_size=sizes[1], seed=1)
    report = load_encoder_weights(model, saved(source, tmp_path))
    assert report.share == 1 and report.of("resized")
    for name, value in model.encoder.body.state_dict().items():
        expected = source.encoder.body.state_dict()[name]
        if name in {fate.name for fate in report.of("resized")}:
            sides = value.shape[1:] if value.ndim == 3 else [round(len(value) ** 0.5)] * 2
            expected = resize_rel_pos_bias_table_simple(expected, [(side + 1) // 2 for side in sides], value.shape)
        assert torch.equal(value, expected), name
    with torch.no_grad():
        assert all(level.isfinite().all() for level in model.encoder(photos(64, 64)))


@pytest.mark.parametrize("old, new", [(1, 7), (7, 1), (2, 12), (12, 2), (7, 7)])
def test_a_table_of_every_window(old, new):
    table = torch.randn((2 * old - 1) ** 2, 3)
    resized = resize_table(table, ((2 * new - 1) ** 2, 3))
    assert resized.isfinite().all() and resized.shape == ((2 * new - 1) ** 2, 3)
    if old == new:
        assert torch.equal(resized, table)
    level = resize_table(torch.full_like(table, 0.7), ((2 * new - 1) ** 2, 3))
    torch.testing.assert_close(level, torch.full_like(level, 0.7))


def test_a_deeper_encoder_takes_over_what_there_is(tmp_path):
    source, model = classifier(), classifier(seed=1, depths=(1, 1, 3, 1))
    before = copy.deepcopy(model.state_dict())
    report = load_encoder_weights(model, saved(source, tmp_path))
    left = {fate.name for fate in report.of("left")}
    assert left == {name for name in model.encoder.body.state_dict() if name.startswith("layers_2.blocks.2.")}
    assert changed(model, before) == {f"encoder.body.{name}" for name in model.encoder.body.state_dict()} - {
        f"encoder.body.{name}" for name in left
    }
    assert "first left 'layers_2.blocks.2." in report.describe() and "(missing)" in report.describe()


def test_the_report_counts_right_and_goes_into_yaml(tmp_path):
    source, model = classifier("swin_tiny"), classifier("swin_tiny", seed=1, depths=(1, 1, 3, 1), image_size=128)
    report = load_encoder_weights(model, saved(source, tmp_path))
    state = model.encoder.body.state_dict()
    counts = {
        kind: {"tensors": len(report.of(kind)), "values": sum(state[fate.name].numel() for fate in report.of(kind))}
        for kind in ("loaded", "resized", "left")
    }
    assert sum(count["tensors"] for count in counts.values()) == len(state)
    assert sum(count["values"] for count in counts.values()) == sum(value.numel() for value in state.values())
    assert report.share == pytest.approx(1 - counts["left"]["values"] / sum(value.numel() for value in state.values()))
    told = report.as_dict()
    assert (
        {kind: told[kind] for kind in counts} == counts
        and told["ignored"] == {"tensors": 4}
        and told["source"] == str(tmp_path / "source.safetensors")
    )
    write_yaml(tmp_path / "report.yaml", told)
    assert read_yaml(tmp_path / "report.yaml") == told == json.loads(json.dumps(told))
    assert "\n" not in report.describe() and len(report.table()) == len(state) + 4
    assert list(report.table().columns) == ["name", "fate", "why", "expected", "found"]


def test_buffers_that_older_files_hold_are_not_loaded(tmp_path):
    source, model = classifier(), classifier(seed=1)
    extra = {
        f"encoder.body.{name}": value.contiguous()
        for name, value in source.encoder.body.named_buffers()
        if value is not None
    }
    assert extra
    save_file(
        {**source.state_dict(), **{name: torch.full_like(value, 3) for name, value in extra.items()}},
        tmp_path / "old.safetensors",
    )
    report = load_encoder_weights(model, tmp_path / "old.safetensors")
    assert {fate.why for fate in report.of("ignored")} == {"computed", "not of the encoder"} and report.share == 1
    with torch.no_grad():
        assert torch.equal(model.encoder(photos(64, 64))[-1], source.encoder(photos(64, 64))[-1])


@pytest.mark.real_data
def test_real_weights_of_imagenet(data_folder):
    files = sorted((data_folder.parent / "weights").glob("mobilenetv2_100*padsame.safetensors"))
    if not files:
        pytest.skip("no weights beside CRACKSEG_DATA")
    model = Unet(UnetConfig("mobilenet_v2_same", image_size=64, pretrained="false")).eval()
    report = load_encoder_weights(model, files[0])
    whole = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    whole.load_state_dict(load_file(files[0]))
    with torch.no_grad():
        for level, expected in zip(
            model.encoder(photos(224, 224)),
            whole.forward_intermediates(photos(224, 224), intermediates_only=True),
            strict=True,
        ):
            assert torch.equal(level, expected)
    assert report.share == 1 and {fate.why for fate in report.of("ignored")} == {"not of the encoder"}
    for name in ("mobilenet_v3", "test_resnet", "mit_b0"):
        refused(load_encoder_weights, create_encoder(name, 64), files[0], "weights of another network")


# What is refused


@pytest.mark.parametrize(
    "settings, source, message",
    [
        (dict(encoder="swin_tiny"), dict(), r"not one 'layers_\*\.blocks\.\*\.attn\.relative_position_bias_table'"),
        (dict(), dict(encoder="swin_tiny"), r"not one 'layers_\*\.blocks\.\*\.attn\.logit_scale'"),
        (dict(), dict(num_heads=(2, 4, 8, 16)), r"logit_scale.* \(found \(2, 1, 1\), expected \(1, 1, 1\)"),
        (
            dict(encoder="swin_tiny"),
            dict(encoder="swin_tiny", num_heads=(2, 4, 8, 16)),
            r"relative_position_bias_table.* \(found \(169, 2\), expected \(169, 1\)",
        ),
        (dict(embed_dim=32), dict(), r"patch_embed.proj.weight.* \(found \(16, 3, 4, 4\), expected \(32, 3, 4, 4\)"),
        (
            dict(depths=(1, 1, 30, 1)),
            dict(),
            r"weights of another network: \d\d % of the values .* first 'layers_2\.blocks\.2\.[^']*' \(missing\)",
        ),
    ],
)
def test_other_networks_are_refused(tmp_path, settings, source, message):
    refused(load_encoder_weights, classifier(seed=1, **settings), saved(classifier(**source), tmp_path), message)


def test_other_families_and_strangers_are_refused(tmp_path):
    files = {name: saved(unet(name), tmp_path, f"{name}.safetensors") for name in ("test_resnet", "mit_b0")}
    for name, source in (("test_resnet", "mit_b0"), ("mit_b0", "test_resnet"), ("test_convnext", "test_resnet")):
        refused(
            load_encoder_weights, unet(name, seed=1), files[source], r"weights of another network: \d+ % of the values"
        )
    save_file({"x": torch.ones(2)}, tmp_path / "stranger.safetensors")
    refused(
        load_encoder_weights, classifier(seed=1), tmp_path / "stranger.safetensors", r"0 % of the values .* \(missing\)"
    )
    save_file({}, tmp_path / "nothing.safetensors")
    refused(
        load_encoder_weights, classifier(seed=1), tmp_path / "nothing.safetensors", r"0 % of the values .* \(missing\)"
    )
    refused(load_encoder_weights, nn.Linear(2, 2), files["mit_b0"], "encoder: found Linear")


def test_the_authors_names_of_downsampling_are_not_mistaken(tmp_path):
    "In the authors' files a stage ends with its downsampling; timm's stages begin with it."
    source = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, strict_img_size=False)
    state = {
        re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name): value
        for name, value in source.state_dict().items()
    }
    save_file(state, tmp_path / "authors.safetensors")
    refused(
        load_encoder_weights,
        create_encoder("swin", 64),
        tmp_path / "authors.safetensors",
        r"not one 'layers_\*\.downsample",
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(tmp_path, number):
    for name in ("encoder.body.layers_1.blocks.0.mlp.fc1.weight", "head.bias"):
        source = classifier()
        with torch.no_grad():
            source.get_parameter(name).view(-1)[-1] = number
        path = saved(source, tmp_path, f"{name}.safetensors")
        refused(load_model_weights, classifier(seed=1), path, f"NaN or infinite values in '{name}'")
        if name.startswith("encoder"):
            refused(load_encoder_weights, classifier(seed=1), path, "NaN or infinite values")
        else:
            assert load_encoder_weights(classifier(seed=1), path).share == 1  # a head is never loaded


def test_whole_numbers_are_no_weights(tmp_path):
    save_file(
        {name: value.mul(10).to(torch.int8) for name, value in classifier().state_dict().items()},
        tmp_path / "int8.safetensors",
    )
    refused(load_encoder_weights, classifier(seed=1), tmp_path / "int8.safetensors", r"0 % .*\(type torch.int8\)")


# The whole model


@pytest.mark.parametrize(
    "make", [classifier, lambda **settings: unet("test_resnet", **settings)], ids=["classifier", "unet"]
)
def test_a_whole_model_is_loaded_or_its_classes_are_named(tmp_path, make):
    source, model = make(num_classes=4), make(num_classes=4, seed=1)
    report = load_model_weights(model, saved(source, tmp_path))
    assert not changed(model, source.state_dict()) and len(report.loaded) == len(model.state_dict())
    refused(
        load_model_weights,
        make(num_classes=6, seed=1),
        tmp_path / "source.safetensors",
        r"found a head for num_classes=4, expected num_classes=6; encoder_weights takes",
    )


def test_another_whole_model_is_refused(tmp_path):
    path = saved(classifier(), tmp_path)
    for model in (
        classifier("swin_tiny"),
        classifier(depths=(1, 1, 3, 1)),
        classifier(embed_dim=32, num_classes=9),
        unet("test_resnet"),
    ):
        refused(load_model_weights, model, path, "found weights of another model")
    save_file({**classifier().state_dict(), "extra": torch.zeros(1)}, path)
    refused(load_model_weights, classifier(seed=1), path, r"1 unexpected \(first: extra\)")
