"""Draw nbs/images/wall_cracks.jpg, the first picture of the README: cracks that the ready model marks, and how wide.

Run it after a change of the ready model, of prediction or of widths: `.venv/bin/python .ci/picture.py`.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

from crackseg_nb import predict
from crackseg_nb.figures.style import styled
from crackseg_nb.measure.photos import measure_folder

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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        predict("ready", [IMAGES / "wall.jpg"], out=folder, device="cpu", progress=False)
        draw(IMAGES / "wall.jpg", Path(folder)).savefig(IMAGES / "wall_cracks.jpg", pil_kwargs=dict(quality=88))
