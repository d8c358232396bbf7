"""Which tokens each method reads, by the prompt as a text.

    HD-Painter (PAIntA's relevance, RASG's score)    the prompt's words, and the end of the text
    PILOT's semantic loss                            the words alone
    semantic boundary control                        silences all but each chunk's start

What is a word, an end or padding is told by the ids of the host's tokenizers (`raw_prompts`); the literal forms are given that,
and never what the pack has found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.pilot_scene import HOLE, Spied, sampler
from truefill_testing.pilot_scene import spied as spied
from truefill_testing.raw_prompts import (
    CHUNK,
    PROMPTS,
    SUFFIX,
    Expected,
    encoded,
    expected_of_hosts,
    expected_of_own,
    expected_where_nothing_is_known,
    hd_painters_reading,
    pilots_reading,
    recording,
    small_clip,
    text_tokens,
    with_pooled_of,
)
from truefill_testing.scene import Scene, exact_unet, forget_models, relative_error

import nodes as host_nodes  # isort: skip

load_pack()
prompt_tokens = pack_module("model_patches.core.prompt_tokens")
sampling_run = pack_module("model_patches.core.sampling_run")
painta_module = pack_module("model_patches.hd_painter.painta")
rasg_module = pack_module("model_patches.hd_painter.rasg")
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary

FAMILIES = ("sd15", "sd2", "sdxl")
TOLERANCE = 1e-5

families = pytest.mark.parametrize("family", FAMILIES)
prompts = pytest.mark.parametrize("prompt", list(PROMPTS.values()), ids=list(PROMPTS))


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    forget_models()
    small_clip.cache_clear()


def assert_found(conditioning: list, *expected: Expected) -> None:
    """What the pack finds in each entry, of all pictures of its batch."""
    for (text, options), of_entry in zip(conditioning, expected, strict=True):
        found = prompt_tokens.prompt_tokens(options, text)
        assert found.words.shape[1] == text.shape[1] == len(of_entry.words)
        for picture in range(len(text)):
            for mask, right in ((found.words, of_entry.words), (found.words_and_ends, of_entry.words_and_ends)):
                places = mask.expand(len(text), -1)[picture].nonzero().flatten().tolist()
                assert places == right.nonzero().flatten().tolist()


def with_chunk(expected: Expected, words: bool) -> Expected:
    """The same with another chunk behind it: none of its tokens is read, or all but its start count as words."""
    more = torch.full((CHUNK,), words)
    more[0] = False
    starts = [*expected.starts, len(expected.words)]
    return Expected(torch.cat((expected.words, more)), torch.cat((expected.words_and_ends, more)), starts)


class TestPromptNode:
    @families
    @prompts
    @pytest.mark.parametrize("suffix", ["", SUFFIX], ids=["alone", "suffix"])
    def test_words_and_ends(self, family: str, prompt: str, suffix: str) -> None:
        clip = small_clip(family)
        assert_found(prompt_tokens.encode_prompt(clip, prompt, suffix), expected_of_own(clip, prompt, suffix))

    def test_a_suffix_in_a_chunk_of_its_own(self) -> None:
        clip, prompt, suffix = small_clip("sd15"), "rose " * 75, "very " * 20
        expected = expected_of_own(clip, prompt, suffix)
        assert expected.words.nonzero().flatten().tolist() == list(range(1, 76)) and len(expected.words) == 2 * CHUNK
        assert_found(prompt_tokens.encode_prompt(clip, prompt, suffix), expected)

    @pytest.mark.parametrize(
        ("prompt", "words"), [("a embedding:thing rose", 1 + 3 + 1), ("a red (embedding:thing:1.2) rose", 2 + 3 + 1)]
    )
    def test_the_vectors_of_an_embedding_are_words(self, prompt: str, words: int, tmp_path: Any) -> None:
        from safetensors.torch import save_file

        save_file({"emb_params": torch.randn(3, 24)}, tmp_path / "thing.safetensors")
        clip = small_clip("sd15", embeddings=str(tmp_path))
        assert text_tokens(clip, prompt).words == list(range(1, 1 + words))
        assert_found(prompt_tokens.encode_prompt(clip, prompt, SUFFIX), expected_of_own(clip, prompt, SUFFIX))
        assert_found(encoded(clip, prompt), expected_of_hosts(clip, prompt))

    @families
    def test_the_hosts_nodes_keep_it(self, family: str) -> None:
        clip, nodes = small_clip(family), host_nodes
        rose, long = (prompt_tokens.encode_prompt(clip, PROMPTS[name]) for name in ("plain", "long"))
        of_rose, of_long = (expected_of_own(clip, PROMPTS[name]) for name in ("plain", "long"))
        assert_found(nodes.ConditioningCombine().combine(rose, long)[0], of_rose, of_long)
        assert_found(nodes.ConditioningSetArea().append(rose, 64, 64, 0, 0, 1.0)[0], of_rose)
        assert_found(nodes.ConditioningSetMask().append(rose, torch.ones(1, 8, 8), "default", 1.0)[0], of_rose)
        assert_found(nodes.ConditioningSetTimestepRange().set_range(rose, 0.0, 0.5)[0], of_rose)
        assert_found(nodes.ConditioningZeroOut().zero_out(rose)[0], of_rose)
        # What it is mixed with, or what comes behind it, is not the prompt.
        assert_found(nodes.ConditioningAverage().addWeighted(rose, long, 0.5)[0], of_rose)
        assert_found(nodes.ConditioningAverage().addWeighted(long, rose, 0.5)[0], of_long)
        concatenated = nodes.ConditioningConcat().concat(rose, encoded(clip, "a tulip"))[0]
        assert_found(concatenated, with_chunk(of_rose, words=False))


class TestClipTextEncode:
    """The host's node says nothing about tokens; on SD1.5 the pooled output is the end's row."""

    @prompts
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_sd15s_end_is_found(self, prompt: str, dtype: torch.dtype) -> None:
        clip = small_clip("sd15", dtype)
        assert_found(encoded(clip, prompt), expected_of_hosts(clip, prompt))

    def test_several_prompts(self) -> None:
        clip = small_clip("sd15")
        texts = [PROMPTS[name] for name in ("weighted", "empty", "long", "plain")]
        entries = [entry for text in texts for entry in encoded(clip, text)]
        assert_found(entries, *(expected_of_hosts(clip, text) for text in texts))

    @pytest.mark.parametrize("texts", [("a red rose", "one blue vase"), ("a red rose in a vase", "tulips")], ids=str)
    def test_a_batch_of_prompts(self, texts: tuple[str, str]) -> None:
        """As packs make one that change the prompt from picture to picture."""
        clip = small_clip("sd15")
        entries = [entry for text in texts for entry in encoded(clip, text)]
        embedding = torch.cat([text for text, _ in entries])
        pooled = torch.cat([options["pooled_output"] for _, options in entries])
        found = prompt_tokens.prompt_tokens({"pooled_output": pooled}, embedding)
        for picture, text in enumerate(texts):
            expected = expected_of_hosts(clip, text)
            for mask, right in ((found.words, expected.words), (found.words_and_ends, expected.words_and_ends)):
                assert torch.equal(mask.expand(2, -1)[picture], right)

    def test_clip_skip(self) -> None:
        clip, nodes = small_clip("sd15"), host_nodes
        prompt = PROMPTS["weighted"]
        (last,) = nodes.CLIPSetLastLayer().set_last_layer(clip, -1)
        assert_found(encoded(last, prompt), expected_of_hosts(clip, prompt))
        # The pooled output is the last layer's all the same.
        (skipped,) = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
        assert_found(encoded(skipped, prompt), expected_where_nothing_is_known(clip, prompt))
        # The prompt node knows it without the pooled output.
        assert_found(prompt_tokens.encode_prompt(skipped, prompt, SUFFIX), expected_of_own(clip, prompt, SUFFIX))

    @pytest.mark.parametrize("family", ["sd2", "sdxl"])
    @prompts
    def test_where_the_pooled_output_is_none_of_the_rows(self, family: str, prompt: str) -> None:
        clip = small_clip(family)
        assert_found(encoded(clip, prompt), expected_where_nothing_is_known(clip, prompt))

    def test_an_empty_conditioning_or_one_without_pooled_output(self) -> None:
        clip = small_clip("sd15")
        everything = expected_where_nothing_is_known(clip, "a red rose")
        ((text, _),) = encoded(clip, "a red rose")
        assert_found([[text, {}]], everything)
        assert_found([[text, {"pooled_output": None}]], everything)
        assert_found(host_nodes.ConditioningZeroOut().zero_out(encoded(clip, "a red rose"))[0], everything)

    def test_the_hosts_nodes_do_no_harm(self) -> None:
        clip, nodes = small_clip("sd15"), host_nodes
        texts = {"rose": "a red rose", "vase": "one (blue:1.4) vase", "long": PROMPTS["weighted"]}
        made = {name: encoded(clip, text) for name, text in texts.items()}
        expected = {name: expected_of_hosts(clip, text) for name, text in texts.items()}
        average = nodes.ConditioningAverage().addWeighted
        # Ends at the same place are mixed as their pooled outputs are.
        assert torch.equal(expected["rose"].words, expected["vase"].words)
        for strength in (0.0, 0.3, 1.0):
            assert_found(average(made["rose"], made["vase"], strength)[0], expected["rose"])
        # Of two ends at different places no row is the mixture.
        assert_found(average(made["rose"], made["long"], 1.0)[0], expected["rose"])
        assert_found(average(made["rose"], made["long"], 0.0)[0], expected["long"])
        everything = expected_where_nothing_is_known(clip, texts["rose"])
        assert_found(average(made["rose"], made["long"], 0.5)[0], everything)
        concatenated = nodes.ConditioningConcat().concat(made["rose"], made["long"])[0]
        assert_found(concatenated, with_chunk(expected["rose"], words=True))
        assert_found(nodes.ConditioningMultiply().multiply(made["long"], 0.5)[0], expected["long"])
        assert_found(nodes.ConditioningSetArea().append(made["long"], 64, 64, 0, 0, 1.0)[0], expected["long"])


@dataclass
class Read:
    """RASG's S of each prompt, summed over pictures, and PAIntA's c of each block [pictures, pixels], in order."""

    scores: list[torch.Tensor] = field(default_factory=list)
    c: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    noted = Read()
    score, relevance = rasg_module.attention_score, painta_module.prompt_relevance

    def note_score(*arguments: Any) -> torch.Tensor:
        result = score(*arguments)
        noted.scores.append(result.detach().clone())
        return result

    def note_relevance(*arguments: Any) -> torch.Tensor:
        result = relevance(*arguments)
        noted.c.append(result.detach().clone())
        return result

    monkeypatch.setattr(rasg_module, "attention_score", note_score)
    monkeypatch.setattr(painta_module, "prompt_relevance", note_relevance)
    return noted


def conditioned(family: str, by: str, prompt: str) -> tuple[list, Expected]:
    """Conditioning as one of the two nodes makes it, and what is to be read of it."""
    clip = small_clip(family)
    if by == "TrueFillEncodePrompt":
        made, expected = prompt_tokens.encode_prompt(clip, prompt, SUFFIX), expected_of_own(clip, prompt, SUFFIX)
    elif family == "sd15":
        made, expected = encoded(clip, prompt), expected_of_hosts(clip, prompt)
    else:
        made, expected = encoded(clip, prompt), expected_where_nothing_is_known(clip, prompt)
    return with_pooled_of(family, made), expected


def scene_with(family: str, positive: list, hole: torch.Tensor = HOLE) -> Scene:
    scene = Scene(family, False, True, hole=hole)
    scene.positive = positive
    return scene


def in_the_middle(scene: Scene) -> torch.Tensor:
    """One step that isn't the last."""
    return scene.sigmas("simple", 4)[1:3]


