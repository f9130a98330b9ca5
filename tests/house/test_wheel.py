"""The wheel holds the whole package and nothing else, and works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def copy_checkout(repo: Path, names: list[Path], to: Path) -> None:
    """Copy the kept files, so that building leaves no trace in the checkout."""
    for name in names:
        if name.suffix != ".safetensors":
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repo / name, to / name)


@pytest.fixture(scope="module")
def wheel(repo: Path, kept_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from a copy of this checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_checkout(repo, kept_files, source)
    # A left-over build folder is what once slipped stale files into wheels.
    stale = source / "build" / "lib" / "llmc" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("raise AssertionError('stale')\n")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-q", "-w", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_whole_package(repo: Path, wheel: Path) -> None:
    """Every module, template and recipe of the checkout is in the wheel, and no test is."""
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = ["compiler", "passes", "codegen", "spec"]
    expected = {"llmc/__init__.py"}
    for folder in folders:
        for pattern in ("**/*.py", "**/*.j2", "**/*.yaml", "**/recipes/*.json"):
            found = (repo / folder).glob(pattern)
            expected |= {f"llmc/{path.relative_to(repo).as_posix()}" for path in found}
    assert len(expected) > 20
    assert not expected - names, f"missing from the wheel: {sorted(expected - names)}"
    inside = {name.split("/")[1] for name in names if name.startswith("llmc/")}
    assert inside <= {"__init__.py", "py.typed", *folders}, sorted(inside)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_compiles_the_demo_model(
    wheel: Path, pylm: Path, pylm_text: Path, tmp_path: Path
) -> None:
    """Installed apart and run from another folder, the wheel compiles the demo model."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True, timeout=300)
    out = tmp_path / "out"
    text = pylm_text / "calibration.txt"
    # The finder of an editable install would win over the path, so it goes.
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(site)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import llmc\n"
        f"assert llmc.__file__.startswith({str(site)!r}), llmc.__file__\n"
        "from llmc.compiler.cli import main\n"
        f"sys.argv = ['llmc', 'compile', {str(pylm)!r}, '--passes', 'w4', '-o', {str(out)!r},\n"
        f"            '--calibration', {str(text)!r}, '--samples', '8', '--length', '128']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list(out.glob("**/*.safetensors"))
