from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import UsageError
from configs.plugins import find_plugin, plugin_names


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with plug-ins on disk; what was imported from it is forgotten at the end."""
    folder = tmp_path / "zoo" / "animals"
    (folder / "deer").mkdir(parents=True)
    (folder / "no_package").mkdir()
    for file in ["../__init__.py", "__init__.py", "cat.py", "dog.py", "_hidden.py", ".cow.py", "deer/__init__.py"]:
        (folder / file).write_text("SOUND = 'none'\n")
    (folder / "notes.txt").write_text("")
    (folder / "broken.py").write_text("import math\n\nmath.nothing()\n")
    (folder / "typo.py").write_text("x = (\n")
    (folder / "needy.py").write_text("import not_installed_anywhere.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield "zoo.animals"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_names_are_the_files_and_nothing_is_imported(package: str) -> None:
    assert plugin_names(package) == ["broken", "cat", "deer", "dog", "needy", "typo"]
    assert not [name for name in sys.modules if name.startswith("zoo.animals")]


def test_a_name_is_its_file(package: str) -> None:
    assert find_plugin(package, "cat").__name__ == "zoo.animals.cat"
    assert find_plugin(package, "deer").SOUND == "none"


@pytest.mark.parametrize("name", ["dgo", "", "_hidden", "../cat", "cat.py "])
def test_a_wrong_name_is_answered_with_all_names(package: str, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_plugin(package, name)
    message = str(caught.value)
    assert "There are: broken, cat, deer, dog, needy, typo." in message or "is not a module path" in message
    assert ("Did you mean 'dog'?" in message) == (name == "dgo")


def test_a_name_with_a_dot_is_a_module_of_the_current_folder(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "mine").mkdir(parents=True)
    (elsewhere / "mine" / "model.py").write_text("SOUND = 'own'\n")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert find_plugin(package, "mine.model").SOUND == "own"
    with pytest.raises(UsageError, match=r"no module 'mine\.modle'"):
        find_plugin(package, "mine.modle")
    with pytest.raises(UsageError, match="no module 'yours'"):
        find_plugin(package, "yours.model")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", r"AttributeError: .*broken\.py:3"),
        ("typo", r"SyntaxError: .*typo\.py:1"),
        ("needy", r"needs the module 'not_installed_anywhere"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_the_line(package: str, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_plugin(package, name)
