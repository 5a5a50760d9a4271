"""Put a finished run into the package as its ready model: settings, results and weights, as `crackseg_nb/ready/`.

    python .ci/ready.py RUN  # the name of a run in outputs/

The weights are stored in half precision, which halves the file. A run of no epochs, `RUN-tested`, then tests them as
stored, so that the results beside them are those of these very weights.
"""

import shutil
import sys
from pathlib import Path

from crackseg_nb.core.files import display_path
from crackseg_nb.core.run_folder import find_finished_run, ready_folder
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import run
from crackseg_nb.training.checkpoint import load_checkpoint, save_checkpoint

KEPT = ("config.yaml", "images.csv", "splits.yaml", "status.yaml")


def halved(source: Path, target: Path) -> None:
    "Copy a run's settings to `target` with its best weights in half precision."
    best = load_checkpoint(source / "checkpoints", "best")
    weights = {name: value.half() if value.is_floating_point() else value for name, value in best.model_state.items()}
    target.mkdir(parents=True)
    for name in KEPT:
        shutil.copy(source / name, target)
    (target / "checkpoints").mkdir()
    save_checkpoint(target / "checkpoints", "best", weights, metadata=best.metadata)


def main(name: str) -> None:
    source = find_finished_run("run", name).path
    half = source.with_name(f"{source.name}-half")
    tested = source.with_name(f"{source.name}-tested")
    for folder in (half, tested):  # of a former time
        shutil.rmtree(folder, ignore_errors=True)
    halved(source, half)
    run(
        configure(
            config=str(source / "config.yaml"),
            fine_tune=display_path(half),
            epochs=0,
            run_name=tested.name,
        )
    )
    folder = ready_folder()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(half, folder)
    (folder / "predictions").mkdir()
    for name in ("final_results.yaml", "environment.yaml", "predictions/per_image.csv"):
        shutil.copy(tested / name, folder / name)
    shutil.rmtree(half)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1])
