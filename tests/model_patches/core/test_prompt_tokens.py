"""The token set of a prompt: right for each family's tokenizer, and kept by the host's conditioning nodes."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from devtools.pack import ensure_host, pack_module

ensure_host()

import comfy.sd1_clip  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.text_encoders.flux  # noqa: E402
import comfy.text_encoders.sd2_clip  # noqa: E402

import nodes as host_nodes  # noqa: E402

pytestmark = pytest.mark.quick

prompt_tokens = pack_module("model_patches.core.prompt_tokens")

TOKENIZERS = {
    "sd15": comfy.sd1_clip.SD1Tokenizer,
    "sd2": comfy.text_encoders.sd2_clip.SD2Tokenizer,
    "sdxl": comfy.sdxl_clip.SDXLTokenizer,
}
WIDTH = 8


class TextOnlyClip:
    """The host's CLIP interface over a real tokenizer; its embedding of a token is the token's number and place."""

    def __init__(self, tokenizer, embedding_directory=None):
        self.tokenizer = tokenizer(embedding_directory=embedding_directory)

    def tokenize(self, text, return_word_ids=False):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens_scheduled(self, tokens, add_dict):
        length = min(sum(len(chunk) for chunk in chunks) for chunks in tokens.values())
        embedding = torch.arange(length, dtype=torch.float32)[None, :, None].expand(1, length, WIDTH).clone()
        return [[embedding, {"pooled_output": torch.zeros(1, WIDTH), **add_dict}]]


@cache
def clip(family: str) -> TextOnlyClip:
    return TextOnlyClip(TOKENIZERS[family])


def chosen(family: str, prompt: str, suffix: str = "") -> list[int]:
    ((embedding, options),) = prompt_tokens.encode_prompt(clip(family), prompt, suffix)
    token_set = options[prompt_tokens.TOKENS_KEY]
    assert token_set.shape == embedding.shape[:2]
    return token_set[0].nonzero().flatten().tolist()


families = pytest.mark.parametrize("family", list(TOKENIZERS))


@families
def test_words_and_end_of_text_are_chosen(family: str) -> None:
    # SOT a red rose EOT
    assert chosen(family, "a red rose") == [1, 2, 3, 4]


@families
def test_an_empty_prompt_has_its_end_of_text(family: str) -> None:
    assert chosen(family, "") == [1]


@families
def test_weights_change_nothing(family: str) -> None:
    assert chosen(family, "a (red:1.3) ((rose))") == [1, 2, 3, 4]


@families
def test_a_suffix_does_not_count_but_its_end_does(family: str) -> None:
    # SOT a red rose , full hd , 4 k , high quality , high resolution EOT
    places = chosen(family, "a red rose", prompt_tokens.QUALITY_SUFFIX)
    assert places[:-1] == [1, 2, 3]
    assert places[-1] > 10
    words = clip(family).tokenize(f"a red rose, {prompt_tokens.QUALITY_SUFFIX}", return_word_ids=True)
    (chunk,) = next(iter(words.values()))
    assert places[-1] == max(i for i, token in enumerate(chunk) if token[2]) + 1


@families
def test_a_long_prompt_has_an_end_in_each_chunk(family: str) -> None:
    prompt = "rose " * 100
    # 75 words fill the first chunk between SOT and EOT, 25 stand in the second.
    assert chosen(family, prompt) == [*range(1, 77), *range(78, 78 + 26)]


@families
def test_a_suffix_that_fills_a_chunk_of_its_own(family: str) -> None:
    places = chosen(family, "rose " * 75, "very " * 20)
    # The comma and the suffix stand in the second chunk: only the end of the whole text counts there.
    assert places == [*range(1, 77), 77 + 1 + 21]


def test_the_tokens_of_an_embedding_are_words(tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"emb_params": torch.zeros(3, 768)}, tmp_path / "thing.safetensors")
    with_embedding = TextOnlyClip(TOKENIZERS["sd15"], str(tmp_path))
    ((_, options),) = prompt_tokens.encode_prompt(with_embedding, "a embedding:thing rose")
    assert options[prompt_tokens.TOKENS_KEY][0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6]


def test_a_set_of_text_encoders_that_is_not_known_is_refused_in_one_sentence() -> None:
    class Unknown(TextOnlyClip):
        def __init__(self):
            pass

        def tokenize(self, text, return_word_ids=False):
            return {"qwen25_7b": [], "byt5": []}

    with pytest.raises(ValueError, match=r"text encoders byt5, qwen25_7b, .*: use CLIP Text Encode, or load"):
        prompt_tokens.encode_prompt(Unknown(), "a rose")


def token_set_after(conditioning: list) -> list[list[int]]:
    return [
        prompt_tokens.prompt_tokens(options, embedding).words_and_ends[0].nonzero().flatten().tolist()
        for embedding, options in conditioning
    ]


def test_the_hosts_conditioning_nodes_keep_it() -> None:
    rose = prompt_tokens.encode_prompt(clip("sd15"), "a red rose")
    long = prompt_tokens.encode_prompt(clip("sd15"), "tulip " * 80)
    plain = [[torch.zeros(1, 77, WIDTH), {"pooled_output": torch.zeros(1, WIDTH)}]]
    own = [1, 2, 3, 4]
    (combined,) = host_nodes.ConditioningCombine().combine(rose, long)
    assert token_set_after(combined) == [own, [*range(1, 77), *range(78, 84)]]
    (averaged,) = host_nodes.ConditioningAverage().addWeighted(rose, long, 0.5)
    assert token_set_after(averaged) == [own]
    (averaged,) = host_nodes.ConditioningAverage().addWeighted(long, rose, 0.5)
    assert token_set_after(averaged) == [[*range(1, 77), *range(78, 84)]]
    (area,) = host_nodes.ConditioningSetArea().append(rose, 64, 64, 0, 0, 1.0)
    assert token_set_after(area) == [own]
    (masked,) = host_nodes.ConditioningSetMask().append(rose, torch.ones(1, 8, 8), "default", 1.0)
    assert token_set_after(masked) == [own]
    (concatenated,) = host_nodes.ConditioningConcat().concat(rose, plain)
    assert concatenated[0][0].shape[1] == 154
    assert token_set_after(concatenated) == [own]
    (ranged,) = host_nodes.ConditioningSetTimestepRange().set_range(rose, 0.0, 0.5)
    assert token_set_after(ranged) == [own]


def test_the_hosts_own_encoding_counts_all_but_the_start_of_each_chunk() -> None:
    plain = [[torch.zeros(1, 154, WIDTH), {}]]
    assert token_set_after(plain) == [[i for i in range(154) if i not in (0, 77)]]
