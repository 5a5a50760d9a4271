"Pictures of several classes: void, absent classes, odd sizes, legends, ids beyond the list; cracks drawn both ways."

import io

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from crackseg_nb.core.checks import VOID, CrackSegError
from crackseg_nb.data.audit import Audit
from crackseg_nb.data.augment import create_augmentation
from crackseg_nb.figures.cases import Case, ClassCase, mask_picture, show_cases
from crackseg_nb.figures.charts import show_class_balance, show_class_scores, show_confusion, show_history
from crackseg_nb.figures.photos import (
    CRACK_COLOUR,
    ERROR_COLOURS,
    OUTCOMES,
    TILE,
    class_legend,
    colour_table,
    outcomes,
    overlay,
    paint_outcomes,
    show_augmentations,
    show_pairs,
    show_samples,
    shrink_labels,
)
from crackseg_nb.metrics.counts import ClassMetrics
from crackseg_nb.sources.samples import Classes, Sample
from crackseg_nb.synthetic.cracks import synthesize

COLOURS = tuple((10 * k, 255 - 10 * k, 7 * k) for k in range(1, 21))


def classes_of(count):
    return Classes(tuple(["background", *(f"damage {k}" for k in range(1, count))]), ((0, 0, 0), *COLOURS[: count - 1]))


def random_case(seed, count, size=(70, 90)):
    "Return an image, class ids with void, and a prediction."
    generator = np.random.default_rng(seed)

    def blobs():
        return cv2.resize(
            generator.integers(0, count, (6, 7)).astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST
        )

    image = generator.integers(0, 256, (*size, 3)).astype(np.uint8)
    mask, prediction = blobs(), blobs()
    mask[generator.random(size) < 0.1] = VOID
    return image, mask, prediction


def legend_texts(figure):
    return [entry.get_text() for legend in figure.legends for entry in legend.get_texts()]


def png_size(figure):
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", bbox_inches="tight")
        return len(buffer.getvalue())


@pytest.mark.parametrize("count", [3, 8, 21])
def test_overlay_paints_each_class_and_nothing_else(count):
    for seed in range(5):
        image, mask, _ = random_case(seed, count)
        classes = classes_of(count)
        picture = overlay(image, mask, classes)
        assert (picture[mask == 0] == image[mask == 0]).all()
        for k in range(1, count):
            colour, here = np.array(classes.colours[k]), mask == k
            edge = here & (
                cv2.erode(here.astype(np.uint8), np.ones((3, 3)), borderType=cv2.BORDER_CONSTANT, borderValue=0) == 0
            )
            assert (picture[edge] == colour).all()
            assert (picture[here & ~edge] == (0.6 * image[here & ~edge] + 0.4 * colour).astype(np.uint8)).all()
        void = picture[mask == VOID]
        assert (void[:, :1] == void).all()  # grey


def test_overlay_of_classes_with_cracks_alone_looks_like_that_of_cracks():
    image, mask = synthesize(4, (90, 130))
    mask[:20] = VOID
    three = Classes(("background", "crack", "stain"), ((0, 0, 0), CRACK_COLOUR, (9, 9, 9)))
    assert (overlay(image, mask, three) == overlay(image, mask)).all()


def test_photo_of_void_alone_is_drawn_grey():
    image, classes = np.full((40, 40, 3), (200, 30, 90), np.uint8), classes_of(4)
    mask = np.full((40, 40), VOID, np.uint8)
    for picture in (overlay(image, mask, classes), mask_picture(mask, classes)):
        assert (picture == picture[..., :1]).all()
    assert (outcomes(mask, mask * 0 + 2) == OUTCOMES.index("void")).all()


@pytest.mark.parametrize("count", [2, 3, 16])
def test_outcomes_agree_with_the_confusion_matrix(count):
    import torch

    for seed in range(5):
        image, mask, prediction = random_case(seed, count)
        metrics = ClassMetrics(classes_of(count).names)
        metrics.update(torch.tensor(prediction)[None], torch.tensor(mask)[None])
        matrix, outcome = metrics.matrix, outcomes(mask, prediction)
        found = dict(zip(OUTCOMES, np.bincount(outcome.ravel(), minlength=len(OUTCOMES)).tolist()))
        damage = matrix[1:, 1:]
        assert found == {
            "background": matrix[0, 0],
            "hit": damage.trace(),
            "missed": matrix[1:, 0].sum(),
            "false alarm": matrix[0, 1:].sum(),
            "wrong class": damage.sum() - damage.trace(),
            "void": (mask == VOID).sum(),
        }
        picture = paint_outcomes(image, outcome)
        for number, colour in enumerate(ERROR_COLOURS.values(), 1):
            assert (picture[outcome == number] == colour).all()


def test_mask_picture_has_the_colours_of_the_legend():
    classes, mask = classes_of(21), np.arange(21, dtype=np.uint8)[:, None].repeat(4, 1)
    picture = mask_picture(mask, classes)
    assert [tuple(colour) for colour in picture[:, 0].tolist()] == list(classes.colours)
    entries = class_legend(classes, with_background=True)
    assert [entry.get_label() for entry in entries] == [f"{k} {name}" for k, name in enumerate(classes.names)] + [
        "void"
    ]
    assert all(
        np.allclose(np.array(entry.get_facecolor()[:3]) * 255, colour)
        for entry, colour in zip(entries, classes.colours)
    )


