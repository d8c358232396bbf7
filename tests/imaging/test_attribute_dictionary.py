"""A subject's attributes in words: what is read, what is refused in one sentence, and the prompts made from them."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devtools.pack import pack_module
from truefill_testing.regions import one_sentence

pytestmark = pytest.mark.quick

dictionary = pack_module("imaging.attribute_dictionary")

TOY = dictionary.AttributeDictionary(
    "toy",
    {"color": ("red", "yellow"), "material": ("clay",), "parts": ("round eyes",)},
    {"color": ("blue",), "material": ("glass", "wooden")},
)
JSON = '{"class": "toy", "attributes": {"color": ["red", "yellow"], "material": ["clay"]}}'
PLAIN = dictionary.AttributeDictionary("toy", {"color": ("red", "yellow"), "material": ("clay",)})
TEXTS = st.text() | st.text("aA .,;\n[é") | st.sampled_from(["red", "Red", "light  blue", "...", "a", "the a", "none"])
KINDS = st.sampled_from(["color", "Colour", "material", "Surface_finish", "parts", ""]) | st.text(max_size=4)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.dictionaries(KINDS, st.lists(TEXTS)), st.dictionaries(KINDS, st.lists(TEXTS)))
def test_what_is_written_is_read_again(word, attributes, alternatives) -> None:
    try:
        made = dictionary.AttributeDictionary(word, attributes, alternatives)
    except ValueError as refused:
        assert str(refused).endswith(".") and "\n" not in str(refused)
        return
    assert dictionary.parse(dictionary.to_json(made)) == made
    assert dictionary.to_json(dictionary.parse(dictionary.to_json(made))) == dictionary.to_json(made)


def test_the_json_is_indented_and_keeps_the_order() -> None:
    assert json.loads(dictionary.to_json(PLAIN)) == json.loads(JSON)
    text = dictionary.to_json(TOY)
    assert text.startswith('{\n  "class": "toy",\n  "attributes": {\n    "color": [\n')
    assert list(json.loads(text)) == ["class", "attributes", "alternatives"]
    assert list(dictionary.parse(text).attributes) == ["color", "material", "parts"]


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        f"```json\n{JSON}\n```",
        f"Sure! Here is {{the}} dictionary {{}} for your picture:\n\n{JSON}\n\nAnything {{else}}?",
        f"[{JSON}]",
        '{"Class ": "a toy.", "ATTRIBUTES": {" Color": "red, yellow", "Material": "clay."}}',
        '{"class_word": "the toy", "attributes": {"colours": ["red, yellow"], "materials": ["clay", "Clay"]}}',
        '{"class name": "toy", "attributes": {"color": ["red"], "Colour": "yellow", "material": "clay", "texture": null}}',
        '{"Class-Name": " toy", "color": "red,\nyellow,", "material": [" clay "], "alternatives": {}}',
        '{"color": ["red", "yellow", "..."], "material": "clay", "shape": "[shape]", "texture": "N/A", "class": "toy"}',
        '{"class": "toy", "description": 5, "attributes": {"color": ["red", "yellow"], "material": "clay", "size": []}}',
    ],
)
def test_forms_that_captioners_write(text) -> None:
    found = dictionary.parse(text)
    assert (found.class_word, dict(found.attributes), dict(found.alternatives)) == (
        "toy",
        {"color": ("red", "yellow"), "material": ("clay",)},
        {},
    )
    assert found == PLAIN


def test_alternatives_are_read_and_keys_and_phrases_tidied() -> None:
    found = dictionary.parse(
        '{"class": "LEGO  figure", "surface_texture": "light  gray", "Alternatives": {"Color": "blue, dark red", "Parts": null}}'
    )
    assert found == dictionary.AttributeDictionary(
        "LEGO figure", {"surface texture": ("light gray",)}, {"color": ("blue", "dark red")}
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON at line 1, column 1"),
        ("\n  a red clay toy", "not JSON at line 2, column 3"),
        ("Here:\n{'class': 'toy'}", "not JSON at line 2, column 2"),
        ('{"class": "toy",\n "attributes": {"color": ["red" "yellow"]}}', r"not JSON at line 2, column 33 \("),
        ('{"class": "toy", "attributes": {"color": ["red"]}', "not JSON at line 1, column 50"),
        ('{"attributes": {"color": ["red"]}}', "no class word"),
        ('{"class": null, "attributes": {"color": ["red"]}}', "no class word"),
        ('{"class": "", "color": "red"}', "class word is empty"),
        ('{"class": "  ", "color": "red"}', "class word is empty"),
        ('{"class": "...", "color": "red"}', r"'\.\.\.' is only a placeholder"),
        ('{"class": "[class name]", "color": "red"}', "is only a placeholder"),
        ('{"class": "<the object>", "color": "red"}', "is only a placeholder"),
        ('{"class": "Class Word", "color": "red"}', "is only a placeholder"),
        ('{"class": "unknown", "color": "red"}', "is only a placeholder"),
        ('{"class": ["toy"], "color": "red"}', "class word is '.\"toy\".', but one text"),
        ('{"class": "toy"}', "no attributes"),
        ('{"class": "toy", "attributes": {}}', "no attributes"),
        ('{"class": "toy", "attributes": {"color": [], "material": "..."}}', "no attributes"),
        ('{"class": "toy", "attributes": ["red"]}', "'attributes' of the attribute dictionary is '.\"red\".'"),
        (
            '{"class": "toy", "attributes": {"color": 5}}',
            "'color' of the attribute dictionary is '5', but a text or a list",
        ),
        ('{"class": "toy", "attributes": {"color": {"body": "red"}}}', "'color' .* but a text or a list of texts"),
        ('{"class": "toy", "attributes": {"color": ["red", 1]}}', "'color' .* but a text or a list of texts"),
        ('{"class": "toy", "color": "red", "size": true}', "'size' .* is 'true', but a text or a list of texts"),
        ('{"class": "toy", "color": "red", "alternatives": {"color": 1}}', "'color' .* but a text or a list of texts"),
        (
            '{"class": "toy", "color": "red", "alternatives": "blue"}',
            "'alternatives' of the attribute dictionary is 'blue'",
        ),
        ('{"class": "toy", "attributes": {"color": [' + "[" * 90 + "]" * 90 + "]}}", "'color' .* but a text or a list"),
    ],
)
def test_other_texts_are_refused_in_one_sentence(text, says) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        dictionary.parse(text)
    assert one_sentence(refused) and len(str(refused.value)) < 240


def test_subject_prompts_recombine_the_attributes_around_token_and_class() -> None:
    assert dictionary.subject_prompts(TOY, "sks") == [
        "a photo of a sks toy",
        "a sks red toy",
        "a sks yellow toy",
        "a sks clay toy",
        "a sks toy with round eyes",
        "a sks clay toy with round eyes",
        "a sks red toy with round eyes",
        "a sks red clay toy",
        "a sks red clay toy with round eyes",
        "a sks yellow toy with round eyes",
        "a sks yellow clay toy",
        "a sks yellow clay toy with round eyes",
    ]


def test_adjectives_stand_in_their_order_and_phrases_behind_the_class() -> None:
    made = dictionary.AttributeDictionary(
        "toy",
        {
            "material": ("made of clay",),
            "color": ("red",),
            "size": ("large",),
            "mood": ("happy",),
            "shape": ("Red",),
            "parts": ("a tail",),
        },
    )
    prompts = dictionary.subject_prompts(made, " sks ")
    assert "a sks happy large Red toy made of clay with a tail" in prompts
    assert len(prompts) == len(set(prompts))


def test_a_large_dictionary_gives_64_prompts_spread_over_all_values() -> None:
    attributes = {
        kind: tuple(f"{kind}{number}" for number in range(5)) for kind in ("color", "material", "shape", "size")
    }
    made = dictionary.AttributeDictionary("toy", attributes)
    prompts = dictionary.subject_prompts(made, "sks")
    assert len(prompts) == len(set(prompts)) == 64
    assert prompts == dictionary.subject_prompts(made, "sks")
    for word in dictionary.words(made):
        # Once alone, and with others.
        assert f"a sks {word} toy" in prompts and sum(word in prompt for prompt in prompts) >= 4
    many = dictionary.AttributeDictionary("toy", {f"kind {number}": (f"one{number}",) for number in range(100)})
    assert len(dictionary.subject_prompts(many, "sks")) == 64


def test_a_word_of_two_kinds_is_said_once() -> None:
    made = dictionary.AttributeDictionary("toy", {"color": ("golden",), "material": ("Golden",)})
    assert dictionary.subject_prompts(made, "sks") == ["a photo of a sks toy", "a sks golden toy", "a sks Golden toy"]


@pytest.mark.parametrize(
    ("token", "expected"),
    [("sks", "a"), ("ohwx", "an"), ("<owl>", "an"), ("<toy-1>", "a"), ("one", "a"), ("8x8", "an")],
)
def test_the_article_suits_the_token(token, expected) -> None:
    assert dictionary.subject_prompts(PLAIN, token)[:2] == [
        f"a photo of {expected} {token} toy",
        f"{expected} {token} red toy",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(value, "a") for value in ("unique", "used", "European", "one-eyed", "heavy", "small")],
        *[(value, "an") for value in ("orange", "unimpressive", "upright", "hour-old", "Amber", "ornate", "11-sided")],
    ],
)
def test_the_article_suits_the_attribute(value, expected) -> None:
    made = dictionary.AttributeDictionary("toy", {"kind": ("own",)}, {"kind": (value,)})
    assert dictionary.regular_prompts(made, 1, 0) == [f"a photo of {expected} {value} toy"]


@pytest.mark.parametrize("token", ["", "  ", "toy", "Clay", "light blue"])
def test_a_token_that_means_something_else_is_refused(token) -> None:
    made = dictionary.AttributeDictionary("clay toy", {"color": ("red",)}, {"color": ("light blue",)})
    with pytest.raises(ValueError, match="own word") as refused:
        dictionary.subject_prompts(made, token)
    assert one_sentence(refused)


def test_regular_prompts_have_alternatives_and_common_words_but_nothing_of_the_subject() -> None:
    made = dictionary.AttributeDictionary(
        "teapot",
        {"color": ("red", "Dark Grey"), "material": ("wood",), "texture": ("stripes",), "parts": ("long spout",)},
        {"color": ("blue", "RED"), "parts": ("a handle",)},
    )
    prompts = dictionary.regular_prompts(made, 300, seed=2)
    assert len(prompts) == 300
    said = set()
    for prompt in prompts:
        found = re.fullmatch(r"a photo of an? (.*?) ?teapot( with a handle)?", prompt)
        assert found, prompt
        said |= set(found.group(1).split())
    common = dictionary.COMMON_WORDS
    expected = {"blue", *common["material"], *common["texture"]} - {"wooden", "striped"}
    assert said == expected
    assert not any(own in prompt for prompt in prompts for own in ("red", "RED", "wood", "stripe", "spout", "sks"))
    # With one kind, with several, and with all.
    assert "a photo of a blue teapot" in prompts and "a photo of a teapot with a handle" in prompts
    assert any(" blue " in prompt and prompt.endswith("handle") for prompt in prompts)


def test_the_seed_decides_about_regular_prompts_and_more_are_only_more() -> None:
    made = dictionary.regular_prompts(TOY, 12, seed=7)
    assert made == dictionary.regular_prompts(TOY, 20, seed=7)[:12]
    assert made != dictionary.regular_prompts(TOY, 12, seed=8)
    # One color or none, and one of two materials or none: five different ones, and then again.
    again = dictionary.regular_prompts(TOY, 40, seed=7)
    assert len(set(again[:5])) == 5 == len(set(again)) and len(again) == 40


def test_kinds_without_other_values_do_not_leave_regular_prompts_bare() -> None:
    made = dictionary.AttributeDictionary("dog", {"breed": ("corgi",), "parts": ("red collar",)})
    prompts = dictionary.regular_prompts(made, 40, seed=0)
    assert len(set(prompts)) == 40 and not any("red" in prompt.split() or "corgi" in prompt for prompt in prompts)
    # The only alternative is the subject's own.
    own = dictionary.AttributeDictionary("dog", {"color": ("red",)}, {"color": ("Red",)})
    for prompt in dictionary.regular_prompts(own, 20, seed=0):
        assert prompt.split()[-2] in set(dictionary.COMMON_WORDS["color"]) - {"red"}


@pytest.mark.parametrize("count", [0, -3])
def test_no_prompts_are_refused(count) -> None:
    with pytest.raises(ValueError, match="at least 1") as refused:
        dictionary.regular_prompts(TOY, count, 0)
    assert one_sentence(refused)


def test_the_words_of_the_subject_are_flat_and_each_is_there_once() -> None:
    made = dictionary.AttributeDictionary(
        "toy", {"color": ("red", "light blue"), "material": ("clay", "Red")}, {"color": ("green",)}
    )
    assert dictionary.words(made) == ["red", "light blue", "clay"]
