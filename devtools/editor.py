"""The editor: ComfyUI with the pack, for people.

python launch.py -m devtools.editor PORT [ComfyUI's arguments]      PORT 0: 8188, or a free one
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import host, program
from .pack import host_path
from .paths import ROOT, UserError
from .server import Server, is_free

USUAL_PORT = 8188


def main() -> int:
    """Run ComfyUI until it ends; raises UserError where it can't start."""
    port, *arguments = sys.argv[1:]
    port = int(port) or (USUAL_PORT if is_free(USUAL_PORT) else None)
    if port is not None and not is_free(port):
        raise UserError(f"Port {port} is in use; choose another one with --port.")
    own = host.users_own()
    server = Server(
        host_path(),
        Path(sys.executable),
        models=[own / "models"] if own is not None and (own / "models").is_dir() else [],
        port=port,
        arguments=arguments,
        base=own if host.in_custom_nodes() and own == ROOT.parents[1] else None,
        log_name="editor",
        echo=True,
    )
    with server:
        print(f"\nThe editor with TrueFill is at {server.address} (Ctrl-C ends it; log: {server.log})", flush=True)
        assert server.process is not None
        return server.process.wait()


if __name__ == "__main__":
    raise SystemExit(program.run(main))
