"""The wheel holds the package, its data and the command, and no other top-level name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).parent.parent
BUILD = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel of this tree, built by the build backend itself, without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ray_sql", "jobs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored, symlinks=True)
    command = [sys.executable, "-c", BUILD, str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_has_one_top_level_package(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    (info,) = {name.split("/")[0] for name in names} - {"ray_sql"}
    assert info.endswith(".dist-info")


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    tracked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ray_sql").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("ray_sql/")}
    assert packed == tracked
    assert "ray_sql/demo_data/demo.yaml" in packed


def test_the_wheel_installs_the_command(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "ray-sql = ray_sql.__main__:main" in archive.read(name).decode()


@pytest.mark.slow
def test_the_installed_command_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    installed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(installed))

    def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [venv / "bin" / program, *words]
        return subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)

    assert "finetune" in run("ray-sql", "--help").stdout
    assert run("ray-sql", "finetune", "--help").stdout.startswith("usage: ray-sql finetune")
    refused = run("ray-sql", "demo", "--seed", "none")
    assert (refused.returncode, refused.stderr[:20]) == (2, "error: --seed: 'none")
    assert "No module named 'jobs'" in run("python", "-c", "import jobs").stderr
    code = "from ray_sql import __file__; print(__file__)"
    assert run("python", "-c", code).stdout.startswith(str(site))
