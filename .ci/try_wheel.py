"""Try a wheel as somebody would who has no checkout: the commands start, and one tiny run ends, in an empty folder.

The environment is new but takes the dependencies (gigabytes) from that of this Python: a line in a `.pth` file appends
its site-packages. Its own `.pth` files are not read on this way, so its editable install stays unseen.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

TINY = {
    "recipe": "quickstart",
    "test_epoch": "true",
    "synthetic_images": "12",
    "image_size": "32",
    "batch_size": "4",
    "amp": "off",
    "device": "cpu",
    "run_name": "tried",
}


def run(folder: Path, *words) -> str:
    "Run a command in `folder` and return what it printed; end with its messages if it fails."
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["JUPYTER_PATH"] = str(
        Path(sys.prefix, "share", "jupyter")
    )  # the templates of pages, which are no packages
    done = subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{' '.join(map(str, words))}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def create_environment(folder: Path, wheel: Path) -> Path:
    "Install `wheel` alone into a new environment; return the folder of its commands."
    venv.create(folder, with_pip=False, symlinks=os.name == "posix")
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    places = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run(folder, commands / "python", "-c", places).strip())
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--ignore-installed", "--no-index", "--quiet", "--disable-pip-version-check")
    run(folder, sys.executable, "-m", "pip", "--python", commands / "python", "install", *options, wheel)
    return commands


def try_wheel(wheel: Path) -> None:
    "Try the commands of `wheel`; end with a message at the first that fails."
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        environment, empty = Path(folder) / "environment", Path(folder) / "empty"
        empty.mkdir()
        commands = create_environment(environment, wheel)
        place = run(empty, commands / "python", "-c", "import crackseg_nb; print(crackseg_nb.__file__)").strip()
        if not Path(place).is_relative_to(environment.resolve()):
            sys.exit(f"{wheel.name}: tried {place}, expected the package that the wheel installed")
        for name in ("crackseg_run", "crackseg_sweep", "crackseg_verify", "crackseg_fetch"):
            run(empty, commands / name, "--help")
            print(f"{name} --help: works", flush=True)
        photo = "from crackseg_nb.synthetic.cracks import write_synthetic; write_synthetic('drawn', 1, (96, 128))"
        run(empty, commands / "python", "-c", photo)
        print(run(empty, commands / "crackseg_predict", "drawn/images").strip().splitlines()[-1], flush=True)
        print(run(empty, commands / "crackseg_measure", "predictions").strip().splitlines()[-1], flush=True)
        given = [word for name, value in TINY.items() for word in ("-p", name, value)]
        run(empty, commands / "crackseg_run", *given)
        kept = sorted(path.name for path in (empty / "outputs" / TINY["run_name"]).iterdir())
        if "final_results.yaml" not in kept or "result.ipynb" not in kept:
            sys.exit(f"crackseg_run: left {kept} in outputs/, expected final_results.yaml and result.ipynb among it")
        print(f"crackseg_run {' '.join(given)}: done, {len(kept)} files in outputs/{TINY['run_name']}")
        print(run(empty, commands / "crackseg_verify", f"outputs/{TINY['run_name']}").strip().splitlines()[-1])


if __name__ == "__main__":
    try_wheel(Path(sys.argv[1]).resolve())
