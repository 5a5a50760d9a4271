"""The dull cases of configurations: what each rule refuses, and what a recipe is beside another model."""

import itertools
from dataclasses import dataclass

import pytest
from messages import one_line

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import project_root, write_yaml
from crackseg_nb.core.run_folder import create_run_folder
from crackseg_nb.runs.config import (
    NOT_THE_RESULT,
    DataConfig,
    coerce,
    config_to_dict,
    configure,
    differences,
    known_parameters,
    notebook_settings,
    read_config,
)
from crackseg_nb.runs.recipes import RECIPES

PHOTOS = dict(data="folder", data_dir="photos", class_names="wall,crack,rust")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(train_set="val"), "train_set: found 'val'"),
        (dict(data="synthetic_textures", augmentation="crack"), "augmentation: found 'crack'"),
        (dict(class_names=("wall", "rust")), "class_names: found wall, rust with data synthetic"),
        (dict(data="folder"), "data_dir: found none, expected the folder of folder"),
        (dict(data_dir="photos"), "data: found synthetic with data_dir 'photos'"),
        (dict(num_workers=-1), "num_workers: found -1, expected a whole number at least 0"),
        (dict(loader_timeout=-0.5), "loader_timeout: found -0.5, expected a number at least 0"),
        (dict(synthetic_images=3), "synthetic_images: found 3, expected a whole number at least 4"),
        (dict(synthetic_width=(0, 3)), "synthetic_width"),
        (dict(zoom=(2, 1)), "zoom: found (2, 1), expected the smaller number first"),
        (dict(zoom=(1, 2), augmentation="none"), "zoom: found 1,2 with augmentation none"),
        (dict(zoom=(1, 2), data="synthetic_textures", augmentation="basic"), "zoom: found (1, 2) for labelled images"),
        (dict(fractions=(0.5, 0.5)), "fractions: found (0.5, 0.5)"),
        (dict(preload="never"), "preload: found 'never'"),
        (dict(mask_encoding="0/1"), "mask_encoding: found '0/1'"),
    ],
)
def test_data_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(CrackSegError) as error:
        DataConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name, file", [("pretrained", "lost.safetensors"), ("class_weights", "lost.json"), ("fine_tune", "lost")]
)
def test_a_lost_file_is_told_at_once_but_where_a_run_has_used_it(name, file, tmp_path):
    "Also one that a configuration written by hand names."
    section = dict(loss=dict(loss="focal_dice", class_weights=file)) if name == "class_weights" else {}
    write_yaml(tmp_path / "config.yaml", section or dict(model=dict(model="unet") | {name: file}))
    one_line(lambda: configure(config=str(tmp_path / "config.yaml")), f"{name}: found no")
    (tmp_path / "status.yaml").touch()
    configure(config=str(tmp_path / "config.yaml"))


