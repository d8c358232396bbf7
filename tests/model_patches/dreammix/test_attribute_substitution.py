"""Attributes taken out of prompts, against the literal form, with the host's tokenizers and small text encoders."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.literal_dreammix import substituted, substituted_pooled
from truefill_testing.raw_prompts import encoded, small_clip, text_tokens

load_pack()
tas = pack_module("model_patches.dreammix.attribute_substitution")
prompt_tokens = pack_module("model_patches.core.prompt_tokens")

PROMPT = "a glassy (teddybearish:1.2) toy, on sand"
WORDS = ["reddish", "unglazed", "claylike"]
"""Of more than one token each."""
SUFFIX = "very nice"


@pytest.mark.quick
@pytest.mark.parametrize("family", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize(("strength", "jointly"), [(1.0, False), (0.4, False), (1.0, True)])
def test_it_is_the_formula(family: str, strength: float, jointly: bool) -> None:
    """The tokens by the ids of the raw texts, the attributes as the host encodes them behind the prefix."""
    clip = small_clip(family)
    with torch.inference_mode():
        given = prompt_tokens.encode_prompt(clip, PROMPT, SUFFIX)
        ((text, options),) = copy.deepcopy(given)
        attributes = tas.embed_attributes(clip, WORDS)
        ((changed, made),) = tas.without_attributes(given, attributes, strength, jointly)
    ((embedding, of_attributes),) = encoded(clip, f"a photo of a {' '.join(WORDS)}")
    # Behind "a photo of a".
    places = text_tokens(clip, f"a photo of a {' '.join(WORDS)}").words[4:]
    assert len(places) > len(WORDS)
    own = text_tokens(clip, PROMPT).words
    right = substituted(text[0].double().numpy(), own, list(embedding[0, places].double().numpy()), strength, jointly)
    assert float(np.abs(changed[0].double().numpy() - right).max()) < 1e-5
    # Start, end, suffix and padding are what they were, to the bit.
    others = [place for place in range(text.shape[1]) if place not in own]
    assert torch.equal(changed[0, others], text[0, others]) and not torch.equal(changed[0, own], text[0, own])
    pooled = substituted_pooled(
        options["pooled_output"][0].double().numpy(), of_attributes["pooled_output"][0].double().numpy(), strength
    )
    assert float(np.abs(made["pooled_output"][0].double().numpy() - pooled).max()) < 1e-5
    assert torch.equal(made[tas.RAW_POOLED_KEY], options["pooled_output"])
    # Nothing given was written to.
    assert torch.equal(given[0][0], text) and given[0][1].keys() == options.keys()


@pytest.mark.quick
def test_jointly_leaves_nothing_and_one_after_another_a_little() -> None:
    clip = small_clip("sd15")
    with torch.inference_mode():
        given = prompt_tokens.encode_prompt(clip, PROMPT)
        # A word twice: the directions are not independent.
        attributes = tas.embed_attributes(clip, [*WORDS, WORDS[0]])
        own = text_tokens(clip, PROMPT).words
        units = attributes.tokens / attributes.tokens.norm(dim=1, keepdim=True)
        left = {}
        for jointly in (False, True):
            ((changed, _),) = tas.without_attributes(given, attributes, jointly=jointly)
            left[jointly] = (changed[0, own] @ units.T).abs().amax(dim=0)
    assert float(left[True].max()) < 1e-5 < 1e-3 < float(left[False][0])
    # The last one is gone either way.
    assert float(left[False][-1]) < 1e-5


@pytest.mark.quick
def test_the_methods_still_know_the_prompts_words() -> None:
    """Also where only the pooled output had told where the text ends, as with the host's own node on SD1.5."""
    clip = small_clip("sd15")
    for given in (encoded(clip, "a red rose"), prompt_tokens.encode_prompt(clip, "a red rose", SUFFIX)):
        with torch.inference_mode():
            ((changed, made),) = tas.without_attributes(given, tas.embed_attributes(clip, WORDS))
        before = prompt_tokens.prompt_tokens(given[0][1], given[0][0])
        after = prompt_tokens.prompt_tokens(made, changed)
        assert torch.equal(after.words, before.words) and torch.equal(after.ends, before.ends)
        assert before.words.sum() == 3


@pytest.mark.quick
def test_without_the_pooled_output_and_twice() -> None:
    clip = small_clip("sd2")
    given = prompt_tokens.encode_prompt(clip, PROMPT)
    with torch.inference_mode():
        attributes = tas.embed_attributes(clip, WORDS)
        ((_, made),) = tas.without_attributes(given, attributes, pooled=False)
        twice = tas.without_attributes(tas.without_attributes(given, attributes), attributes)
    assert made["pooled_output"] is given[0][1]["pooled_output"] and tas.RAW_POOLED_KEY not in made
    # The raw one is from before the first.
    assert twice[0][1][tas.RAW_POOLED_KEY] is given[0][1]["pooled_output"]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_what_it_is(dtype: torch.dtype) -> None:
    clip = small_clip("sd15")
    ((text, options),) = prompt_tokens.encode_prompt(clip, PROMPT)
    attributes = tas.embed_attributes(clip, WORDS)
    with torch.inference_mode():
        ((exact, _),) = tas.without_attributes([[text, options]], attributes)
        ((half, _),) = tas.without_attributes([[text.to(dtype), options]], attributes)
    assert half.dtype == dtype
    assert float((half.float() - exact).abs().max()) < 0.02 * float(exact.abs().max())


@pytest.mark.quick
def test_words_of_a_list() -> None:
    assert tas.attribute_words(" red, light blue ,,clay ") == ["red", "light", "blue", "clay"]
    assert tas.attribute_words(" , ") == []


@pytest.mark.quick
def test_another_text_encoder_gets_one_sentence() -> None:
    attributes = tas.embed_attributes(small_clip("sd2"), WORDS)
    with pytest.raises(ValueError, match="embeddings of 24 channels, and this CLIP makes 32"):
        tas.without_attributes(encoded(small_clip("sd15"), "a rose"), attributes)
