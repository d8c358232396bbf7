"""Files of models that ComfyUI itself has no folder for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import folder_paths

from ..weights.files import SUFFIXES


class ModelFiles:
    """The files in some folders of `models`, and in those that the user has configured under the same names.

    Where there is no file at all, `first` is offered: a graph still names one, and running it says where to get it. Those that
    come with the pack, `shipped` by name, are offered last.
    """

    def __init__(
        self,
        folders: Sequence[str],
        first: str,
        kind: str,
        where_to_get: str,
        shipped: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self._folders, self._first, self._kind, self._where = folders, first, kind, where_to_get
        self._shipped = shipped
        for folder in folders:
            folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))

    def names(self) -> list[str]:
        """The files' names, each once."""
        found = [name for folder in self._folders for name in folder_paths.get_filename_list(folder)]
        offered = [name for name in found if name.lower().endswith(SUFFIXES)] or [self._first]
        return list(dict.fromkeys([*offered, *self._shipped]))

    def path(self, name: str) -> str:
        """Where a file lies. Raises FileNotFoundError, which says where to get one."""
        for folder in self._folders:
            if path := folder_paths.get_full_path(folder, name):
                return path
        if name in self._shipped:
            return str(self._shipped[name])
        folders = " or ".join(path for folder in self._folders for path in folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"There is no {name} in {folders}: get a {self._kind} file ({self._where}), put it there, press R."
        )
