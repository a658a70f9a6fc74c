"""environment.yml without a channel: what its pins need, what pip makes of them, and how Binder reads it."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
PYTHON = next(line for line in ENVIRONMENT["dependencies"] if str(line).startswith("python=")).removeprefix("python=")
PIP = next(entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))["pip"]
BUILDER = shutil.which("jupyter-repo2docker")
needs_builder = pytest.mark.skipif(BUILDER is None, reason="no jupyter-repo2docker: make test-environment")


def faults_of_the_closure(lines: list[str], pins: dict[str, str], python: str) -> tuple[list[str], set[str]]:
    """What keeps the pins from being all that these requirements need with this Python; and what they need.

    Walks what the packages that are installed here require, with the markers of the other Python. A package that is
    not installed, or not at its pin, is left out: what it needs is not known.
    """
    elsewhere = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    faults, seen = [], set()
    todo = [(Requirement(line), "environment.yml") for line in lines]
    while todo:
        requirement, asking = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name not in pins:
            faults.append(f"{asking} needs {requirement}, which is not pinned")
        elif not requirement.specifier.contains(pins[name], prereleases=True):
            faults.append(f"{asking} needs {requirement}, which is pinned to {pins[name]}")
        if (name, extras) in seen or name not in pins:
            continue
        seen.add((name, extras))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if package.version != pins[name]:
            continue
        for inner in map(Requirement, package.requires or ()):
            where = [elsewhere | {"extra": extra} for extra in ("", *extras)]
            if inner.marker is None or any(map(inner.marker.evaluate, where)):
                todo.append((inner, f"{name} {pins[name]}"))
    return faults, {name for name, _ in seen}


def test_what_the_environments_pins_need_is_pinned_for_its_python():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in constraints if line and not line.startswith("#")]
    pins = {canonicalize_name(line.name): next(iter(line.specifier)).version for line in pinned}
    lines = [line for line in PIP if not line.startswith("-") and canonicalize_name(Requirement(line).name) in pins]
    faults, needed = faults_of_the_closure(lines, pins, PYTHON)
    assert faults == []
    assert len(needed) > 2 * len(lines)  # of those that were walked
    wrong = {name: version for name, version in pins.items() if name != "pillow"} | {"numpy": "1.0"}
    faults, _ = faults_of_the_closure(lines, wrong, PYTHON)
    assert any("pillow" in fault and "not pinned" in fault for fault in faults)
    assert any("numpy" in fault and "pinned to 1.0" in fault for fault in faults)


@needs_builder
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pip_finds_all_of_the_section_as_conda_writes_it(tmp_path):
    """Conda writes the section's lines to a file beside environment.yml and has pip read it in that folder.

    What they need is followed above: pip follows it for another Python only where all of it has wheels.
    """
    for name in ("pyproject.toml", "constraints.txt", "README.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "mupkg", tmp_path / "mupkg", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "condaenv.requirements.txt").write_text("\n".join(PIP), encoding="utf-8")
    command = [Path(BUILDER).with_name("python"), "-m", "pip", "install", "-r", "condaenv.requirements.txt"]
    command += ["--dry-run", "--ignore-installed", "--target", "target", "--no-deps", "--python-version", PYTHON]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    (last,) = (line for line in done.stdout.splitlines() if line.startswith("Would install "))
    made = {canonicalize_name(item.rpartition("-")[0]) for item in last.split()[2:]}
    assert made >= {canonicalize_name(Requirement(line).name) for line in PIP if not line.startswith("-")} | {"mupkg"}


@needs_builder
@pytest.mark.slow
def test_binder_takes_the_file_its_python_and_the_whole_repository_before_it(tmp_path):
    """Else `-e .` and `-c constraints.txt` would name nothing."""
    shutil.copyfile(ROOT / "environment.yml", tmp_path / "environment.yml")
    command = [BUILDER, "--no-build", "--debug", str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"py-2d{PYTHON.replace('.', '-2e')}" in done.stdout  # the base environment is of that Python
    copied, made = (done.stdout.index(step) for step in ("COPY --chown=0:0 src/", '--file "environment.yml"'))
    assert copied < made