def test_lines_first_keeps_thin_cracks_on_wide_damage_whole():
    labels = np.full((700, 900), 2, np.uint8)
    cv2.polylines(labels, [np.array([[0, 50], [450, 400], [899, 600]])], False, 1)
    small = shrink_labels(labels, TILE, lines_first=True)
    assert (small == 1).any(0).all() and (small == 1).sum() < 2.5 * small.shape[1]
    assert not (shrink_labels(labels, TILE) == 1).any()
    labels[labels == 1] = VOID  # a line of void is not worth keeping
    assert not (shrink_labels(labels, TILE, lines_first=True) == VOID).any()


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [(300, 400), (900, 1100)])
def test_lines_first_keeps_most_of_a_crooked_crack_on_wide_damage(size):
    kept, left = [], []
    for seed in range(6):
        crack = synthesize(seed, size)[1]
        alone = shrink_labels(crack, TILE) == 1
        labels = np.where(crack == 1, 1, 2).astype(np.uint8)
        kept.append((shrink_labels(labels, TILE, lines_first=True)[alone] == 1).mean())
        left.append((shrink_labels(labels, TILE)[alone] == 1).mean())
    assert min(kept) > 0.7 and np.mean(kept) > 0.8 and np.mean(left) < 0.6


@pytest.mark.parametrize("size", [(33, 400), (400, 33), (1, 50), (120, 144), (500, 700)])
def test_cases_of_any_size(size):
    image, mask, prediction = random_case(1, 5, size)
    figure = show_cases([ClassCase("a", image, mask, prediction, 0.5)], classes=classes_of(5))
    for axis in figure.axes:
        assert axis.images[0].get_array().shape[0] <= TILE[0] and axis.images[0].get_array().shape[1] <= TILE[1]


@pytest.mark.few(1)
@pytest.mark.parametrize("count", [3, 7, 21])
def test_case_legend_names_every_class_and_stays_inside(count):
    classes = classes_of(count)
    figure = show_cases([ClassCase("a", *random_case(seed, count), 0.5) for seed in range(3)], "worst", classes)
    assert legend_texts(figure) == [f"{k} {name}" for k, name in enumerate(classes.names)] + ["void", *ERROR_COLOURS]
    figure.draw_without_rendering()
    whole, boxes = figure.bbox, [legend.get_window_extent() for legend in figure.legends]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1
    for axis in figure.axes:
        assert axis.get_window_extent().height >= axis.images[0].get_array().shape[0]  # or thin lines are lost
    assert boxes[0].x1 < boxes[1].x0
    assert max(box.y1 for box in boxes) <= min(axis.get_window_extent().y0 for axis in figure.axes)
    assert png_size(figure) < 150_000
    assert plt.get_fignums() == []


def test_each_panel_shows_what_it_is_called():
    image, (mask, probability) = np.full((40, 60, 3), 128, np.uint8), np.zeros((2, 40, 60))
    mask, probability[5:10], probability[20:25] = mask.astype(np.uint8), 0.8, 0.3
    mask[8:16], mask[30:33] = 1, VOID
    photo, truth, answer, errors = (
        axis.images[0].get_array() for axis in show_cases([Case("a", image, mask, probability, 0.5, 0.1)]).axes
    )
    assert (photo[..., 0] == photo[0, 0, 0]).all()
    np.testing.assert_array_equal((truth == 255).all(2), mask == 1)
    np.testing.assert_allclose(answer, probability)
    for name, rows in {"hit": (8, 10), "missed": (10, 16), "false alarm": (5, 8)}.items():
        shown = (errors == ERROR_COLOURS[name]).all(2)
        assert shown[slice(*rows)].all() and shown.sum() == 60 * (rows[1] - rows[0]), name


