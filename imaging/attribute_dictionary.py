"""What a subject looks like, in words: the dictionary of DreamMix's attribute decoupling, and the prompts made from it.

DreamMix (section 3.3, figure 3) lets a vision-language model list a subject's attributes and recombines them in prompts of the
form "a [sks] [attributes] [class name] [attributes]", so that its own word does not swallow the attributes. Here the model, or
a person, writes JSON:

    {"class": "toy",
     "attributes": {"color": ["red", "yellow"], "material": ["clay"], "parts": ["round eyes"]},
     "alternatives": {"color": ["blue"], "material": ["glass", "wooden"]}}

Differs from the paper: there the prompts of regular pictures have the subject's own word and attributes. Here they have others
of the same kinds and never its word, so that what is learned of the subject is not learned of other things.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST_PROMPTS = 64

COMMON_WORDS: Mapping[str, tuple[str, ...]] = {
    kind: tuple(listed.split())
    for kind, listed in {
        "color": "red orange yellow green blue purple pink brown black white gray turquoise",
        "material": "wooden glass metal plastic ceramic stone leather paper clay rubber woolen",
        "texture": "smooth rough glossy matte fluffy striped dotted cracked",
        "shape": "round square flat slender curved angular oval",
    }.items()
}
"""Other values for a kind that a dictionary has no alternatives for."""

_EXAMPLE = '{"class": "toy", "attributes": {"color": ["red", "yellow"], "material": ["clay"]}}'
_CLASS_KEYS = ("class", "class word", "class name", "classword", "classname")
_ATTRIBUTE_KEYS = ("attributes", "attribute")
_ALTERNATIVE_KEYS = ("alternatives", "alternative")
_SAME_KIND = {
    "colour": "color",
    "colors": "color",
    "colours": "color",
    "materials": "material",
    "textures": "texture",
    "shapes": "shape",
    "patterns": "pattern",
    "part": "parts",
    "accessory": "accessories",
    "detail": "details",
    "feature": "features",
}
# The order in which English has adjectives; kinds that are not here come first.
_ORDER = ("size", "texture", "shape", "color", "pattern", "material")
# Said with "with" behind the class; all others are said before it.
_PARTS = ("parts", "accessories", "details", "features")
# A phrase of several words that begins with one of these can only follow the class: "made of clay".
_FOLLOWING = ("with", "without", "in", "on", "of", "from", "made", "covered", "holding", "wearing")
_NO_ANSWER = ("none", "n/a", "null", "unknown")
_NO_CLASS = ("class", "class word", "class name", "name", "word")
# How often a new prompt is looked for before one is repeated.
_TRIES = 20

# Letters and sounds differ in "a unicorn", "a one-eyed cat", "an hourglass", "an 8-bit figure".
_AN = re.compile(r"(?!eu|ew|ufo|uni(?![mn])|us[eu]|u[kt]|onc?e)[aeiou]|hour|honou?r|honest|heir|8|1[18](?!\d)")
_ARTICLES = re.compile(r"^(?:(?:an?|the)\s+|[\s.])+", re.IGNORECASE)

_Chosen = Sequence[tuple[str, str]]
"""Kinds, each with one value."""


@dataclass(frozen=True)
class AttributeDictionary:
    """A subject's class and attributes. However it is made, it is tidied, so that two that say the same are equal.

    class_word: what the subject is, without an article: "toy".
    attributes: for each kind ("color", "material", "texture", "shape", "parts", ...) words or short phrases of the subject as it
        is in its pictures. Kinds are in lower case, with single spaces for underscores and hyphens; British and plural forms of
        the usual ones are one with them ("Colours" is "color"). Phrases keep their case; commas part them, equal ones are kept
        once, placeholders ("...", "[color]", "n/a") and kinds without any are left out.
    alternatives: other values of each kind, which prompts of regular pictures take.

    Raises ValueError, in one sentence, for a class word that is empty or a placeholder, and for no attributes.
    """

    class_word: str
    attributes: Mapping[str, tuple[str, ...]]
    alternatives: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_word", _class_word(self.class_word))
        object.__setattr__(self, "attributes", _tidy(self.attributes))
        object.__setattr__(self, "alternatives", _tidy(self.alternatives))
        if not self.attributes:
            raise ValueError(f"The attribute dictionary has no attributes of the subject: write such as {_EXAMPLE}.")


def parse(text: str) -> AttributeDictionary:
    """The dictionary in a text, as a captioner or a person writes it.

    Taken is the first JSON object; what stands around it does not matter. A value is a list of texts or one text; null is none.
    Of keys, neither case nor spaces, underscores and hyphens matter. The class may be called "class", "class word" or "class
    name". Without "attributes", all other keys but "alternatives" are kinds; with it, they are ignored.

    Raises ValueError, in one sentence, for a text without a JSON object (saying where), no class word, no attributes, and a
    value of another type.
    """
    entries = {_key(name): value for name, value in _first_object(text).items()}
    word = _first(entries, _CLASS_KEYS)
    if word is None:
        raise ValueError(
            f"The attribute dictionary has no class word, which says what the subject is: write such as {_EXAMPLE}."
        )
    if not isinstance(word, str):
        raise ValueError(f'The class word is {_short(word)}, but one text is needed, such as "toy".')
    attributes = _first(entries, _ATTRIBUTE_KEYS)
    if attributes is None:
        others = (*_CLASS_KEYS, *_ATTRIBUTE_KEYS, *_ALTERNATIVE_KEYS)
        attributes = {name: value for name, value in entries.items() if name not in others}
    alternatives = _first(entries, _ALTERNATIVE_KEYS)
    return AttributeDictionary(word, _kinds(attributes, "attributes"), _kinds(alternatives or {}, "alternatives"))


def to_json(d: AttributeDictionary) -> str:
    """The dictionary as indented JSON, in its own order; `parse` reads it again. Without alternatives they are left out."""
    written: dict[str, Any] = {"class": d.class_word, "attributes": d.attributes}
    if d.alternatives:
        written["alternatives"] = d.alternatives
    return json.dumps(written, indent=2, ensure_ascii=False)


def words(d: AttributeDictionary) -> list[str]:
    """All words and phrases of the subject's own attributes, each once, in the dictionary's order."""
    return _once(value for values in d.attributes.values() for value in values)


def subject_prompts(d: AttributeDictionary, token: str) -> list[str]:
    """Prompts for the subject's own pictures, at most 64 different ones, always in the same order.

    First "a photo of a {token} {class}", then the paper's form with each attribute alone, then with several, one of each kind:
    "a {token} red clay toy with round eyes". Parts and phrases such as "made of clay" follow the class, all else stands between
    the token and the class. Where not all combinations fit in, they are spread evenly over all.

    Raises ValueError for an empty token, and for one that is also in the class word or a value: it has to mean the subject alone.
    """
    token = " ".join(token.split())
    if not token:
        raise ValueError('The subject\'s own word is empty: write one that means nothing else, such as "sks".')
    for text in (d.class_word, *words(d), *_once(value for values in d.alternatives.values() for value in values)):
        if f" {token.casefold()} " in f" {text.casefold()} ":
            raise ValueError(
                f"The subject's own word {_short(token)} is in {_short(text)} of the attribute dictionary as well: take one "
                'that means nothing else, such as "sks".'
            )
    prompts = {f"a photo of {_phrase(d.class_word, [], token)}": None}
    for kind, values in d.attributes.items():
        prompts.update({_phrase(d.class_word, [(kind, value)], token): None for value in values})
    several = _combinations(d.attributes, max(MOST_PROMPTS - len(prompts), 0))
    prompts.update({_phrase(d.class_word, chosen, token): None for chosen in several})
    return list(prompts)[:MOST_PROMPTS]


def regular_prompts(d: AttributeDictionary, count: int, seed: int) -> list[str]:
    """`count` prompts for regular pictures, which show others of the class: "a photo of a blue glass toy".

    Each has one or several kinds of the dictionary at random, with one of the kind's alternatives, or, where it has none, of
    `COMMON_WORDS`; other kinds are left out. Where nothing is left, the kinds of `COMMON_WORDS` are taken. No value is one of
    the subject's own, of whatever kind; a common word is not even alike ("wooden" and "wood"). The subject's own word is never
    said. Prompts differ as long as a few tries find new ones. The same seed gives the same prompts, and a larger count only
    more of them.

    Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"{count} prompts were asked for, but at least 1 is needed.")
    others = _others(d, [*d.attributes, *d.alternatives]) or _others(d, COMMON_WORDS)
    rng = np.random.default_rng(seed)
    made: list[str] = []
    known = set()
    while len(made) < count:
        prompt = ""
        for _ in range(_TRIES):
            prompt = f"a photo of {_phrase(d.class_word, _drawn(others, rng))}"
            if prompt not in known:
                break
        known.add(prompt)
        made.append(prompt)
    return made


