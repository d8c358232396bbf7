"""The editor's texts in other languages: complete, none left over, and what must not be translated is as it was."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from devtools.pack import ROOT

LANGUAGES = ("de", "es", "fr", "ja", "ko", "pt-BR", "ru", "zh", "zh-TW")
Path = tuple[str, ...]
"""Of a text in a file: ("TrueFillRASG", "inputs", "eta", "tooltip")."""


@pytest.fixture(scope="module")
def schemas(pack: ModuleType) -> dict[str, dict[str, Any]]:
    """What the host tells the editor of each node."""

    async def nodes() -> list[Any]:
        return await (await pack.comfy_entrypoint()).get_node_list()

    told = [node.GET_NODE_INFO_V1() for node in asyncio.run(nodes())]
    return {info["name"]: info for info in told}


def inputs(schema: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Type and options of each input."""
    kinds = schema["input"]
    return {name: (spec[0], spec[1]) for kind in ("required", "optional") for name, spec in kinds.get(kind, {}).items()}


def english(schemas: dict[str, dict[str, Any]]) -> dict[Path, str]:
    """All texts to translate. A socket that is named after its type keeps that name."""
    texts: dict[Path, str] = {}
    for node, schema in schemas.items():
        texts[node, "display_name"] = schema["display_name"]
        texts[node, "description"] = schema["description"]
        for name, (_, options) in inputs(schema).items():
            texts[node, "inputs", name, "name"] = name
            texts[node, "inputs", name, "tooltip"] = options.get("tooltip", "")
        for number, (name, tooltip) in enumerate(zip(schema["output_name"], schema["output_tooltips"], strict=True)):
            texts[node, "outputs", str(number), "name"] = "" if name.isupper() else name
            texts[node, "outputs", str(number), "tooltip"] = tooltip or ""
    return {path: text for path, text in texts.items() if text}


def leaves(tree: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def translated(language: str) -> dict[Path, str]:
    file = ROOT / "locales" / language / "nodeDefs.json"
    return dict(leaves(json.loads(file.read_text(encoding="utf-8"))))


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:\.\d+)?", text))


def test_the_languages() -> None:
    assert sorted(folder.name for folder in (ROOT / "locales").iterdir()) == sorted(LANGUAGES)


@pytest.mark.quick
@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_missing_and_nothing_left_over(language: str, schemas: dict[str, dict[str, Any]]) -> None:
    theirs, ours = translated(language), english(schemas)
    assert not ours.keys() - theirs.keys(), "not translated yet"
    assert not theirs.keys() - ours.keys(), "no longer there"
    assert all(text.strip() for text in theirs.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_and_texts(language: str, schemas: dict[str, dict[str, Any]]) -> None:
    theirs, ours = translated(language), english(schemas)
    for path, text in ours.items():
        if path[-1] == "display_name":
            assert theirs[path].endswith(" (TrueFill)"), path
        elif path[-1] != "name":
            assert theirs[path] != text, path
            assert numbers(theirs[path]) == numbers(text), path


@pytest.mark.parametrize("language", LANGUAGES)
def test_choices_that_a_text_explains_are_called_as_in_the_list(
    language: str, schemas: dict[str, dict[str, Any]]
) -> None:
    theirs = translated(language)
    explained = 0
    for node, schema in schemas.items():
        for name, (kind, options) in inputs(schema).items():
            for choice in map(str, options.get("options", []) if kind == "COMBO" else []):
                if any(form in options.get("tooltip", "") for form in (f"{choice}:", f"'{choice}'")):
                    assert choice in theirs[node, "inputs", name, "tooltip"], (node, name, choice)
                    explained += 1
    assert explained > 30


def view_texts(language: str) -> dict[str, str]:
    return json.loads((ROOT / "js" / "texts" / f"{language}.json").read_text(encoding="utf-8"))


@pytest.mark.quick
def test_the_views_texts_are_those_that_they_ask_for() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "js").glob("*.js"))
    assert set(re.findall(r"\btext\('(\w+)'\)", source)) == view_texts("en").keys()
    (known,) = re.findall(r"LANGUAGES = \[ENGLISH, (.*)\]", source)
    assert sorted(re.findall(r"'([\w-]+)'", known)) == sorted(LANGUAGES)


@pytest.mark.quick
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_views_texts(language: str) -> None:
    ours, theirs = view_texts("en"), view_texts(language)
    assert theirs.keys() == ours.keys()
    for name, text in theirs.items():
        assert text.strip() and text != ours[name], name
        assert numbers(text) == numbers(ours[name]), name
        if "+Z" in ours[name]:
            assert "+Z" in text, name
