"""Package metadata, read from settings.ini; the notebooks that are run as they stand go along as package data."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
config = ConfigParser(interpolation=None)
config.read(ROOT / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
PACKAGE = settings["lib_path"]
# Chapters begin with a digit, and the index is the home page; the rest of nbs/ is run: `core.files.door` finds it.
DOORS = [path for path in sorted((ROOT / "nbs").glob("[!0-9]*.ipynb")) if path.stem != "index"]


class BuildWithDoors(build_py):
    """Build the package with a copy of the doors; an editable install finds those of the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / PACKAGE / "doors"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for path in DOORS:
                shutil.copy(path, folder)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_packages(include=[PACKAGE, PACKAGE + ".*"]),
    package_data={PACKAGE: ["py.typed", "figures/*.mplstyle", "ready/*.*", "ready/*/*"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={
        name: settings[f"{name}_requirements"].split()
        for name in ("dev", "benchmark", "artefact", "compression", "geo", "heif", "onnx", "weights", "docs", "browser")
    },
    cmdclass={"build_py": BuildWithDoors},
    entry_points={
        "console_scripts": settings.get("console_scripts", "").split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
