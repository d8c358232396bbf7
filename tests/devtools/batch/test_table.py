"""Tables and folders as people have them, and names that stay in their folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devtools.batch.table import file_names, read_rows
from devtools.paths import UserError

pytestmark = pytest.mark.quick


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", '\ufeffname,prompt,seed\n"x, y","a\nb",3\n,"",\n'),
        ("a.tsv", 'name\tprompt\tseed\nx, y\t"a\nb"\t3\n\t\t\n'),
        ("a.jsonl", '{"name": "x, y", "prompt": "a\\nb", "seed": "3"}\n\n{"name": null, "prompt": null}\n'),
    ],
)
def test_tables_of_every_kind_are_read_alike(tmp_path, name, text):
    first, second = read_rows(write(tmp_path, name, text))
    assert (first.number, first.name) == (1, "x, y")
    assert first.values == {"name": "x, y", "prompt": "a\nb", "seed": "3"}
    # An empty cell is none: the graph's own value stays.
    assert (second.number, second.name, second.values) == (2, "00002", {})


def test_a_folder_is_pairs_with_prompts_and_several_holes(tmp_path):
    for name in ("b ü.jpg", "b ü.mask.png", "a.png", "a_0.mask.png", "a_1.mask.png", "lonely.png"):
        (tmp_path / name).touch()
    write(tmp_path, "b ü.txt", "a moon\n")
    write(tmp_path, "a_1.txt", "a star")
    found = [row.values for row in read_rows(tmp_path)]
    assert found == [
        {"name": "a_0", "image": "a.png", "mask": "a_0.mask.png"},
        {"name": "a_1", "image": "a.png", "mask": "a_1.mask.png", "prompt": "a star"},
        {"name": "b ü", "image": "b ü.jpg", "mask": "b ü.mask.png", "prompt": "a moon"},
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "x", "no table that can be read"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "name,prompt\n", "has no rows"),
        ("a.csv", "name,name\nx,y\n", "a column twice"),
        ("a.csv", "name,prompt\nx\n", "row 1: it has another number of cells than the 2 columns"),
        ("a.csv", "name,prompt\nx,y,z\n", "row 1: it has another number of cells"),
        ("a.jsonl", "{}\n{nothing\n", "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is no object"),
    ],
)
def test_a_table_that_is_none_is_one_sentence(tmp_path, name, text, said):
    with pytest.raises(UserError, match=said):
        read_rows(write(tmp_path, name, text))


def test_what_is_not_there_or_not_text_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no table or folder"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes("name\nä\n".encode("latin-1"))
    with pytest.raises(UserError, match="not text in UTF-8"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no pairs"):
        read_rows(tmp_path / "empty")
    (tmp_path / "empty" / "a.mask.png").touch()
    with pytest.raises(UserError, match="has no picture"):
        read_rows(tmp_path / "empty")


NASTY = ["../a", "a", "A", "a-2", "con", "NUL.png", "/etc/x", "..", "C:\\x"]


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(NASTY)), max_size=8))
def test_names_are_of_one_folder_and_of_one_row_each(names):
    found = file_names(names)
    assert len({name.casefold() for name in found}) == len(names)
    for name in found:
        assert name and Path(name).name == name and not name.startswith(".") and name == name.strip(" .")
        assert not set(name) & set('<>:"/\\|?*~\0\n')
        assert name.split(".")[0].lower() not in ("con", "nul")
    assert file_names(["a b ü", "../a", "a", "A"]) == ["a b ü", "a", "a-2", "A-3"]