def _first_object(text: str) -> dict[str, Any]:
    # An example such as {this} in a sentence is none; where nothing looks like an object, the first brace tells what is wrong.
    opening = re.search(r'\{\s*"', text) or re.search(r"\{", text)
    try:
        if opening is None:
            raise json.JSONDecodeError("No { opens an object", text, len(text) - len(text.lstrip()))
        # Not strict: a line break within a text is harmless.
        return json.JSONDecoder(strict=False).raw_decode(text, opening.start())[0]
    except json.JSONDecodeError as wrong:
        raise ValueError(
            f"The attribute dictionary is not JSON at line {wrong.lineno}, column {wrong.colno} ({wrong.msg}): write such as "
            f"{_EXAMPLE}."
        ) from None


def _kinds(found: Any, name: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(found, dict):
        raise ValueError(
            f"'{name}' of the attribute dictionary is {_short(found)}, but kinds with their words are needed, such as "
            '{"color": ["red", "yellow"]}.'
        )
    return {kind: _texts(kind, value) for kind, value in found.items()}


def _texts(kind: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, list) and all(isinstance(of, str) for of in texts)):
        raise ValueError(
            f"{_short(kind)} of the attribute dictionary is {_short(value)}, but a text or a list of texts is needed, such as "
            '["red", "yellow"].'
        )
    return tuple(texts)


