"""Networks of other libraries under the host's memory manager."""

from typing import Any

import torch


class Placed(torch.nn.Module):
    """What the host places: it notes the device on a model, and transformers' models do not let it."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
