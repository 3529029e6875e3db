"""The packages' layout: docs name places that exist, folders stay small, module names are the field's."""

from __future__ import annotations

import ast
import configparser
import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

from bd3_common import PACKAGES, ROOT

DOCS = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PLACE = re.compile(rf"`((?:{'|'.join(PACKAGES)})[\w.]*):([\w.]+)`")
FILE = re.compile(rf"`((?:{'|'.join(PACKAGES)}|docs|examples|tests|scripts)/[\w./-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
MOST_MODULES = 12
AVOIDED = {"agree", "together", "attempt", "ending", "verdict", "suspects", "pieces", "held", "boxes", "heart", "guard"}
AVOIDED |= {"say", "patient"}


def test_architecture_names_many_places():
    assert len(PLACE.findall(ARCHITECTURE)) > 30


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_places_in_the_code_that_docs_name_exist(path):
    for module, names in PLACE.findall(path.read_text()):
        reduce(getattr, names.split("."), importlib.import_module(module))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_files_that_docs_name_exist(path):
    text = path.read_text()
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    for target, heading in LINK.findall(text):
        file = path.parent / target if target else path
        if not file.exists() or (heading and heading not in headings(file)):
            missing.append(f"{target}#{heading}")
    assert missing == []


def test_the_diagram_equals_the_import_contracts():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    contracts = [config[name] for name in config if name.startswith("importlinter:contract:")]
    assert contracts
    for contract in contracts:
        if contract["type"] != "layers":
            continue
        layers = contract["layers"].strip().splitlines()
        for container in contract.get("containers", "").split() or [None]:
            lines = layers if container is None else [container, *(f"    {layer}" for layer in layers)]
            # Remarks may follow after two spaces.
            text = r"\n".join(re.escape(line.rstrip()) + r"(?:  .*)?" for line in lines)
            assert re.search(rf"^{text}$", ARCHITECTURE, re.MULTILINE), "\n".join(lines)


def modules() -> list[Path]:
    return [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def test_folders_are_small():
    counts: dict[Path, int] = {}
    for path in modules():
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    assert [folder for folder, n in counts.items() if n > MOST_MODULES and folder.name != "commands"] == []


def test_module_names_are_the_fields():
    commands = Path("pretrain/commands")
    bad = [path for path in modules() if AVOIDED & {path.stem, path.stem.rstrip("s"), f"{path.stem}s"}]
    assert [path for path in bad if path != commands / "attempt.py"] == []


def headings(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_defaults_of_configuration_fields_are_named():
    positional = []
    for path in [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Field":
                positional += [f"{path}:{call.lineno}" for default in call.args if ast.unparse(default) != "..."]
    assert positional == []
