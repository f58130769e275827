"""The built wheel: what is in it, and that it works where no notebook tool is installed."""
import os, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD_FILES = ["settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md",
               "constraints.txt", "requirements-demo.txt"]
NOTEBOOK_TOOLS = ["nbdev", "fastcore", "execnb", "ghapi", "IPython", "ipykernel", "ipywidgets", "jupyter", "jupyter_client",
                  "jupyter_core", "nbformat", "nbconvert", "nbclient", "notebook", "jupytext", "pytest"]

BLOCK = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOTEBOOK_TOOLS!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""

def python(code, path, *args, **env):
    "Run Python code away from the repository, with the folder `path` in front of the installed packages."
    env = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run([sys.executable, "-c", code, *args], cwd=path.parent, env=env, capture_output=True, text=True)

def settings():
    "The settings of the project."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    return config["DEFAULT"]

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the sources."
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in BUILD_FILES: shutil.copy(ROOT/name, source)
    shutil.copytree(ROOT/"superhf", source/"superhf", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                    "-w", str(dist), str(source)], check=True)
    return next(dist.glob("*.whl"))

@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "The wheel's files, installed into a folder of their own."
    target = tmp_path_factory.mktemp("elsewhere")/"site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile",
                    "--target", str(target), str(wheel)], check=True)
    return target

def test_every_file_of_the_package_is_in_the_wheel(wheel):
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT/"superhf").rglob("*")
            if p.is_file() and "__pycache__" not in p.parts}
    assert here and {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("superhf/")} == here

def test_metadata_is_the_settings(wheel):
    files = zipfile.ZipFile(wheel)
    info = next(n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
    meta = Parser().parsestr(files.read(info).decode())
    cfg = settings()
    assert (meta["Name"], meta["Version"], meta["Requires-Python"]) == (cfg["lib_name"], cfg["version"], ">=" + cfg["min_python"])
    required = [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r]
    assert len(required) == len(cfg["requirements"].split())
    assert not [r for r in required for tool in NOTEBOOK_TOOLS if r.lower().startswith(tool.lower())]
    assert {"dev", "eval", "track"} <= set(meta.get_all("Provides-Extra"))
    assert cfg["console_scripts"].replace("=", " = ") in files.read(info.replace("METADATA", "entry_points.txt")).decode()

def test_the_block_blocks(installed):
    r = python(BLOCK + "import fastcore.test", installed)
    assert r.returncode == 1 and "No module named 'fastcore'" in r.stderr

def test_every_module_imports_without_notebook_tools(installed):
    r = python(BLOCK + """
import importlib, pkgutil, superhf
names = [m.name for m in pkgutil.walk_packages(superhf.__path__, "superhf.")]
for name in names: importlib.import_module(name)
print(superhf.__file__, superhf.__version__, len(names))""", installed)
    assert r.returncode == 0, r.stderr
    where, version, n = r.stdout.split()
    assert Path(where).parent == installed/"superhf" and version == settings()["version"]
    assert int(n) == len(list((ROOT/"superhf").rglob("*.py"))) - 1

def test_the_command_answers_without_notebook_tools(installed):
    r = python(BLOCK + """
from importlib.metadata import distribution
script = distribution("superhf").entry_points.select(group="console_scripts", name="superhf")["superhf"]
sys.argv = ["superhf", "--help"]
script.load()()""", installed)
    assert r.returncode == 0 and "superhf" in r.stdout and "train" in r.stdout, r.stderr
