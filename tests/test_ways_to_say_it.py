"""Settings as people write them: each is read as it is meant, or refused in one clear line."""

import ast
import json
from functools import partial
from pathlib import Path

import pytest
import yaml
from messages import one_line

from crackseg_nb.core.checks import OTHER_WORDS
from crackseg_nb.core.files import write_yaml
from crackseg_nb.core.run_folder import create_run_folder
from crackseg_nb.runs import command
from crackseg_nb.runs.config import (
    PARTS,
    config_to_dict,
    configure,
    known_parameters,
    notebook_parameters,
    notebook_settings,
)
from crackseg_nb.studies.training_speed import BenchmarkConfig

ROOT = Path(__file__).resolve().parents[1]
TUPLES = {
    "aspp_rates": (1, 6),
    "fractions": (0.6, 0.2, 0.2),
    "betas": (0.8, 0.9),
    "synthetic_width": (2, 5),
    "decoder_channels": (8, 8, 8),
}
CLASSIFIER = {"depths": (2, 2, 2, 2), "num_heads": (2, 2, 4, 4)}


def from_file(folder, **settings):
    "Return the configuration of a file that holds `settings`, each in the section where it belongs."
    known, sections = known_parameters(), {}
    for name, text in settings.items():
        sections.setdefault(known[name][0], []).append(f"  {name}: {text}\n")
    path = folder / "written.yaml"
    path.write_text("".join(f"{section}:\n{''.join(lines)}" for section, lines in sections.items()))
    return configure(config=str(path))


def from_papermill(folder, **settings):
    "Return the configuration of a file of flat parameters, which papermill reads with PyYAML."
    text = "".join(f"{name}: {value}\n" for name, value in settings.items())
    return configure(**notebook_parameters({"In": [], **yaml.safe_load(text)}))


def from_command(folder, **settings):
    words = [word for name, value in settings.items() for word in ("-p", name, str(value))]
    return configure(**command.given_parameters(command.command_line().parse_args(words)))


WAYS = [from_file, from_papermill, from_command]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", ".0001", "1.0e-4", "'1e-4'"])
def test_numbers(tmp_path, way, text):
    text = text.strip("'") if way is from_command else text
    assert way(tmp_path, lr=text).optim.lr == 1e-4
    assert way(tmp_path, epochs="2e1").train.epochs == 20
    assert way(tmp_path, seed=2**53 + 1).run.seed == 2**53 + 1
    one_line(lambda: way(tmp_path, lr="fast"), "lr: found 'fast', expected a number")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["{}", "[{}]", "({})", "[ {} ]"])
@pytest.mark.parametrize("name", [*TUPLES, *CLASSIFIER])
def test_sequences(tmp_path, way, form, name):
    value = {**TUPLES, **CLASSIFIER}[name]
    others = {"recipe": "swin_classifier", "data": "synthetic_textures"} if name in CLASSIFIER else {}
    config = way(tmp_path, **others, **{name: form.format(", ".join(map(str, value)))})
    flat = {key: setting for section in config_to_dict(config).values() for key, setting in section.items()}
    assert tuple(flat[name]) == value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", ["6", "[6]", "(6)", "6,"])
def test_a_sequence_of_one(tmp_path, way, text):
    assert way(tmp_path, aspp_rates=text).model_config().aspp_rates == (6,)
    one_line(lambda: way(tmp_path, betas=text), "betas: found 6, expected 2 values")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", ["wall,crack,rust", "[wall, crack, rust]", "['wall', 'crack', 'rust']"])
def test_names(tmp_path, way, text):
    config = way(tmp_path, data="folder", data_dir="photos", loss="ce", class_names=text)
    assert config.data.class_names == ("wall", "crack", "rust")


def test_the_studies_read_them_the_same():
    assert notebook_settings(BenchmarkConfig, {"sizes": "[64, 96]"}).sizes == (64, 96)
    assert notebook_settings(BenchmarkConfig, {"sizes": 64}).sizes == (64,)
    one_line(lambda: notebook_settings(BenchmarkConfig, {"sizes": {"small": 64}}), "sizes: found a section (small)")


# ---- names


@pytest.mark.parametrize("name, word", [(name, word) for name, words in OTHER_WORDS.items() for word in words.split()])
def test_words_of_other_toolkits(name, word):
    assert name in {*known_parameters(), "config", "resume"} and word not in known_parameters()
    for spelled in (word, word.upper(), word.replace("_", "-")):
        one_line(partial(configure, **{spelled: 1}), f"parameter: found {spelled!r} (did you mean {name!r}?)")


