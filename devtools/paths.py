"""Places in the checkout, and the error that is the user's to mend."""

from __future__ import annotations

import os
from pathlib import Path

# Not resolved: a checkout linked into a custom_nodes folder has to see that folder.
ROOT = Path(os.path.abspath(__file__)).parents[1]
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"
LOGS = CACHE / "logs"
PINS = ROOT / "devtools" / "requirements-dev.txt"


class UserError(Exception):
    """Something that the person at the keyboard can mend; its text is one clear sentence."""