def _class_word(text: str) -> str:
    word = _ARTICLES.sub("", " ".join(text.split())).rstrip(" .")
    if not text.strip():
        raise ValueError('The class word is empty: say in one or two words what the subject is, such as "toy".')
    if _is_placeholder(word) or _key(word) in _NO_CLASS:
        raise ValueError(
            f'The class word {_short(text)} is only a placeholder: say in one or two words what the subject is, such as "toy".'
        )
    return word


def _tidy(kinds: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for kind, texts in kinds.items():
        name = _SAME_KIND.get(_key(kind), _key(kind))
        for text in [texts] if isinstance(texts, str) else texts:
            parts = (" ".join(part.split()).strip(" .") for part in re.split(r"[,;\n]", text))
            found.setdefault(name, []).extend(part for part in parts if not _is_placeholder(part))
    return {name: tuple(_once(values)) for name, values in found.items() if values}


def _is_placeholder(text: str) -> bool:
    return not any(map(str.isalnum, text)) or bool(re.search(r"[<>\[\]{}]", text)) or text.casefold() in _NO_ANSWER


def _once(values: Iterable[str]) -> list[str]:
    """The first of those that differ only in case."""
    kept: dict[str, str] = {}
    for value in values:
        kept.setdefault(value.casefold(), value)
    return list(kept.values())


def _combinations(kinds: Mapping[str, Sequence[str]], most: int) -> list[_Chosen]:
    """Choices of at least two kinds with one value of each: all, or `most` that are spread over all."""
    options = [[None, *((kind, value) for value in values)] for kind, values in kinds.items()]
    total = math.prod(map(len, options))
    # Steps of the golden section reach every place once, and the first of them lie far apart.
    step = total * 618 // 1000
    while math.gcd(step, total) != 1:
        step += 1
    found: list[tuple[int, _Chosen]] = []
    for number in range(total):
        place = rest = number * step % total
        picked = []
        for of in reversed(options):
            rest, digit = divmod(rest, len(of))
            picked.append(of[digit])
        chosen = [one for one in reversed(picked) if one is not None]
        if len(chosen) > 1:
            found.append((place, chosen))
        if len(found) == most:
            break
    return [chosen for _, chosen in sorted(found, key=lambda one: one[0])]


def _others(d: AttributeDictionary, kinds: Iterable[str]) -> dict[str, list[str]]:
    """Values that are not the subject's own, for each kind that has any."""
    own = {value.casefold() for value in words(d)}
    own_stems = {_stem(word) for value in own for word in re.findall(r"\w+", value)}
    found = {}
    for kind in dict.fromkeys(kinds):
        values = [value for value in d.alternatives.get(kind, ()) if value.casefold() not in own]
        values = values or [word for word in COMMON_WORDS.get(kind, ()) if _stem(word) not in own_stems]
        if values:
            found[kind] = values
    return found


def _stem(word: str) -> str:
    """Alike for "wood" and "wooden", "striped" and "stripes". That it is for "plastic" and "plaster" costs a common word only."""
    return word.casefold().replace("grey", "gray")[:4]


def _drawn(kinds: Mapping[str, Sequence[str]], rng: np.random.Generator) -> _Chosen:
    names = list(kinds)
    if not names:
        return []
    some = rng.choice(len(names), int(rng.integers(1, len(names) + 1)), replace=False)
    return [(names[one], kinds[names[one]][int(rng.integers(len(kinds[names[one]])))]) for one in sorted(some.tolist())]


def _phrase(class_word: str, chosen: _Chosen, token: str = "") -> str:
    """Article, token, adjectives, class and what follows it: a {token} red clay toy made by hand with round eyes."""
    before, after, parts = [], [], []
    said = set()
    for kind, value in sorted(chosen, key=lambda one: _ORDER.index(one[0]) if one[0] in _ORDER else -1):
        if value.casefold() in said:
            continue
        said.add(value.casefold())
        if " " in value and value.split()[0].casefold() in _FOLLOWING:
            after.append(value)
        elif kind in _PARTS:
            parts.append(value)
        else:
            before.append(value)
    if parts:
        after.append(f"with {' and '.join(parts)}")
    text = " ".join(filter(None, [token, *before, class_word, *after]))
    first = re.sub(r"^[\W_]+", "", text).casefold()
    return f"{'an' if _AN.match(first) else 'a'} {text}"


def _key(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.lower())).strip()


def _first(entries: Mapping[str, Any], names: Iterable[str]) -> Any:
    """What stands under the first of these names that is there; None where none is."""
    return next((entries[name] for name in names if entries.get(name) is not None), None)


def _short(value: Any) -> str:
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return f"'{text if len(text) <= 60 else f'{text[:57]}...'}'"
