"""Files of models that ComfyUI itself has no folder for."""

from collections.abc import Sequence
from pathlib import Path

import folder_paths

from ..weights.files import SUFFIXES


class ModelFiles:
    """The files in some folders of `models`, and in those that the user has configured under the same names.

    Where there is no file at all, `names` is `first` alone: a graph still names one, and running it says where to get it.
    """

    def __init__(self, folders: Sequence[str], first: str, kind: str, where_to_get: str) -> None:
        self._folders, self._first, self._kind, self._where = folders, first, kind, where_to_get
        for folder in folders:
            folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))

    def names(self) -> list[str]:
        """The files' names, each once."""
        found = [name for folder in self._folders for name in folder_paths.get_filename_list(folder)]
        return [name for name in dict.fromkeys(found) if name.lower().endswith(SUFFIXES)] or [self._first]

    def path(self, name: str) -> str:
        """Where a file lies. Raises FileNotFoundError, which says where to get one."""
        for folder in self._folders:
            if path := folder_paths.get_full_path(folder, name):
                return path
        folders = " or ".join(path for folder in self._folders for path in folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"There is no {name} in {folders}: get a {self._kind} file ({self._where}), put it there, press R."
        )
