"""PowerPaint's prompts as transformers' CLIP makes them, with the learned tokens as further rows of its embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from devtools.pack import ensure_host, load_pack, pack_module
from truefill_testing.task_encoders import TOKENS, random_task_encoder

ensure_host()
load_pack()
powerpaint = pack_module("weights.powerpaint")
task_prompts = pack_module("model_patches.painternet.task_prompts")

START, END = 49406, 49407
VOCABULARY = 49408


@pytest.fixture(scope="module")
def clip() -> Iterator[Any]:
    yield task_prompts.TaskClip(powerpaint.task_encoder(random_task_encoder(), "x"))


@pytest.fixture(scope="module")
def embeddings() -> dict[str, torch.Tensor]:
    """Of each token alone, and of nothing, [1, 77, 768]: as the released code has it, without attention mask or clip skip."""
    state = random_task_encoder()
    embedding = "text_model.embeddings.token_embedding"
    vectors = torch.cat([state.pop(f"{embedding}.trainable_embeddings.{token}") for token in TOKENS])
    state[f"{embedding}.weight"] = torch.cat([state.pop(f"{embedding}.wrapped.weight"), vectors])
    config = CLIPTextConfig(
        vocab_size=VOCABULARY + 30,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_act="quick_gelu",
        eos_token_id=END,
    )
    model = CLIPTextModel(config).eval()
    names = model.state_dict().keys()
    bare = not any(name.startswith("text_model.") for name in names)
    given = {name.removeprefix("text_model.") if bare else name: tensor.clone() for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    found = {}
    for number, token in enumerate((*TOKENS, "")):
        ids = [START, *(range(VOCABULARY + 10 * number, VOCABULARY + 10 * number + 10) if token else ())]
        with torch.no_grad():
            found[token] = model(torch.tensor([ids + [END] * (77 - len(ids))])).last_hidden_state
    return found


@pytest.mark.parametrize(
    ("task", "fitting", "positive", "negative"),
    [
        ("text", 1.0, {"P_obj": 1.0}, {"P_obj": 1.0}),
        ("shape", 0.7, {"P_shape": 0.7, "P_ctxt": 0.3}, {"P_shape": 0.7, "P_ctxt": 0.3}),
        ("removal", 0.7, {"P_ctxt": 1.0}, {"P_obj": 1.0}),
        ("outpainting", 1.0, {"P_ctxt": 1.0}, {"P_obj": 1.0}),
        ("context", 1.0, {"P_ctxt": 1.0}, {"": 1.0}),
    ],
)
def test_a_task_is_its_tokens(
    clip: Any,
    embeddings: dict[str, torch.Tensor],
    task: str,
    fitting: float,
    positive: dict[str, float],
    negative: dict[str, float],
) -> None:
    for made, mixture in zip(clip.prompts(task, fitting), (positive, negative), strict=True):
        ((context, _),) = made
        right = sum(share * embeddings[token] for token, share in mixture.items())
        assert isinstance(right, torch.Tensor) and context.shape == (1, 77, 768)
        # The host runs it in half precision.
        assert float((context - right).abs().max()) < 1e-3 * float(right.abs().max())


def test_the_tokens_differ(embeddings: dict[str, torch.Tensor]) -> None:
    rows = list(embeddings.values())
    assert all(not torch.allclose(one, other, atol=0.1) for index, one in enumerate(rows) for other in rows[:index])
