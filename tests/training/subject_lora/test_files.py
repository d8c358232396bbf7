"""A LoRA's file is whole or not there, none is overwritten, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.scene import forget_models, patcher_of, randn
from truefill_testing.small_models import small_conditioning

load_pack()
files = pack_module("training.subject_lora.files")
tuning = pack_module("training.subject_lora.tuning")


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


@pytest.fixture(scope="module")
def examples():
    masks = (randn(2, 1, 8, 8, seed=1) > 0).float()
    prompts = [small_conditioning("sd15", seed=3)]
    return [tuning.Example(latent=randn(1, 4, 8, 8, seed=2).float(), masks=masks, concat=[], prompts=prompts)]


def tuner_of(**changes):
    settings = tuning.Tuning(**{"steps": 3, "accumulate": 1, "learning_rate": 1e-2, "seed": 5, **changes})
    return tuning.Tuner(patcher_of("sd15", False, torch.float32), settings), settings


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path, examples) -> None:
    file = files.lora_file(tmp_path, "toy")
    with torch.inference_mode():
        whole, settings = tuner_of()
        identity = files.identity_of(settings, examples, [])
        whole.run(examples, [], lambda step, loss: None)
        first, _ = tuner_of()
        assert not files.go_on(file, first, identity)
        first.run(examples, [], lambda step, loss: None, 2)
        files.keep_unfinished(file, first, identity)
        second, _ = tuner_of()
        assert files.go_on(file, second, identity) and second.step == 2
        second.run(examples, [], lambda step, loss: None)
        files.write_lora(file, second, "a sks toy")
    for name, of in whole.adapters.items():
        assert torch.equal(second.adapters[name].up, of.up) and torch.equal(second.adapters[name].down, of.down)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.safetensors"]
    tensors = safetensors.torch.load_file(tmp_path / "toy.safetensors")
    assert len(tensors) == 3 * len(whole.adapters)


def test_another_run_is_not_gone_on_from(tmp_path: Path, examples) -> None:
    file = files.lora_file(tmp_path, "toy")
    tuner, settings = tuner_of()
    identity = files.identity_of(settings, examples, [])
    files.keep_unfinished(file, tuner, identity)
    other, others = tuner_of(rank=2)
    with pytest.raises(ValueError, match="is of a run with other pictures, prompts or settings: choose another name"):
        files.go_on(file, other, files.identity_of(others, examples, []))
    # A longer run may go on.
    _, longer = tuner_of(steps=9, recompute=False)
    assert files.identity_of(longer, examples, []) == identity
    assert files.identity_of(settings, examples, examples) != identity


@pytest.mark.quick
def test_names(tmp_path: Path) -> None:
    assert files.lora_file(tmp_path, " toy.safetensors ").path == tmp_path / "toy.safetensors"
    (tmp_path / "toy.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="none is overwritten: choose another name"):
        files.lora_file(tmp_path, "toy")
    for name in ("", "  ", "../toy", "a/b", "c:toy", ".hidden"):
        with pytest.raises(ValueError, match="must be the name of a file"):
            files.lora_file(tmp_path, name)


@pytest.mark.quick
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples
) -> None:
    file = files.lora_file(tmp_path, "toy")
    tuner, settings = tuner_of()
    identity = files.identity_of(settings, examples, [])
    files.keep_unfinished(file, tuner, identity)

    def full(tensors, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.safetensors.torch, "save_file", full)
    with pytest.raises(
        ValueError, match=r"could not be written \(.*No space left on device\).*is still there"
    ) as failed:
        files.write_lora(file, tuner, "")
    assert "\n" not in str(failed.value)
    assert [path.name for path in tmp_path.iterdir()] == ["toy.unfinished"]
    assert files.go_on(file, tuner, identity)
