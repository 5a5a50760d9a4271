"""Measured costs against known ones: bytes, parameters, operations, memory; and the front against its definition."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.models.layers import conv_norm_relu
from crackseg_nb.models.registry import create_model
from crackseg_nb.studies.compression import Ensemble, prune_weights, quantize_int8
from crackseg_nb.studies.efficiency import (
    compare_latency,
    file_size,
    frontier_table,
    measure_memory,
    median_latency,
    pareto,
    show_frontier,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def small(width=32):
    torch.manual_seed(0)
    return nn.Sequential(*conv_norm_relu(3, width, 3), nn.Conv2d(width, 1, 1)).eval()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    return quantize_int8(small(), [torch.rand(1, 3, 32, 32)], tmp_path_factory.mktemp("int8") / "small.onnx")


class Local(nn.Module):
    "Count the images."

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, images):
        self.seen += 1
        return images[:, :1]


def test_file_size_is_that_of_the_file(tmp_path, quantised):
    model = create_model("unet", encoder="mobilenet_v3_small", image_size=64, pretrained="false")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert (
        file_size(model) == (tmp_path / "model.safetensors").stat().st_size == file_size(tmp_path / "model.safetensors")
    )
    assert file_size(quantised) == quantised.path.stat().st_size
    assert file_size(Ensemble([quantised, model])) == pytest.approx(file_size(quantised) + file_size(model), rel=1e-3)
    assert 0.8 * file_size(model) < file_size(model, compressed=True) < file_size(model)


def test_rounds_take_turns_and_count_after_the_warm_up():
    models = {"one": Local(), "two": Local()}
    table = compare_latency(models, (32, 40), threads=(1, 2), rounds=4, warmup=2)
    assert [model.seen for model in models.values()] == [2 * (4 + 2)] * 2
    assert table.groupby(["threads", "round"])["model"].apply(set).map(len).eq(2).all() and len(table) == 16
    assert set(table["round"]) == {1, 2, 3, 4} and (table["ms"] > 0).all()
    firsts = table.groupby(["threads", "round"])["model"].first()
    assert set(firsts) == {"one", "two"}  # neither always goes first
    known = pd.DataFrame({"model": "a", "threads": 1, "ms": [1.0, 2, 3, 4, 100]})
    assert median_latency(known).loc[("a", 1)].to_dict() == {"median": 3, "lower": 2, "upper": 4}


def test_threads_are_put_back_when_a_model_fails():
    class Broken(Local):
        def forward(self, images):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        compare_latency({"broken": Broken()}, (32, 32), threads=(2,))
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_memory_is_that_of_the_maps():
    grown = measure_memory(nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU()), (512, 1024))
    assert np.isnan(grown) or grown == pytest.approx(2 * 16 * 512 * 1024 * 4, rel=0.02)  # both maps exist at once
    with pytest.raises(CrackSegError, match="memory: the forward pass of Linear failed in a process of its own"):
        measure_memory(nn.Linear(7, 1), (32, 32))


def test_memory_of_a_class_that_no_other_process_knows():
    class Inner(Local):
        pass

    with pytest.raises(CrackSegError, match="memory: Inner cannot be handed to another process"):
        measure_memory(Inner(), (32, 32))


def test_rows_of_the_table(quantised, monkeypatch):
    monkeypatch.setattr("crackseg_nb.studies.efficiency.measure_memory", lambda model, size: float(size[0]))
    pruned = small()
    prune_weights(pruned, 0.5)
    table = frontier_table({"pruned": pruned, "INT8": quantised}, (64, 64), threads=(1,), rounds=2)
    parameters, zeros = (
        sum(count(value) for value in pruned.parameters())
        for count in (torch.numel, lambda value: int((value == 0).sum()))
    )
    assert table.loc["pruned", ["parameters", "zeros", "gflops"]].tolist() == [
        parameters,
        zeros / parameters,
        2 * 64 * 64 * (32 * 27 + 32) / 1e9,
    ]
    assert table.loc["INT8", ["parameters", "zeros", "gflops"]].isna().all()
    assert table["ms_1"].notna().all() and "ms_2" not in table and (table["memory_bytes"] == 64).all()


def test_front_by_brute_force():
    numbers = np.random.default_rng(0).integers(0, 6, (40, 2)).astype(float)  # with many ties
    numbers[3, 0] = numbers[7, 1] = np.nan
    table = pd.DataFrame(numbers, columns=["cost", "score"])
    expected = [
        not any(b[0] <= a[0] and b[1] >= a[1] and (b[0] < a[0] or b[1] > a[1]) for b in numbers)
        and not np.isnan(a).any()
        for a in numbers
    ]
    assert list(pareto(table, "cost", "score")) == expected and 0 < sum(expected) < 40
    front = numbers[expected]
    for one, other in itertools.combinations(front[front[:, 0].argsort()], 2):
        assert one[1] <= other[1]


def test_picture_marks_the_front():
    table = pd.DataFrame(
        {"file_bytes": [1e6, 2e6, 3e6, 4e6], "iou": [0.5, 0.7, 0.6, np.nan], "ms_2": [5.0, 4, 3, 2]}, index=list("abcd")
    )
    axis = show_frontier(table).axes[0]
    points = {
        tuple(line.get_xydata()[0]): line.get_markerfacecolor() for line in axis.lines if line.get_marker() == "o"
    }
    assert set(points) == {(1, 0.5), (2, 0.7), (3, 0.6)}
    assert [name for name, colour in points.items() if colour == "white"] == [(3, 0.6)]
    assert (
        axis.get_xlabel() == "MB of the file"
        and show_frontier(table, "ms_2").axes[0].get_xlabel() == "ms of an image, 2 threads"
    )
    with pytest.raises(CrackSegError, match="column: found 'io'"):
        show_frontier(table, "file_bytes", "io")