def with_hd_painter_and_boundary(scene: Scene) -> Any:
    model = scene.patcher
    for settings in (SemanticBoundary(), painta_module.PAIntA(end_percent=1.0), rasg_module.RASG(eta=0.1)):
        model = sampling_run.with_method(model, settings)
    return model


CASES = [
    ("sd15", "TrueFillEncodePrompt", "weighted"),
    ("sd15", "TrueFillEncodePrompt", "long"),
    ("sd15", "CLIPTextEncode", "weighted"),
    ("sd15", "CLIPTextEncode", "padding in the middle"),
    ("sd15", "CLIPTextEncode", "empty"),
    ("sd2", "TrueFillEncodePrompt", "exclamations"),
    ("sd2", "CLIPTextEncode", "plain"),
    ("sdxl", "TrueFillEncodePrompt", "plain"),
]
cases = pytest.mark.parametrize(("family", "by", "name"), CASES)


class TestInSampling:
    """Through the host's sampling: text encoder, CONDITIONING, UNet."""

    @cases
    def test_hd_painter_and_the_boundary(self, family: str, by: str, name: str, read: Read) -> None:
        positive, expected = conditioned(family, by, PROMPTS[name])
        scene = scene_with(family, positive)
        model, calls = recording(with_hd_painter_and_boundary(scene))
        scene.host(in_the_middle(scene), model)
        call = calls[0].of_positive()
        assert torch.allclose(call.context, positive[0][0].to(call.context).expand_as(call.context))
        reading = hd_painters_reading(exact_unet(family, False), call, HOLE, expected.words_and_ends, expected.starts)
        assert relative_error(call.output, reading.output) < TOLERANCE
        assert float(sum(read.scores)) == pytest.approx(float(reading.score.sum()), rel=TOLERANCE)
        of_blocks = [c for of_block in read.c for c in of_block]
        assert len(of_blocks) == len(reading.c) > 4
        for c, right in zip(of_blocks, reading.c, strict=True):
            assert float((c - right).abs().max()) < TOLERANCE
        # Something is known and something is hole: the reading is of this prompt.
        assert any(0.0 < float(c.max()) for c in of_blocks)

    @cases
    def test_pilots_semantic_loss(self, family: str, by: str, name: str, spied: Spied) -> None:
        positive, expected = conditioned(family, by, PROMPTS[name])
        scene = scene_with(family, positive)
        model, calls = recording(scene.patcher)
        scene.host(in_the_middle(scene), model, sampler(interval=1, iterations=1))
        call = calls[0].of_positive()
        right = pilots_reading(exact_unet(family, False), call, HOLE, expected.words, expected.starts)
        assert torch.allclose(spied.centralisation[0].double(), right, rtol=TOLERANCE, atol=1e-7)
        assert bool((right != 0).any()) == bool(expected.words.any())

    def test_each_picture_of_a_batch_by_its_own_prompt(self, read: Read, spied: Spied) -> None:
        """Two prompts for three pictures: the host repeats them."""
        clip, texts = small_clip("sd15"), ("a red rose in a vase", "tulips", "a red rose in a vase")
        entries = [entry for text in texts[:2] for entry in encoded(clip, text)]
        embedding = torch.cat([text for text, _ in entries])
        pooled = torch.cat([options["pooled_output"] for _, options in entries])
        expected = [expected_of_hosts(clip, text) for text in texts]
        hole, unet = HOLE[[0, 1, 1]], exact_unet("sd15", False)
        scene = scene_with("sd15", [[embedding, {"pooled_output": pooled}]], hole)

        model, calls = recording(scene.patcher)
        scene.host(in_the_middle(scene), model, sampler(interval=1, iterations=1))
        words = torch.stack([of_text.words for of_text in expected])
        right = pilots_reading(unet, calls[0].of_positive(), hole, words, [0])
        assert torch.allclose(spied.centralisation[0].double(), right, rtol=TOLERANCE, atol=1e-7)

        model, calls = recording(with_hd_painter_and_boundary(scene))
        scene.host(in_the_middle(scene), model)
        tokens = torch.stack([of_text.words_and_ends for of_text in expected])
        reading = hd_painters_reading(unet, calls[0].of_positive(), hole, tokens, [0])
        assert float(sum(read.scores)) == pytest.approx(float(reading.score.sum()), rel=TOLERANCE)
        for c, of_literal in zip((c for of_block in read.c for c in of_block), reading.c, strict=True):
            assert float((c - of_literal).abs().max()) < TOLERANCE

    def test_another_set_is_noticed(self, read: Read, spied: Spied) -> None:
        """What the tests above compare is far apart for the words alone, with the end, and with the padding."""
        prompt = PROMPTS["plain"]
        positive, expected = conditioned("sd15", "CLIPTextEncode", prompt)
        everything = expected_where_nothing_is_known(small_clip("sd15"), prompt)
        scene = scene_with("sd15", positive)
        model, calls = recording(with_hd_painter_and_boundary(scene))
        scene.host(in_the_middle(scene), model)
        call, unet = calls[0].of_positive(), exact_unet("sd15", False)
        wrong = hd_painters_reading(unet, call, HOLE, expected.words, expected.starts)
        assert abs(float(sum(read.scores)) / float(wrong.score.sum()) - 1) > 0.05
        furthest = max(
            float((c - other).abs().max())
            for c, other in zip((c for of_block in read.c for c in of_block), wrong.c, strict=True)
        )
        assert furthest > 0.05
        silenced = hd_painters_reading(unet, call, HOLE, expected.words_and_ends, [0, 1])
        assert relative_error(call.output, silenced.output) > 1e-3
        losses = [
            pilots_reading(unet, call, HOLE, tokens, expected.starts)
            for tokens in (expected.words, expected.words_and_ends, everything.words)
        ]
        assert float((losses[1] / losses[0] - 1).abs().min()) > 0.05
        assert float((losses[2] / losses[0] - 1).abs().min()) > 0.05
