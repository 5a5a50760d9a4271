"""Draw cracks that the ready model marks, and how wide (the first picture of the README), and walls where it fails.

Run it after a change of the ready model, of prediction or of widths: `.venv/bin/python .ci/picture.py`.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from PIL import Image

from crackseg_nb import predict
from crackseg_nb.figures.cases import Case, show_cases
from crackseg_nb.figures.style import styled
from crackseg_nb.measure.photos import measure_folder
from crackseg_nb.runs.trained_model import open_model
from crackseg_nb.sources.images import normalize, read_image, read_mask

IMAGES = Path(__file__).resolve().parents[1] / "nbs" / "images"


@styled
def draw(photo: Path, folder: Path):
    points = measure_folder(folder, out=False, progress=False, min_length_px=20).points
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 2.5))
    overlay = next(folder.glob("*_overlay.jpg"))
    for axis, path, title in zip(
        axes, (photo, overlay, photo), ("photo", "cracks marked by the model", "their widths")
    ):
        axis.imshow(Image.open(path))
        axis.set(xticks=[], yticks=[], ylim=(298, 0), title=title)
    drawn = axes[2].scatter(points["column"], points["row"], c=points["width_px"], s=4, cmap="plasma", vmin=0)
    figure.colorbar(drawn, ax=axes[2], label="width [px]", shrink=0.9)
    return figure


def draw_errors(folder: Path):
    "Show its test images from UAVCrack with the lowest scores, which lie in `folder`."
    ready, cases = open_model("ready"), []
    scores = pd.read_csv(ready.folder / "predictions" / "per_image.csv").set_index("name")["iou"]
    for photo in folder.glob("*.jpg"):
        image, mask = read_image(photo), read_mask(photo.with_suffix(".png"), "0/255")
        with torch.inference_mode():
            probability = ready.model(normalize(image)[None]).sigmoid()[0, 0].numpy()
        cases.append(Case(photo.stem, image, mask, probability, ready.threshold, scores[f"uav/{photo.stem}"]))
    return show_cases(sorted(cases, key=lambda case: case.iou))


if __name__ == "__main__":
    draw_errors(IMAGES / "walls").savefig(IMAGES / "walls" / "errors.png")
    with tempfile.TemporaryDirectory() as folder:
        predict("ready", [IMAGES / "wall.jpg"], out=folder, device="cpu", progress=False)
        draw(IMAGES / "wall.jpg", Path(folder)).savefig(IMAGES / "wall_cracks.jpg", pil_kwargs=dict(quality=88))
