"""What a node says while it runs."""

import logging
from collections.abc import Callable

from server import PromptServer


def announcer(node_id: str | None) -> Callable[[str], None]:
    """Writes a sentence to the log and, in the editor, under the node with this id."""

    def announce(text: str) -> None:
        logging.info(text)
        if node_id:
            PromptServer.instance.send_progress_text(text, node_id)

    return announce