def test_each_line_of_a_history_has_its_name_and_the_best_epoch_its_star():
    history = pd.DataFrame(
        dict(epoch=[1, 2, 3], train_loss=[3, 2, 1], val_loss=[6, 5, 4], val_iou=[0.1, 0.4, 0.3], val_f1=[0.2, 0.6, 0.5])
    )
    figure = show_history(history)
    names = {"training": "train_loss", "validation": "val_loss", "IoU": "val_iou", "F1": "val_f1"}
    lines = [line for axis in figure.axes for line in axis.lines]
    for name, column in names.items():
        line = next(line for line in lines if line.get_label() == name)
        assert list(line.get_ydata()) == list(history[column]) and list(line.get_xdata()) == [1, 2, 3]
    star = next(line for line in lines if line.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([2], [0.4])


def test_numbers_stand_on_their_regions():
    ids = np.zeros((100, 120), np.uint8)
    ids[10:50, 10:50], ids[60:95, 60:110], ids[2, :] = 1, 2, 3
    case = ClassCase("a", np.zeros((100, 120, 3), np.uint8), ids, ids, 1.0)
    texts = show_cases([case], classes=classes_of(5)).axes[1].texts
    assert [text.get_text() for text in texts] == ["1", "2", "3"]
    for text in texts:
        column, row = text.xy
        assert ids[row, column] == int(text.get_text())


def test_samples_and_augmentations_have_a_legend(tmp_path):
    image, mask, _ = random_case(0, 4, (80, 100))
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    sample, names = (
        Sample("a", tmp_path / "a.png", tmp_path / "a_mask.png", "a"),
        ["1 damage 1", "2 damage 2", "3 damage 3", "void"],
    )
    assert legend_texts(show_samples([sample], "class_ids", classes=classes_of(4))) == names
    assert (
        legend_texts(
            show_augmentations(sample, "class_ids", create_augmentation("crack", 64), 3, classes=classes_of(4))
        )
        == names
    )
    with pytest.raises(CrackSegError, match="mask: found class id 3, expected 0 to 2 or 255 for void"):
        show_samples([sample], "class_ids", classes=classes_of(3))


def test_thin_cracks_on_wide_damage_show_in_samples_and_cases(tmp_path):
    image, mask, classes = np.full((500, 600, 3), 99, np.uint8), np.full((500, 600), 2, np.uint8), classes_of(4)
    mask[250] = 1
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "a_mask.png")
    samples = show_samples(
        [Sample("a", tmp_path / "a.png", tmp_path / "a_mask.png", "a")], "class_ids", classes=classes
    )
    cases = show_cases([ClassCase("a", image, mask, mask, 1.0)], classes=classes)
    for axis in (samples.axes[0], *cases.axes[1:3]):
        crack = (axis.images[0].get_array() == classes.colours[1]).all(2)
        assert crack.any(0).all() and crack.any(1).sum() <= 2
    assert legend_texts(samples) == ["1 damage 1", "2 damage 2", "3 damage 3"]


@pytest.mark.parametrize(
    "call",
    [
        lambda image, ids, classes: overlay(image, ids, classes),
        lambda image, ids, classes: show_pairs([(image, ids)], ["a"], classes),
        lambda image, ids, classes: show_cases([ClassCase("a", image, ids, ids * 0, 0.0)], classes=classes),
        lambda image, ids, classes: show_cases([ClassCase("a", image, ids * 0, ids, 0.0)], classes=classes),
        lambda image, ids, classes: show_cases([Case("a", image, ids, ids / 255, 0.5, 0.0)]),
    ],
)
def test_ids_beyond_the_list_are_refused_in_one_line(call):
    ids = np.zeros((600, 800), np.uint8)
    ids[150, 200] = 9  # a single pixel, which a smaller picture would lose
    with pytest.raises(CrackSegError, match=r"^(mask|prediction): found class id 9, expected 0 to \d") as caught:
        call(np.zeros((600, 800, 3), np.uint8), ids, classes_of(5))
    assert "\n" not in str(caught.value)


def test_void_is_no_prediction():
    image, mask, prediction = random_case(0, 3)
    prediction[0, 0] = VOID
    with pytest.raises(CrackSegError, match="prediction: found class id 255, expected 0 to 2$"):
        show_cases([ClassCase("a", image, mask, prediction, 0.0)], classes=classes_of(3))


def test_classes_without_a_pixel():
    names = ("background", "crack", "stain")
    report = Audit(
        pd.DataFrame({"images": [3, 0]}, index=["train", "val"]),
        pixels={"train": np.array([99999, 1, 0]), "val": np.zeros(3, np.int64)},
    )
    axis = show_class_balance(report, Classes(names)).axes[0]
    assert [text.get_text() for text in axis.texts] == [
        "train",
        "100.00",
        "<0.01",
        "none",
        "val",
        "none",
        "none",
        "none",
    ]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["train (3 images)", "val (0 images)"]
    texts = [
        text.get_text()
        for text in show_class_scores({"background": dict(iou=0.0, pixels=0), "crack": dict(iou=None, pixels=0)})
        .axes[0]
        .texts
    ]
    assert texts == ["0.00", "0", "no true pixel", "0", "true pixels"]
    matrix = np.array([[5, 5, 0], [0, 0, 0], [1, 0, 999]])
    texts = [text.get_text() for text in show_confusion(matrix, names).axes[0].texts]
    assert texts == ["50", "50", "none", "<1", ">99"]


@pytest.mark.parametrize("count, figures", [(2, True), (12, True), (13, False), (21, False)])
def test_confusion_has_figures_up_to_twelve_classes(count, figures):
    figure = show_confusion(np.eye(count, dtype=np.int64) + 1, classes_of(count).names)
    assert len(figure.axes[0].texts) == (count**2 if figures else 0)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(classes_of(count).names)


def test_default_crack_keeps_its_colours():
    assert tuple(colour_table(Classes())[1]) == CRACK_COLOUR
    assert mask_picture(np.array([[0, 1]], np.uint8)).tolist() == [[[0] * 3, [255] * 3]]
