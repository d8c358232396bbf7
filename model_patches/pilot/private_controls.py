"""ControlNets and adapters on conditionings, in calls through which a gradient goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..core.autograd import make_weights_ordinary


@contextmanager
def own_controls(entries: Sequence[dict[str, Any]], model: Any) -> Iterator[list[dict[str, Any]]]:
    """The guider's conditioning entries with ControlNets and adapters of their own, through whose weights a gradient can go.

    A control keeps its picture for the number of rows that it was last called with, and a T2I-Adapter what it made of it: calls
    with other rows in between, on the same control, would get the wrong ones. `model` is the host's loaded model.
    """
    copies: dict[int, Any] = {}

    def copied(control: Any) -> Any:
        if control is None:
            return None
        if id(control) not in copies:
            copies[id(control)] = control.copy()
            copies[id(control)].set_previous_controlnet(copied(control.previous_controlnet))
        return copies[id(control)]

    own = [
        {**entry, "control": copied(entry["control"])} if entry.get("control") is not None else entry
        for entry in entries
    ]
    heads = [entry["control"] for entry in own if entry.get("control") is not None]
    try:
        with torch.inference_mode(False):
            for head in heads:
                head.pre_run(model, model.model_sampling.percent_to_sigma)
            for control in copies.values():
                for network in _networks(control):
                    make_weights_ordinary(network)
        yield own
    finally:
        for head in heads:
            head.cleanup()


def _networks(control: Any) -> list[torch.nn.Module]:
    """A control's networks; one made of the model's own weights (ControlLora) is not among those that the host loads."""
    made = getattr(control, "control_model", None)
    return [patcher.model for patcher in control.get_models()] + ([made] if isinstance(made, torch.nn.Module) else [])
