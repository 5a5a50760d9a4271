"Attention, activations, gates and branches equal what the model computes. Types of errors: against a slow version."

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from messages import one_line
from scipy.ndimage import distance_transform_edt
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.measure import label
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import nn

from crackseg_nb.core.checks import VOID
from crackseg_nb.evidence.error_types import ERROR_TYPES, error_types, show_errors, show_worst, type_legend
from crackseg_nb.evidence.model_maps import (
    activation_maps,
    aspp_maps,
    attention_maps,
    cbam_maps,
    show_cbam,
    show_maps,
    swin_blocks,
    watched,
    window_attention,
)
from crackseg_nb.figures.cases import Case
from crackseg_nb.figures.photos import ERROR_COLOURS, VOID_COLOUR
from crackseg_nb.metrics.widths import local_widths, trace
from crackseg_nb.models.registry import create_model

SIZES = [(64, 64), (33, 47), (75, 101), (32, 96), (150, 90)]


def photo(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def randomize(model):
    "Make the parts of SwinV2 that start at zero take part."
    for part in model.modules():
        if isinstance(part, SwinTransformerV2Block):
            for values in (part.norm1.weight, part.norm2.weight, part.attn.q_bias, part.attn.v_bias):
                nn.init.normal_(values)
    return model


@pytest.fixture(scope="module")
def hybrid():
    torch.manual_seed(0)
    return randomize(create_model("swinv2_hybrid", image_size=64, pretrained="false"))


@pytest.fixture(scope="module")
def unet():
    return create_model("unet", encoder="resnet34", image_size=64, pretrained="false")


def attended(block, features, weights):
    "Return what attention gives at one position, from the features (h, w, C) and the weights (heads, h, w)."
    attention, heads = block.attn, len(weights)
    values = F.linear(features, attention.qkv.weight[2 * block.dim :], attention.v_bias).unflatten(-1, (heads, -1))
    of_padding = (1 - weights.sum((1, 2)))[:, None] * attention.v_bias.unflatten(0, (heads, -1))
    return attention.proj((torch.einsum("nhw,hwnd->nd", weights, values) + of_padding).flatten())


def check_attention(model, size):
    image, blocks = photo(size), swin_blocks(model)
    with torch.no_grad():
        for pixel in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] - 1, 0), (size[0] // 2, size[1] // 3)):
            weights = window_attention(model, image, pixel)
            with watched(model, image, {name: block for name, (_, block) in blocks.items()}) as seen:
                for name, (stride, block) in blocks.items():
                    features, (row, column) = seen[name].inputs[0], (place // stride for place in pixel)
                    assert weights[name].shape[1:] == features.shape[1:3] == tuple(-(-side // stride) for side in size)
                    torch.testing.assert_close(
                        attended(block, features[0], weights[name]),
                        block._attn(features)[0, row, column],
                        atol=1e-4,
                        rtol=1e-3,
                    )


@pytest.mark.few(2)
@pytest.mark.parametrize("size", SIZES)
def test_attention_gives_what_the_block_gives(hybrid, size):
    check_attention(hybrid, size)


def test_attention_of_another_model_with_large_windows():
    torch.manual_seed(1)
    model = randomize(create_model("unet", encoder="swinv2_tiny_window16", image_size=96, pretrained="false"))
    assert swin_blocks(model)["stage 1 block 2"][1].window_size == (16, 16)
    check_attention(model, (100, 120))


def test_attention_maps_repeat_the_mean_over_heads(hybrid):
    image, pixel = photo((75, 101)), (40, 7)
    weights, maps = window_attention(hybrid, image, pixel), attention_maps(hybrid, image, pixel)
    assert (
        list(maps)
        == list(weights)
        == [
            f"stage {stage} block {block}"
            for stage, depth in enumerate((2, 2, 6, 2), 1)
            for block in range(1, depth + 1)
        ]
    )
    for name, plane in maps.items():
        stride = 2 * 2 ** int(name[6])
        assert plane.shape == image.shape[:2] and plane.dtype == np.float32
        for row, column in ((0, 0), (74, 100), (40, 7)):
            assert plane[row, column] == pytest.approx(
                weights[name][:, row // stride, column // stride].mean().item(), abs=1e-7
            )


def test_attention_is_the_same_with_gradient_checkpointing(hybrid):
    image = photo((75, 101))
    expected = attention_maps(hybrid, image, (3, 3))
    hybrid.set_grad_checkpointing(True)
    try:
        found = attention_maps(hybrid, image, (3, 3))
    finally:
        hybrid.set_grad_checkpointing(False)
    for name, plane in expected.items():
        np.testing.assert_array_equal(found[name], plane)


@pytest.mark.parametrize("size", SIZES)
def test_every_map_has_the_size_of_the_image(hybrid, size):
    image = photo(size)
    planes = [
        *activation_maps(hybrid, image).values(),
        *aspp_maps(hybrid, image).values(),
        *(gate.spatial for gate in cbam_maps(hybrid, image).values()),
    ]
    assert len(planes) == 4 + 5 + 3 and all(plane.shape == size and np.isfinite(plane).all() for plane in planes)


def test_maps_are_those_of_the_parts(hybrid):
    image = photo((75, 101))
    model = hybrid.eval()
    records, parts = (
        {},
        {
            "encoder": model.encoder,
            "bottleneck": model.bottleneck,
            **{number: block.attention for number, block in enumerate(model.decoder)},
        },
    )
    with watched(model, image, parts) as seen:
        records |= seen
    for (name, plane), level, stride in zip(
        activation_maps(model, image).items(), records["encoder"].output, (4, 8, 16, 32)
    ):
        assert name.endswith(f"stride {stride}")
        np.testing.assert_allclose(plane[::stride, ::stride], level[0].norm(dim=0) / level.shape[1] ** 0.5, rtol=1e-4)
    for plane, level, stride in zip(
        activation_maps(model, image, "mean").values(), records["encoder"].output, (4, 8, 16, 32)
    ):
        np.testing.assert_allclose(plane[::stride, ::stride], level[0].mean(0), atol=1e-5)
    with torch.no_grad():
        for plane, branch in zip(aspp_maps(model, image).values(), model.bottleneck.branches, strict=True):
            response = branch(records["bottleneck"].inputs[0])[0]
            np.testing.assert_allclose(
                plane[::32, ::32], response.norm(dim=0) / response.shape[0] ** 0.5, rtol=1e-4, atol=1e-6
            )
    for (name, gates), (number, stride) in zip(cbam_maps(model, image).items(), enumerate((16, 8, 4)), strict=True):
        (joined,), weighed = records[number]
        channels = np.concatenate([gates.deep, gates.skip])
        assert (
            name == f"decoder {number}, stride {stride}"
            and len(gates.deep) == model.decoder[number].narrow.out_channels
        )
        np.testing.assert_allclose(
            joined[0].numpy() * channels[:, None, None] * gates.spatial[::stride, ::stride],
            weighed[0],
            rtol=1e-4,
            atol=1e-6,
        )


def test_other_models_have_some_of_the_parts(unet):
    image = photo((75, 101))
    assert [name.split()[-1] for name in activation_maps(unet, image)] == ["2", "4", "8", "16", "32"]
    deeplab = create_model("deeplab_optimized", image_size=64, pretrained="false")
    assert list(aspp_maps(deeplab, image))[-1] == "whole image"
    assert all(
        plane.shape == (75, 101)
        for plane in (*aspp_maps(deeplab, image).values(), *activation_maps(deeplab, image).values())
    )
    one_line(
        lambda: cbam_maps(deeplab, image),
        "found DeepLabOptimized with encoder mobilenetv3_small_100, without CBAM",
        "such as swinv2_hybrid",
    )


def test_models_without_a_part_are_refused_by_name(unet):
    image = photo((64, 64))
    one_line(
        lambda: attention_maps(unet, image, (0, 0)),
        "model: found Unet with encoder resnet34, without SwinV2 blocks",
        "swinv2_hybrid",
    )
    one_line(lambda: cbam_maps(unet, image), "model: found Unet with encoder resnet34, without CBAM", "cbam=true")
    one_line(lambda: aspp_maps(unet, image), "model: found Unet with encoder resnet34, without ASPP", "aspp=true")
    one_line(lambda: activation_maps(nn.Conv2d(3, 1, 1), image), "model: found Conv2d, without an encoder")


def test_wrong_arguments_are_refused(hybrid):
    image = photo((64, 96))
    one_line(lambda: attention_maps(hybrid, image, (0, 96)), "pixel, column: found 96", "at most 95")
    one_line(lambda: attention_maps(hybrid, image, (-1, 0)), "pixel, row: found -1")
    one_line(lambda: attention_maps(hybrid, image[:31], (0, 0)), "expected at least 32x32")
    one_line(lambda: activation_maps(hybrid, image, "mena"), "did you mean 'mean'?")
    one_line(lambda: aspp_maps(hybrid, image / 255), "image: found float64")


def state_of(model):
    "Return all that a look into a model could change."
    parts = [
        (part.training, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
        for part in model.modules()
    ]
    gradients = [
        (value.requires_grad, None if value.grad is None else value.grad.clone()) for value in model.parameters()
    ]
    return (
        parts,
        gradients,
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_model_is_left_as_it_was(hybrid):
    image, small = photo((75, 101)), photo((31, 64))
    hybrid.train()
    hybrid.bottleneck.eval(), hybrid.decoder[1].attention.eval()
    for value in hybrid.head.parameters():
        value.grad = torch.ones_like(value)
    hybrid.decoder[0].narrow.requires_grad_(False)
    before = state_of(hybrid)
    looks = [
        lambda image: attention_maps(hybrid, image, (0, 0)),
        lambda image: activation_maps(hybrid, image),
        lambda image: cbam_maps(hybrid, image),
        lambda image: aspp_maps(hybrid, image),
    ]
    for look in looks:
        look(image)
        assert same(before, state_of(hybrid))
        with pytest.raises(ValueError):
            look(small)
        assert same(before, state_of(hybrid))
    with pytest.raises(RuntimeError, match="stop"):
        with watched(hybrid, image, {"head": hybrid.head}):
            raise RuntimeError("stop")
    assert same(before, state_of(hybrid))
    hybrid.decoder[0].narrow.requires_grad_(True)


# types of errors

EIGHT = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
WITHIN_2 = [(down, right) for down in range(-2, 3) for right in range(-2, 3) if down**2 + right**2 <= 4]


def random_case(seed):
    "Return a prediction and a mask with void: lines, blobs or specks; the prediction is disturbed or another."
    generator = np.random.default_rng(seed)
    size = tuple(generator.integers(24, 41, 2))

    def draw():
        plane = np.zeros(size, np.uint8)
        if seed % 4 == 3:
            return (cv2.GaussianBlur(generator.random(size), (0, 0), generator.uniform(1, 3)) > 0.52).astype(np.uint8)
        if seed % 4 == 2 and generator.random() < 0.5:
            return (generator.random(size) < 0.15).astype(np.uint8)
        for _ in range(generator.integers(1, 6)):
            cv2.line(plane, *generator.integers(-5, 45, (2, 2)).tolist(), 1, int(generator.integers(1, 8)))
        return plane

    mask = draw()
    other = np.roll(mask, generator.integers(-1, 2, 2), (0, 1)) if generator.random() < 0.7 else draw()
    for _ in range(generator.integers(0, 4)):
        row, column = generator.integers(0, 36, 2)
        other[row : row + generator.integers(1, 9), column : column + generator.integers(1, 12)] = generator.integers(
            0, 2
        )
    other = np.where(generator.random(size) < 0.01, 1 - other, other)
    if generator.random() < 0.6:
        rows, columns = (slice(start, start + 8) for start in generator.integers(0, 30, 2))
        mask[rows, columns] = VOID
        mask[generator.random(size) < 0.01] = VOID
    return other == 1, mask


def around(pixel, steps):
    return [(pixel[0] + down, pixel[1] + right) for down, right in steps]


def parts_of(pixels, key=lambda pixel: 0):
    "Return sets of pixels that touch and have one key."
    left, parts = set(pixels), []
    while left:
        part = [left.pop()]
        for pixel in part:
            for other in around(pixel, EIGHT):
                if other in left and key(other) == key(pixel):
                    left.remove(other)
                    part.append(other)
        parts.append(set(part))
    return parts


def direct_cells(other):
    "Return the part of `other` nearest to each pixel; of several nearest ones, any."
    parts = label(other, connectivity=2)
    cells = parts[tuple(distance_transform_edt(~other, return_distances=False, return_indices=True))]
    pixels = np.argwhere(other)
    for row, column in np.ndindex(other.shape):
        squares = ((pixels - (row, column)) ** 2).sum(1)
        assert cells[row, column] in parts[tuple(pixels[squares == squares.min()].T)]
    return cells


def direct_kinds(area, other):
    "Follow the protocol pixel by pixel: edge, bridge, branch or alone."
    inside, wanted = (set(map(tuple, np.argwhere(plane).tolist())) for plane in (area, other))
    surplus, close = (
        inside - wanted,
        {pixel for pixel in inside if any(place in wanted for place in around(pixel, WITHIN_2))},
    )
    core = set()
    if len(parts_of(wanted)) > 1:
        cells = direct_cells(other)
        piece_of = {}
        for number, piece in enumerate(parts_of(inside, key=lambda pixel: cells[pixel])):
            if piece & close:
                piece_of |= dict.fromkeys(piece, number)
        core = {
            pixel
            for pixel in surplus
            if pixel in piece_of
            and any(piece_of.get(place, piece_of[pixel]) != piece_of[pixel] for place in around(pixel, EIGHT))
        }
        core |= set().union(*(part for part in parts_of(surplus - close) if part & core))
    kinds = {}
    for part in parts_of(inside):
        for pixel in part & surplus:
            if any(place in core for place in around(pixel, WITHIN_2)):
                kinds[pixel] = "bridge"
            elif pixel in close:
                kinds[pixel] = "edge"
            else:
                kinds[pixel] = "branch" if part & close else "alone"
    return kinds


def direct_types(prediction, mask):
    known = mask != VOID
    true, predicted = known & (mask == 1), known & prediction
    missed, false = direct_kinds(true, predicted), direct_kinds(predicted, true)
    names = {"edge": "thick edge", "bridge": "false joint", "branch": "false branch", "alone": "false crack"}
    types = {pixel: names[kind] for pixel, kind in false.items()}
    types |= {
        pixel: {"edge": "thin edge", "bridge": "gap"}[kind]
        for pixel, kind in missed.items()
        if kind in ("edge", "bridge")
    }
    widths = dict(zip(map(tuple, np.argwhere(true).tolist()), local_widths(trace(true, known), true)))
    for part in parts_of(pixel for pixel, kind in missed.items() if kind in ("branch", "alone")):
        thin = np.median([widths[pixel] for pixel in part]) <= 3.5
        types |= dict.fromkeys(part, "missed thin crack" if thin else "missed wide crack")
    return types


def test_types_are_those_of_the_protocol(num_cases):
    names, seen = list(ERROR_TYPES), set()
    for seed in range(num_cases):
        prediction, mask = random_case(seed)
        counts, types = error_types(prediction, mask)
        expected = direct_types(prediction, mask)
        found = {(int(row), int(column)): names[types[row, column] - 1] for row, column in np.argwhere(types)}
        assert found == expected, seed
        assert counts == {name: list(expected.values()).count(name) for name in names}
        seen |= set(expected.values())
    assert seen == set(names)


def test_types_add_up_to_the_wrong_pixels_and_void_never_matters(num_cases):
    for seed in range(num_cases):
        prediction, mask = random_case(seed)
        generator = np.random.default_rng(seed)
        counts, types = error_types(prediction, mask)
        np.testing.assert_array_equal(types > 0, (mask != VOID) & (prediction != (mask == 1)))
        assert sum(counts.values()) == (types > 0).sum()
        other = np.where(mask == VOID, generator.random(mask.shape) < 0.5, prediction)
        np.testing.assert_array_equal(error_types(other, mask)[1], types)


def test_types_swap_with_truth_and_prediction(num_cases):
    for seed in range(num_cases):
        prediction, mask = random_case(seed)
        mask = (mask == 1).astype(np.uint8)
        one, two = error_types(prediction, mask)[0], error_types(mask == 1, prediction.astype(np.uint8))[0]
        assert (one["gap"], one["thin edge"], one["false joint"], one["thick edge"]) == (
            two["false joint"],
            two["thick edge"],
            two["gap"],
            two["thin edge"],
        )
        assert one["missed thin crack"] + one["missed wide crack"] == two["false branch"] + two["false crack"]


def counts_of(prediction, mask):
    return {name: count for name, count in error_types(prediction, mask)[0].items() if count}


def test_limiting_cases():
    bar, line, nothing = np.zeros((3, 40, 60), np.uint8)
    bar[10:18, 5:50], line[25, 5:50] = 1, 1
    for prediction, mask in ((bar, bar), (nothing, nothing), (bar, np.full_like(bar, VOID))):
        assert not counts_of(prediction, mask)
    assert counts_of(nothing, bar) == {"missed wide crack": 360}
    assert counts_of(nothing, line) == {"missed thin crack": 45}
    assert counts_of(nothing, bar | line) == {"missed wide crack": 360, "missed thin crack": 45}
    assert counts_of(line, nothing) == {"false crack": 45}
    assert counts_of(1 - bar, bar) == {
        "thin edge": 360 - 4 * 41,
        "missed wide crack": 4 * 41,
        "thick edge": 4 * 8 + 4 * 45 + 4,
        "false branch": 2400 - 360 - 216,
    }
    assert counts_of(np.roll(line, 1, axis=0), line) == {"thin edge": 45, "thick edge": 45}
    assert counts_of(nothing + 1, nothing) == {"false crack": 2400}
    cut = line.copy()
    cut[:, 40:] = 0
    assert counts_of(cut, line) == {"thin edge": 2, "missed thin crack": 8}


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 12])
def test_gaps_and_joints_of_every_length(length):
    line = np.zeros((30, 60), np.uint8)
    line[15, 5:55] = 1
    torn = line.copy()
    torn[15, 20 : 20 + length] = 0
    assert counts_of(torn, line) == {"gap": length}
    assert counts_of(line, torn) == {"false joint": length}
    torn[15, 20:23] = VOID  # an open end: what is predicted there joins nothing
    assert "false joint" not in counts_of(line, torn)
    assert sum(counts_of(line, torn).values()) == max(length - 3, 0)


def test_a_gap_that_a_loop_goes_around_is_none():
    ring = cv2.circle(np.zeros((40, 40), np.uint8), (20, 20), 12, 1)
    torn = ring.copy()
    torn[:16, 17:24] = 0
    assert "gap" not in counts_of(torn, ring)


EYES = [
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
]  # Machado et al. 2009


def seen_by(eye, colours):
    value = np.array(colours) / 255
    linear = np.clip(
        np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4) @ np.array(eye).T, 0, 1
    )
    return rgb2lab(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def test_colours_are_told_apart_by_every_eye():
    colours = [*ERROR_TYPES.values(), ERROR_COLOURS["hit"], VOID_COLOUR, (20,) * 3, (60,) * 3, (110,) * 3]
    for eye in EYES:
        lab = seen_by(eye, colours)
        distances = deltaE_ciede2000(lab[:, None], lab[None])[: len(ERROR_TYPES)]
        assert distances[~np.eye(*distances.shape, dtype=bool)].min() > 15


def test_pictures(hybrid):
    image = photo((75, 101))
    prediction, mask = np.zeros((2, 75, 101), np.uint8)
    mask[20, 10:90], mask[60:, 80:] = 1, VOID
    prediction[20, 10:40] = 1
    figure = show_errors(image, prediction * 0.4, mask, threshold=0.4)
    assert "missed thin crack: 48 px" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "hit" in [patch.get_label() for patch in type_legend()]
    picture = figure.axes[1].images[0].get_array()
    assert (picture[20, 42:90] == ERROR_TYPES["missed thin crack"]).all() and not (
        picture[:20] == ERROR_TYPES["missed thin crack"]
    ).all(2).any()
    one_line(lambda: show_errors(image, prediction[1:], mask), "answer: found shape (74, 101)")
    gates = cbam_maps(hybrid, image)
    for axis, gate in zip(show_cbam(image, gates).axes[:6:2], gates.values()):
        for bars, weights in zip(axis.patches, (gate.deep, gate.skip), strict=True):
            np.testing.assert_array_equal(bars.get_data().values, weights)
    figure = show_maps(image, attention_maps(hybrid, image, (1, 2)), (1, 2))
    assert len(figure.axes) == 16 and figure.axes[1].get_title().startswith("stage 1 block 1 (0 to ")
    assert show_maps(image, {"zero": np.zeros((75, 101))})


def test_gallery_is_sorted_and_shrinks_large_photos():
    cases = []
    for number, iou in enumerate((0.5, 0.1, 0.9)):
        size = (400 + number, 300)
        mask = np.zeros(size, np.uint8)
        mask[50, 20:280] = 1
        cases.append(Case(f"case {number}", photo(size), mask, np.zeros(size), 0.5, iou))
    figure = show_worst(cases, 2)
    assert [axis.get_title() for axis in figure.axes[::3]] == ["case 1: IoU 0.10", "case 0: IoU 0.50"]
    assert figure.axes[2].get_title() == "missed thin crack 260 px"
    picture = figure.axes[2].images[0].get_array()
    assert picture.shape[0] == 150 and (picture == ERROR_TYPES["missed thin crack"]).all(2).any()
    truth = figure.axes[1].images[0].get_array()
    assert truth.shape[0] == 150 and (truth == 255).all(2).any()  # the missed crack, though nothing was found
    one_line(lambda: show_worst([]), "cases: found none")
    one_line(lambda: show_worst(cases, 0), "count: found 0")