def test_class_names_give_the_number_of_channels():
    data = DataConfig(data="folder", data_dir="photos", class_names=("wall", "crack", "rust"))
    assert data.classes.num_channels == data.num_channels == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(config="config.yaml", recipe="quickstart"), "expected one of the two"),
        (dict(recipe="deeplab_finetune"), "fine_tune: found none, expected it with recipe deeplab_finetune"),
        (dict(class_weights="lost.json"), "class_weights: found no file lost.json"),
        (dict(class_weights="inverse", loss="dice"), "class_weights: found inverse with loss dice, which has none"),
        (dict(effective_beta=2), "effective_beta"),
        (dict(amp="half"), "amp"),
        (dict(seed=-1), "seed: found -1, expected a whole number at least 0"),
        (dict(devices=0), "devices: found 0, expected a whole number at least 1"),
        (dict(time_limit=-1), "time_limit: found -1.0, expected a number at least 0"),
        (dict(threshold_criterion="f1"), "threshold_criterion: found 'f1'"),
        (dict(resume="nigth"), "did you mean 'night'?"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(settings, message, tmp_path):
    create_run_folder(tmp_path, "night")
    with pytest.raises(CrackSegError) as error:
        configure(**settings, outputs=str(tmp_path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "parameter, value, kind, expected",
    [
        ("class_names", "wall, 2nd wall", tuple[str, ...], ("wall", "2nd wall")),
        ("class_weights", [0.5, 2], str, "0.5,2"),
        ("betas", "(0.9, 0.99)", tuple[float, float], (0.9, 0.99)),
        ("lr", "1e-3", float, 1e-3),
        ("image_size", "huge", int, CrackSegError),
        ("aspp_rates", "1,many", tuple[int, ...], CrackSegError),
        ("aspp_rates", 6, tuple[int, ...], (6,)),
    ],
)
def test_values_are_brought_to_the_declared_type(parameter, value, kind, expected):
    if expected is CrackSegError:
        with pytest.raises(CrackSegError, match=f"^{parameter}: found "):
            coerce(parameter, value, kind)
    else:
        assert coerce(parameter, value, kind) == expected


def test_a_recipe_beside_another_loss_keeps_no_setting_of_its_own_loss():
    assert configure(recipe="swinv2_hybrid_360", loss="tversky").loss.settings == {}  # alpha means something else there
    assert configure(recipe="heritage_dicefocal", loss="ce").class_weights == "inverse_sqrt"  # which has weights too
    assert configure(recipe="heritage_dicefocal", loss="dice").class_weights == "none"


def test_a_recipe_beside_an_encoder_of_another_model_asks_for_that_model():
    config = configure(encoder="convnext")
    assert (config.model, config.model_settings["pretrained"], config.loss.name) == ("unet", "false", "focal_dice")


def test_a_recipe_on_other_classes_keeps_its_loss_and_rule_of_weights():
    config = configure(recipe="heritage_dicefocal", **PHOTOS)
    found = config.model_config().num_classes, config.class_weights, config.loss.settings["alpha"]
    assert found == (3, "inverse_sqrt", 0.25)
    assert "prior" not in configure(recipe="quickstart", loss="ce", **PHOTOS).model_settings  # that of its cracks


def test_a_test_epoch_is_one_epoch():
    assert configure(recipe="heritage_unet", test_epoch=True).train.epochs == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_repeated_from_its_own_configuration(recipe, tmp_path):
    if RECIPES[recipe].needs:
        (tmp_path / "weights.safetensors").write_bytes(b"")
    given = {name: str(tmp_path / "weights.safetensors") for name in RECIPES[recipe].needs}
    config = configure(recipe=recipe, **given)
    write_yaml(tmp_path / "config.yaml", config_to_dict(config))
    assert config_to_dict(configure(config=tmp_path / "config.yaml")) == config_to_dict(config)
    flat = {name: value for section in config_to_dict(config).values() for name, value in section.items()}
    for name, value in RECIPES[recipe].settings.items():
        if name != "pretrained" or not given:  # which other weights replace
            assert flat[name] == value, name


@dataclass
class Study:
    seeds: tuple[int, ...] = (1, 2)
    name: str = "study"


def test_one_number_stands_for_a_sequence_of_one_in_a_notebook():
    assert notebook_settings(Study, {"seeds": 3, "name": None}) == Study((3,))
    assert notebook_settings(Study, {"seeds": "3,4", "name": "other"}) == Study((3, 4), "other")
    with pytest.raises(CrackSegError, match="seeds: found 'one'"):
        notebook_settings(Study, {"seeds": "one"})


def test_the_recipe_for_thin_cracks_is_what_its_run_was_trained_with():
    trained = read_config(project_root() / "outputs" / "deepcrack-unet_lite1" / "config.yaml")
    own = configure(recipe="crack_unet", data="DeepCrack", data_dir="data/DeepCrack")
    settings = {name: value for section in config_to_dict(own).values() for name, value in section.items()}
    known = {name: settings[name] for name in trained}  # the run is older than some settings
    assert {*differences(known, trained, NOT_THE_RESULT)} <= {"recipe", "device"}


def test_a_run_that_was_moved_is_resumed_where_it_lies(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    run = create_run_folder(before, "run")
    write_yaml(run / "config.yaml", config_to_dict(configure(outputs=str(before))))
    run.mark("stopped")
    assert configure(resume=str(run.path)).run.outputs == str(before)
    before.rename(after)
    for given in ({"resume": str(after / "run")}, {"resume": "run", "outputs": str(after)}):
        assert configure(**given).run.outputs == str(after)


def test_what_was_not_settled_may_be_changed_beside_resume_where_it_leaves_the_numbers_alone():
    assert differences({"amp": "off", "pretrained": "false"}, {"amp": "auto", "pretrained": "auto"}) == [
        "amp",
        "pretrained",
    ]
    assert differences({"amp": "auto", "pretrained": "auto"}, {"amp": "bf16", "pretrained": "false"}) == []


@pytest.mark.parametrize("settings", [dict(image_folder="x"), dict(line_width=3), dict(group_pattern="a")])
def test_options_that_the_reader_does_not_take_are_refused_at_once(settings):
    for data in (dict(), dict(data="DeepCrack", data_dir="x")):
        with pytest.raises(CrackSegError, match=f"{next(iter(settings))}: found .* which does not take it"):
            configure(**settings, **data)


HOSTILE = [
    "",
    " ",
    "None",
    "true",
    "0",
    "-1",
    "1e400",
    "nan",
    "-inf",
    "1,2",
    "[1, 2]",
    "{'a': 1}",
    "1_000",
    "\u0663",
    "\u00bd",
    "0x10",
    "3.7",
]
HOSTILE += [
    "../x",
    "/etc/passwd",
    "~",
    "a\nb",
    "a\0b",
    "\u00e9" * 300,
    "\U0001f4a5",
    "1,,2",
    ",",
    "auto",
    "0.7,0.2",
    "100%",
    "1 000",
]
HOSTILE += [
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    10**30,
    True,
    False,
    [],
    [1],
    (1, 2, 3),
    {},
    b"x",
    1j,
    object(),
    [None],
    [[1]],
]


def test_any_value_of_any_parameter_is_taken_or_refused_in_one_line(request, tmp_path, monkeypatch):
    "A refusal names the parameter. Without --slow: every sixth pair, and names that are too long for a file."
    monkeypatch.chdir(tmp_path)
    every = 1 if request.config.getoption("--slow") else 6
    pairs = [*itertools.product(known_parameters(), HOSTILE)][::every]
    pairs += [(name, "\u00e9" * 300) for name in ("fine_tune", "encoder_weights", "pretrained", "data_dir", "outputs")]
    for name, value in [*pairs, ("class_weights", "\u00e9" * 300 + ".json")]:
        try:
            configure(**{name: value})
        except CrackSegError as error:
            assert len(str(error)) < 700 and len(str(error).splitlines()) == 1, (name, value, str(error))
            told = (
                name in str(error) or isinstance(value, dict) or name.endswith("_weight") and "weights: " in str(error)
            )
            assert told, (name, value, str(error))
    assert not list(tmp_path.iterdir())
