"""ComfyUI's process and the client, against small stand-ins that misbehave on purpose."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devtools import demo
from devtools import server as server_module
from devtools.client import Client, ServerGone
from devtools.paths import ROOT, UserError
from devtools.server import Server, link_pack
from devtools.websocket import ConnectionLost, WebSocket

ANSWER = """
    import http.server, json, subprocess, sys

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(NODES if self.path == "/object_info" else {}).encode())

        def log_message(self, *_):
            pass

    port = int(sys.argv[sys.argv.index("--port") + 1])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a stand-in for ComfyUI with this main.py."""

    def write(program: str, nodes: str = "{'TrueFillX': {}}") -> Path:
        (tmp_path / "main.py").write_text(f"NODES = {nodes}\n" + textwrap.dedent(program))
        return tmp_path

    return write


def start(host: Path, **options) -> Server:
    return Server(host, Path(sys.executable), arguments=["--cpu"], log_name="test-stand-in", **options)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def child_of(log: str) -> int:
    return int(next(line for line in log.splitlines() if line.startswith("child")).split()[1])


def test_early_end_shows_the_log(host: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"(?s)ended with code 7.*last lines of .*\.log.*out of luck"):
        start(host("print('out of luck', flush=True); raise SystemExit(7)")).__enter__()


def test_silent_server_is_given_up(host: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="did not answer within 1 seconds"):
        start(host("import time; time.sleep(600)"), timeout=1).__enter__()


def test_missing_nodes_are_reported_with_the_reason(host: Callable[..., Path]) -> None:
    program = "print('Error while calling comfy_entrypoint in x: boom', flush=True)\n" + textwrap.dedent(ANSWER)
    with pytest.raises(
        UserError, match=r"TrueFill's nodes are missing: Error while calling comfy_entrypoint in x: boom"
    ):
        start(host(program, nodes="{'KSampler': {}}")).__enter__()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_stop_ends_the_children_and_removes_the_folder(host: Callable[..., Path]) -> None:
    with start(host(ANSWER)) as server:
        base = server.base
        assert base is not None and (base / "custom_nodes" / "TrueFill" / "dev.py").is_file()
        child = child_of(server.log.read_text())
        assert is_alive(child)
    assert wait_until(lambda: not is_alive(child))
    assert not base.exists() and (ROOT / "dev.py").is_file()
    with pytest.raises(ServerGone, match="does not answer"):
        Client(server.address).get("/")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_server_dies_with_its_parent(host: Callable[..., Path]) -> None:
    program = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from devtools.server import Server
        host, python = Path({str(host(ANSWER))!r}), Path(sys.executable)
        with Server(host, python, arguments=["--cpu"], log_name="test-parent") as server:
            print(server.process.pid, server.log, flush=True)
            time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server, log = parent.stdout.readline().strip().split(" ", 1)
    child = child_of(Path(log).read_text())
    assert is_alive(int(server))
    parent.kill()
    parent.communicate()
    try:
        assert wait_until(lambda: not is_alive(int(server)))
    finally:
        # The stand-in's own child does not end with it.
        os.kill(child, signal.SIGKILL)


def test_pack_is_copied_where_links_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = tmp_path / "pack"
    for name in ("__init__.py", "nodes/__init__.py", ".venv/big.bin", "nodes/__pycache__/x.pyc"):
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        (pack / name).touch()

    def refuse(*_: object, **__: object) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(server_module.os, "name", "posix")
    target = tmp_path / "custom_nodes" / "True Fill-1"
    link_pack(pack, target)
    copied = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert copied == ["__init__.py", "nodes/__init__.py"]


def frame(opcode: int, payload: bytes, final: bool = True) -> bytes:
    head = bytes([0x80 * final | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    if len(payload) < 1 << 16:
        return head + bytes([126]) + struct.pack("!H", len(payload)) + payload
    return head + bytes([127]) + struct.pack("!Q", len(payload)) + payload


@pytest.fixture
def websocket_server() -> Callable[[bytes], tuple[int, list[bytes]]]:
    """A function that starts a WebSocket server which sends these bytes once and keeps what it receives."""

    def serve(data: bytes) -> tuple[int, list[bytes]]:
        listener = socket.create_server(("127.0.0.1", 0))
        received: list[bytes] = []

        def talk() -> None:
            with listener, listener.accept()[0] as connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(4096)
                key = next(line for line in head.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key")).split()[1]
                guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
                accept = base64.b64encode(hashlib.sha1(key + guid).digest())
                # The first frame travels with the handshake's answer.
                connection.sendall(
                    b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: " + accept + b"\r\n\r\n" + data
                )
                while chunk := connection.recv(4096):
                    received.append(chunk)

        threading.Thread(target=talk, daemon=True).start()
        return listener.getsockname()[1], received

    return serve


def test_websocket_reads_all_kinds_of_frames(websocket_server) -> None:
    middle, large = "x" * 300, "y" * 70_000
    data = frame(1, b"one") + frame(1, b"tw", final=False) + frame(9, b"ping") + frame(0, b"o")
    data += frame(2, b"\x00\x01") + frame(1, middle.encode()) + frame(1, large.encode()) + frame(8, b"")
    port, received = websocket_server(data)
    with WebSocket("127.0.0.1", port, "/ws") as connection:
        assert [connection.receive() for _ in range(5)] == ["one", "two", None, middle, large]
        with pytest.raises(ConnectionLost):
            connection.receive()
        connection.send("hello")
        assert wait_until(lambda: len(b"".join(received)) == 2 * 6 + len(b"pinghello"))
    pong = b"".join(received)
    assert pong[0] == 0x8A and bytes(b ^ pong[2 + i % 4] for i, b in enumerate(pong[6:10])) == b"ping"


def test_websocket_gives_up_at_the_deadline(websocket_server) -> None:
    port, _ = websocket_server(b"")
    with WebSocket("127.0.0.1", port, "/ws") as connection, pytest.raises(TimeoutError):
        connection.receive(time.monotonic() + 0.1)


def test_client_says_when_nobody_answers() -> None:
    with pytest.raises(ServerGone, match="does not answer"):
        Client(f"http://127.0.0.1:{server_module.free_port()}").run({})


def test_demo_graph_shows_its_pictures_instead_of_saving_them() -> None:
    graph = json.loads(demo.GRAPH.read_text(encoding="utf-8"))
    nodes = demo.prepare(graph)
    assert list(nodes) == ["scene", "mask", "Plain", "PAIntA + RASG"]
    assert {graph[node_id]["class_type"] for node_id in nodes.values()} == {"PreviewImage"}
    assert not any(node["class_type"] == "SaveImage" for node in graph.values())
    photo = next(node_id for node_id, node in graph.items() if node["class_type"] == "TrueFillExamplePhoto")
    assert graph[nodes["scene"]]["inputs"]["images"] == [photo, 0]
    assert graph["demo_mask_image"]["inputs"]["mask"] == [photo, 1]


def test_demo_says_what_its_graph_lacks() -> None:
    graph = json.loads(demo.GRAPH.read_text(encoding="utf-8"))
    plain = next(node for node in graph.values() if node["_meta"]["title"] == "Plain")
    plain["_meta"]["title"] = "Other"
    with pytest.raises(UserError, match=r"exactly one node with the title Plain; try_without_downloads\.json has 0"):
        demo.prepare(graph)


def test_changed_known_pixel_fails_the_demo(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    image = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros_like(image)
    mask[2:4, 2:4] = 255
    for changed, code in (((3, 3), 0), ((5, 5), 3)):
        result = image.copy()
        result[changed] = 101
        for name, pixels in (("scene", image), ("mask", mask), ("same", image), ("result", result)):
            Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        paths = [tmp_path / f"{name}.png" for name in ("out", "scene", "mask", "same", "result")]
        done = subprocess.run(
            [sys.executable, ROOT / "devtools" / "picture.py", *paths], capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert Image.open(tmp_path / "out.png").size == (4 * 8 + 3 * 8, 8)
