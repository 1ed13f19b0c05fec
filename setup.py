"""Package metadata, all of it read from settings.ini."""
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def lines(key): return cfg[key].split("\n")[1:] if cfg[key].startswith("\n") else cfg[key].split()


low, high = cfg["min_python"], cfg["max_python"]
minors = range(int(low.split(".")[1]), int(high.split(".")[1]) + 1)
readme = HERE / "README.md"


def refuse_own_files():
    "A wheel or a source archive is passed on: what git ignores in nbs/, and notebooks that hold what they showed, must not be in it."
    sys.path.insert(0, str(HERE))
    from cxr_nb.commit_check import why_refused
    files = [path for path in sorted(HERE.glob("nbs/**/*")) if path.is_file() and not {".ipynb_checkpoints", "outputs"} & {*path.parts}]
    refused = {name: why for path in files if (why := why_refused(name := path.relative_to(HERE).as_posix(), path.read_bytes()))}
    if refused: raise SystemExit("\n".join(f"cxr_nb: {name}: {why}; an archive is made without it" for name, why in refused.items()))


class SourceArchive(sdist):
    def run(self):
        refuse_own_files()
        super().run()


class BuildWithNotebooks(build_py):
    "A wheel brings the notebooks and profiles, which the command `cxr_nb run` runs; an editable install reads nbs/ itself."

    def run(self):
        super().run()
        if self.editable_mode: return
        refuse_own_files()
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
    cmdclass={"build_py": BuildWithNotebooks, "sdist": SourceArchive},
    python_requires=f">={low},<3.{minors[-1] + 1}",
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("real", "dev")},
    entry_points={"console_scripts": lines("console_scripts")},
    zip_safe=False,
)
