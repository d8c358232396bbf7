"""The prompt's own words in the text of T5 and of language models, by the host's own tokenizers and templates."""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import pytest
import torch

from devtools.pack import ensure_host, pack_module
from truefill_testing.joint_scene import JointScene

ensure_host()

import comfy.sd1_clip  # noqa: E402
import comfy.text_encoders.anima  # noqa: E402
import comfy.text_encoders.cosmos  # noqa: E402
import comfy.text_encoders.flux  # noqa: E402
import comfy.text_encoders.hidream  # noqa: E402
import comfy.text_encoders.krea2  # noqa: E402
import comfy.text_encoders.pixart_t5  # noqa: E402
import comfy.text_encoders.qwen_image  # noqa: E402
import comfy.text_encoders.sd3_clip  # noqa: E402
import comfy.text_encoders.z_image  # noqa: E402

prompt_tokens = pack_module("model_patches.core.prompt_tokens")
call_rows = pack_module("model_patches.core.call_rows")

PROMPT = "a red rose, made of glass"
SUFFIX = "best quality"
WIDTH = 6

# The tokenizer of a family, the text encoder whose tokens have the words, and how many tokens of others stand before them.
FAMILIES: dict[str, tuple[Any, str, int]] = {
    "flux": (comfy.text_encoders.flux.FluxTokenizer, "t5xxl", 0),
    "chroma": (comfy.text_encoders.pixart_t5.PixArtTokenizer, "t5xxl", 0),
    "flux2 klein": (comfy.text_encoders.flux.KleinTokenizer, "qwen3_4b", 0),
    "sd3": (comfy.text_encoders.sd3_clip.SD3Tokenizer, "t5xxl", 77),
    "qwen_image": (comfy.text_encoders.qwen_image.QwenImageTokenizer, "qwen25_7b", 0),
    "z_image": (comfy.text_encoders.z_image.ZImageTokenizer, "qwen3_4b", 0),
    "krea2": (comfy.text_encoders.krea2.Krea2Tokenizer, "qwen3vl_4b", 0),
    "hidream": (comfy.text_encoders.hidream.HiDreamTokenizer, "t5xxl", 0),
    "anima": (comfy.text_encoders.anima.AnimaTokenizer, "t5xxl", 0),
    "cosmos": (comfy.text_encoders.cosmos.CosmosT5Tokenizer, "t5xxl", 0),
}


class Clip:
    """The host's CLIP interface over a real tokenizer; the first number of a token's embedding is its place in its text.

    Where a family's encoder cuts its template off, the host's own code does that.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.tokenizer = FAMILIES[family][0]()

    def tokenize(self, text: str, return_word_ids: bool = False) -> dict[str, Any]:
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def embedding(self, tokens: dict[str, Any]) -> torch.Tensor:
        _, encoder, _ = FAMILIES[self.family]
        places = torch.arange(len(tokens[encoder][0]), dtype=torch.float32)
        if self.family == "sd3":
            places = torch.cat((torch.full((77,), -1.0), places))
        text = places[None, :, None].expand(1, -1, WIDTH).clone()
        return self.without_template(text, tokens) if self.family in ("qwen_image", "krea2") else text

    def without_template(self, text: torch.Tensor, tokens: dict[str, Any]) -> torch.Tensor:
        layers = 1 if self.family == "qwen_image" else 12

        class Encoder(torch.nn.Module):
            def encode_token_weights(self, _pairs: Any) -> tuple[Any, ...]:
                given = text if layers == 1 else text[:, None].expand(-1, layers, -1, -1)
                return given, None, {"attention_mask": torch.ones(text.shape[:2])}

        kind = {
            "qwen_image": comfy.text_encoders.qwen_image.QwenImageTEModel,
            "krea2": comfy.text_encoders.krea2.Krea2TEModel,
        }[self.family]
        model = kind.__new__(kind)
        torch.nn.Module.__init__(model)
        model.clip_name = model.clip = FAMILIES[self.family][1]
        setattr(model, model.clip, Encoder())
        return model.encode_token_weights(tokens)[0]

    def encode_from_tokens_scheduled(self, tokens: dict[str, Any], add_dict: dict[str, Any] | None = None) -> list:
        options = {"pooled_output": None, **(add_dict or {})}
        if self.family == "anima":
            # Its embedding is another text encoder's; the model makes its context of T5's tokens.
            options["t5xxl_ids"] = torch.tensor([token[0] for token in tokens["t5xxl"][0]])
            return [[torch.zeros(1, len(tokens["qwen3_06b"][0]), WIDTH), options]]
        return [[self.embedding(tokens), options]]

    def decode(self, ids: list[int]) -> str:
        encoder = FAMILIES[self.family][1]
        inner = getattr(self.tokenizer, encoder, None) or getattr(self.tokenizer, self.tokenizer.clip)
        return inner.tokenizer.decode(ids)


clip_of = cache(Clip)
families = pytest.mark.parametrize("family", list(FAMILIES))


def words_of(family: str, prompt: str, suffix: str = "") -> str:
    """What the tokens that count as words say: they are looked up by the embedding, in which each has its place."""
    clip = clip_of(family)
    ((text, options),) = prompt_tokens.encode_prompt(clip, prompt, suffix)
    kinds = options[prompt_tokens.TOKENS_KEY]
    assert prompt_tokens.prompt_tokens(options, text).are_known
    whole = clip.tokenize(f"{prompt}, {suffix}" if suffix else prompt)[FAMILIES[family][1]][0]
    before = FAMILIES[family][2]
    if family == "anima":
        text = torch.arange(len(options["t5xxl_ids"]))[None, :, None]
    assert kinds.shape == text.shape[:2]
    places = text[0, before:, 0][kinds[0, before:] == prompt_tokens.WORD].long().tolist()
    return clip.decode([whole[place][0] for place in places]).strip()


@pytest.mark.quick
@families
def test_the_words_are_the_prompt(family: str) -> None:
    assert words_of(family, PROMPT) == PROMPT


@families
def test_a_suffix_is_none_of_them(family: str) -> None:
    assert words_of(family, PROMPT, SUFFIX) == PROMPT


@families
@pytest.mark.parametrize("prompt", ["rose", "user", "assistant", "a rose.\nThe rose is red.", "Rosen, rot & groß"])
def test_words_that_the_template_has_too_and_several_lines(family: str, prompt: str) -> None:
    said = words_of(family, prompt)
    # T5 knows no line breaks.
    assert said.split() == prompt.split()


@families
def test_a_prompt_that_says_nothing_has_none(family: str) -> None:
    assert words_of(family, "") == ""


def test_sd3_has_clips_words_as_well() -> None:
    ((_, options),) = prompt_tokens.encode_prompt(clip_of("sd3"), "a red rose")
    assert options[prompt_tokens.TOKENS_KEY][0, :6].tolist() == [0, 1, 1, 1, 2, 0]


def test_a_weight_is_no_word() -> None:
    assert words_of("flux", "a (red:1.3) rose") == "a red rose"


class Silent(torch.nn.Module):
    """A text encoder that says nothing, in as many tokens as it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def encode_token_weights(self, pairs: Any) -> tuple[Any, ...]:
        return torch.zeros(1, len(pairs[0]), self.width), torch.zeros(1, self.width)


