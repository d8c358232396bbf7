"""Files of models that ComfyUI itself has no folder for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import folder_paths

from ..weights.files import SUFFIXES


class ModelFiles:
    """The files in some folders of `models`, and in those that the user has configured under the same names.

    Those that come with the pack, `shipped` by name, are offered last. A graph may name a file that is not there: the editor then
    shows where to get it, and so does `check`.
    """

    def __init__(
        self,
        folders: Sequence[str],
        kind: str,
        where_to_get: str,
        shipped: Mapping[str, Path] = MappingProxyType({}),
        suffixes: tuple[str, ...] = SUFFIXES,
    ) -> None:
        self._folders, self._kind, self._where, self._shipped = folders, kind, where_to_get, shipped
        self._suffixes = suffixes
        for folder in folders:
            folder_paths.add_model_folder_path(folder, str(Path(folder_paths.models_dir) / folder))

    def names(self) -> list[str]:
        """The files' names, each once."""
        found = [name for folder in self._folders for name in folder_paths.get_filename_list(folder)]
        return list(dict.fromkeys([*(name for name in found if name.lower().endswith(self._suffixes)), *self._shipped]))

    def path(self, name: str) -> str:
        """Where a file lies. Raises FileNotFoundError, which says where to get one."""
        for folder in self._folders:
            if name and (path := folder_paths.get_full_path(folder, name)):
                return path
        if name in self._shipped:
            return str(self._shipped[name])
        folders = " or ".join(path for folder in self._folders for path in folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"There is no {name or 'file'} in {folders}: get a {self._kind} file ({self._where}), put it there, press R."
        )

    def check(self, name: str | None) -> bool | str:
        """For a node's `validate_inputs`: True, or what `path` would say. What another node will name is not known yet."""
        try:
            return name is None or bool(self.path(name))
        except FileNotFoundError as error:
            return str(error)
