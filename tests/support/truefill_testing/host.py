"""The former name of devtools.pack."""

from devtools.pack import ROOT, ensure_host, host_path, load_pack, pack_module

__all__ = ["ROOT", "ensure_host", "host_path", "load_pack", "pack_module"]