def with_encoders(family: str, kind: type, **loaded: int) -> Clip:
    """The host's text encoders of a family, of which only some are loaded."""
    clip = Clip(family)
    model = clip.cond_stage_model = kind(clip_l=False, clip_g=False, t5=False)
    model.t5_attention_mask = False
    for name, width in loaded.items():
        setattr(model, name, Silent(width))
    clip.embedding = lambda tokens: model.encode_token_weights(tokens)[0]
    return clip


@pytest.mark.parametrize(
    ("loaded", "words"),
    [({"clip_l": 768, "clip_g": 1280}, [1, 2, 3, 4]), ({"clip_l": 768}, [1, 2, 3, 4]), ({"t5xxl": 4096}, [0, 1, 2, 3])],
)
def test_sd3_with_a_part_of_its_text_encoders(loaded: dict[str, int], words: list[int]) -> None:
    """CLIP's text begins with a token that is no word, T5's with the first word; either alone has 77."""
    clip = with_encoders("sd3", comfy.text_encoders.sd3_clip.SD3ClipModel, **loaded)
    ((text, options),) = prompt_tokens.encode_prompt(clip, "a red rose")
    assert text.shape[1] == 77
    kinds = options[prompt_tokens.TOKENS_KEY]
    assert kinds[0, : 2 + len(words)].nonzero()[:, 0].tolist() == words


def test_hidream_without_t5_gets_a_sentence() -> None:
    kind = functools.partial(comfy.text_encoders.hidream.HiDreamTEModel, llama=False)
    clip = with_encoders("hidream", kind, clip_l=768, clip_g=1280)
    with pytest.raises(ValueError, match=r"loaded without the text encoder\(s\) t5xxl, .* use CLIP Text Encode"):
        prompt_tokens.encode_prompt(clip, "a red rose")


def test_an_embedding_that_the_tokens_dont_explain_gets_a_sentence() -> None:
    class Longer(Clip):
        def embedding(self, tokens: dict[str, Any]) -> torch.Tensor:
            return torch.zeros(1, 999, WIDTH)

    with pytest.raises(ValueError, match=r"made 999 tokens of a prompt that has \d+, .*: use CLIP Text Encode"):
        prompt_tokens.encode_prompt(Longer("z_image"), "a red rose")


def test_the_host_puts_padding_before_flux2s_text() -> None:
    """The words are where the host has put them, not where they were in the conditioning."""
    scene = JointScene("flux2")
    conds = comfy_conds(scene)
    rows = call_rows.with_rows("positive", conds, (11, 14))["model_conds"][call_rows.ROWS_KEY].rows
    assert rows.tokens.words.shape == (1, 512)
    assert rows.tokens.words[0].nonzero()[:, 0].tolist() == [512 - 9 + word for word in (2, 3, 5)]


def test_animas_words_are_those_of_the_context_that_the_model_makes() -> None:
    ((text, options),) = prompt_tokens.encode_prompt(clip_of("anima"), PROMPT)
    context = torch.zeros(1, 512, 8)
    found = prompt_tokens.prompt_tokens({**options, "cross_attn": text}, context)
    said = clip_of("anima").decode(options["t5xxl_ids"][found.words[0, : len(options["t5xxl_ids"])]].tolist())
    assert said.strip() == PROMPT and found.words.shape == (1, 512)


def comfy_conds(scene: JointScene) -> dict[str, Any]:
    import comfy.sampler_helpers
    import comfy.samplers

    (entry,) = comfy.sampler_helpers.convert_cond(scene.positive)
    (converted,) = comfy.samplers.encode_model_conds(
        scene.patcher.model.extra_conds, [entry], scene.noise, torch.device("cpu"), "positive"
    )
    return converted
