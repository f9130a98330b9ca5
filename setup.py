"""Two corrections to the build; all else about the distribution is in pyproject.toml."""

from __future__ import annotations

import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPackage(build_py):
    """Copies the package into an empty folder, without this script.

    setuptools would keep modules left there by an earlier build, and it takes every Python file
    at the root of the repository, which is the root of the package, for a module of ``llmc``.
    """

    def run(self) -> None:
        """Begin with an empty build folder (an editable install copies nothing)."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of one package as (package, module, file)."""
        found = super().find_package_modules(package, package_dir)
        return [row for row in found if row[:2] != ("llmc", "setup")]


setup(cmdclass={"build_py": BuildPackage})
