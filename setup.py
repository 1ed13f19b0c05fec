"""Package metadata, all of it read from settings.ini."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def lines(key): return cfg[key].split("\n")[1:] if cfg[key].startswith("\n") else cfg[key].split()


low, high = cfg["min_python"], cfg["max_python"]
minors = range(int(low.split(".")[1]), int(high.split(".")[1]) + 1)
readme = HERE / "README.md"


class BuildWithNotebooks(build_py):
    "A wheel brings the notebooks and profiles, which the command `cxr_nb run` runs; an editable install reads nbs/ itself."

    def run(self):
        super().run()
        if self.editable_mode: return
        for path in sorted([*HERE.glob("nbs/*.ipynb"), *HERE.glob("nbs/profiles/*.yaml")]):
            target = Path(self.build_lib) / cfg["lib_path"] / "notebooks" / path.relative_to(HERE / "nbs")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    license="Apache-2.0",
    classifiers=["Intended Audience :: " + cfg["audience"]]
    + [f"Programming Language :: Python :: 3.{minor}" for minor in minors],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["published/*.csv", "miniature/**/*", "templates/*"]},
    cmdclass={"build_py": BuildWithNotebooks},
    python_requires=f">={low},<3.{minors[-1] + 1}",
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("real", "dev")},
    entry_points={"console_scripts": lines("console_scripts")},
    zip_safe=False,
)