def test_no_word_means_two_names():
    words = [word for said in OTHER_WORDS.values() for word in said.split()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("name", ["learning_rate", "banana", "epochen"])
def test_an_unknown_name_is_refused_alike_and_shortly(tmp_path, capsys, name):
    told = []
    for action in (
        lambda: configure(**{name: 1}),
        lambda: notebook_parameters({name: 1}),
        lambda: notebook_parameters({name: {"a": 1}}),
    ):
        with pytest.raises(ValueError) as caught:
            action()
        told.append(str(caught.value))
    assert command.main(["-p", name, "1"]) == 1
    told.append(capsys.readouterr().err.strip())
    assert len(set(told)) == 1 and len(told[0]) < 300 and told[0].count(",") <= 11, told


# ---- files


def test_the_sections_of_a_run_are_read_as_parameters(tmp_path):
    "As `papermill -f RUN/config.yaml` hands them over."
    sections = config_to_dict(configure(recipe="heritage_unet", lr=0.5, epochs=9, data="folder", data_dir="photos"))
    write_yaml(tmp_path / "config.yaml", sections)
    variables = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config_to_dict(configure(**notebook_parameters(variables))) == sections
    changed = configure(**notebook_parameters(variables | {"epochs": 3}))
    assert (changed.train.epochs, changed.optim.lr) == (3, 0.5)
    for name in ("config", "recipe", "resume"):
        one_line(
            partial(configure, **variables, **{name: "x"}), f"{name}: found it beside the sections run, data, model"
        )


@pytest.mark.parametrize("name", ["optimizer", "train_settings", "lr", "recipe", "config"])
def test_another_section_is_no_parameter(name):
    one_line(lambda: configure(**notebook_parameters({name: {"lr": 0.1}})), f"{name}")


@pytest.mark.parametrize("recipe", ["quickstart", "heritage_unet", "swinv2_hybrid_360"])
def test_a_short_file_begins_with_its_recipe(tmp_path, recipe):
    expected = config_to_dict(configure(recipe=recipe, seed=1))
    assert config_to_dict(from_file(tmp_path, recipe=recipe, seed=1)) == expected
    changed = from_file(tmp_path, recipe=recipe, model="unet", encoder="mobilenet", loss="dice")
    assert config_to_dict(changed) == config_to_dict(
        configure(recipe=recipe, model="unet", encoder="mobilenet", loss="dice")
    )


def test_the_file_of_a_run_is_whole(tmp_path):
    "A setting that came later has the value that it had before, whatever the recipe says by now."
    run = create_run_folder(tmp_path, "old")
    sections = config_to_dict(configure(recipe="quickstart"))
    del sections["data"]["augmentation"], sections["model"]["prior"]
    write_yaml(run / "config.yaml", sections)
    again = configure(config=run / "config.yaml")
    assert "prior" not in again.model_settings and again.data.augmentation == "crack"


@pytest.mark.parametrize(
    "text, said",
    [
        ("train: {epochs: 1}\noptim: {lr: 1}\ntrain: {patience: 2}\n", "train stands twice"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "epochs stands twice"),
        ("train: {lr: 1}\noptim: {lr: 2}\n", "lr: found it in two sections"),
        ("trian: {epochs: 1}\n", "section: found 'trian' (did you mean 'train'?)"),
        ("epochs: 1\n", "found no sections"),
        ("- epochs\n", "found no sections"),
        ("train: {epochs: [1]}\n", "epochs: found [1]"),
        ("train: {epochs: {one: 1}}\n", "epochs: found a section (one)"),
    ],
)
def test_a_file_that_says_it_twice_or_nowhere(tmp_path, text, said):
    (tmp_path / "config.yaml").write_text(text)
    one_line(lambda: configure(config=tmp_path / "config.yaml"), str(tmp_path), said)


@pytest.mark.parametrize("text", ["stopped\n", "", "- state\n", "state: paused\n", "state:\n", "state: running\n", "{"])
def test_a_status_that_says_no_state(tmp_path, text):
    run = create_run_folder(tmp_path, "edited")
    (run / "status.yaml").write_text(text)
    one_line(lambda: configure(resume=str(run.path)), "status.yaml", "expected")


# ---- places


@pytest.fixture
def nowhere(tmp_path, request):
    (tmp_path / "file").touch()
    return {"below nothing": "/proc/x", "a file": str(tmp_path / "file"), "below a file": str(tmp_path / "file/runs")}


@pytest.mark.parametrize("place", ["below nothing", "a file", "below a file"])
def test_where_nothing_can_be_written(tmp_path, nowhere, place, capsys):
    for words in (
        ["-p", "outputs", nowhere[place]],
        ["-p", "outputs", str(tmp_path), str(Path(nowhere[place]) / "result.ipynb")],
    ):
        assert command.main(words) == 1
        line = capsys.readouterr().err.strip()
        assert nowhere[place] in line and "cannot write there" in line and "\n" not in line
    assert not list(tmp_path.glob("*/status.yaml"))


@pytest.mark.parametrize("name", ["n" * 250, "a/b", "a\0b", ".."])
def test_a_name_that_is_no_folder(name):
    one_line(lambda: configure(run_name=name), "run_name: found")


# ---- the run notebook


def test_the_settings_can_be_read_again_in_a_used_kernel():
    "What later cells of the run notebook assign is never taken for a parameter."
    cells = json.loads((ROOT / "nbs/run_experiment.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][1:]
    names = {
        node.id
        for cell in code
        for node in ast.walk(ast.parse(cell))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    # Objects, tables and pictures; a number, text, list, dictionary or None would be refused as an unknown parameter.
    assert names == {
        *("settings", "experiment", "history", "curves", "decision", "worst", "best", "performance", "folder", "path")
    }
    assert set(PARTS) == set(config_to_dict(configure()))
