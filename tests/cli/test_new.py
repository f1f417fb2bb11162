# SPDX-License-Identifier: Apache-2.0
"""`fulgurite new`: the skeleton installs, is found, passes its own tests, and never overwrites anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fulgurite import cli
from tests.third_party.install import fulgurite as run


def install(folder: Path, site: Path) -> tuple[Path, Path]:
    """Do what an editable installation does, without an index and a build backend; return the folders for the path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    (package,) = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    name, version = project["project"]["name"], project["project"]["version"]
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    summary = project["project"]["description"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in project["project"]["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site, (folder / package).parent


def test_the_skeleton_installs_and_passes_its_tests(tmp_path, capsys):
    """Fails if what `new` writes is not found by its entry point, or its method or its tests do not work."""
    assert cli.main(["new", "my_method", "--dir", str(tmp_path / "made here")]) == 0
    folder = tmp_path / "made here" / "my_method"
    assert str(folder) in capsys.readouterr().out
    path = install(folder, tmp_path / "site")

    listed = run("list", "--json", path=path)
    (row,) = (row for row in json.loads(listed.stdout) if row["name"] == "my_method")
    assert (row["status"], row["distribution"]) == ("not loaded", "my-method")
    loaded = run("list", "--json", "--load", path=path)
    (row,) = (row for row in json.loads(loaded.stdout) if row["name"] == "my_method")
    assert (row["status"], row["kinds"]["intervention"]) == ("ok", ["MyMethod"])
    assert loaded.stderr == "", "a manifest must not import torch"

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "FULGURITE": ""}
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "my_method or pure or state_key"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "7 passed" in tests.stdout, "its five tests, and two checks of the conformance kit"


def test_nothing_is_left_of_the_placeholders(tmp_path):
    """Fails if a file, or its name, still has a placeholder."""
    cli.main(["new", "my_method", "--dir", str(tmp_path)])
    files = [path for path in (tmp_path / "my_method").rglob("*") if path.is_file()]
    names = {path.relative_to(tmp_path / "my_method").as_posix() for path in files}
    assert {"pyproject.toml", "README.md", ".gitignore", "src/my_method/CARD.md", "tests/test_my_method.py"} <= names
    for path in files:
        text = f"{path.relative_to(tmp_path)}\n{path.read_text()}"
        for placeholder in ("__slug__", "__Class__", "__distribution__", "__lower__", "__version__", ".tmpl"):
            assert placeholder not in text, path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Method", "a lower-case slug such as my_method, but got 'My-Method'"),
        ("../up", "a lower-case slug"),
        ("a__b", "a lower-case slug"),
        ("méthode", "a lower-case slug"),
        ("class", "'class', a keyword of Python"),
        ("none", "'none', a keyword of Python"),
        ("ps_kd", "'ps_kd', a plugin that is installed"),
        ("torch", "'torch', a module that is installed"),
        ("digits", "'digits', whose class would be Digits, a component that is installed"),
    ],
)
def test_names_that_cannot_be_used(name, message, tmp_path, capsys):
    """Fails if a plugin is made that could not be imported, or would clash with what is there."""
    assert cli.main(["new", name, "--dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_nothing_is_overwritten(make, tmp_path, capsys):
    """Fails if an existing folder or file of that name is written to."""
    make(tmp_path / "my_method")
    assert cli.main(["new", "my_method", "--dir", str(tmp_path)]) == 2
    assert "but it exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["my_method"]
