"""ComfyUI's process and the client, against small stand-ins that misbehave on purpose."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from devtools import demo, picture
from devtools import server as server_module
from devtools.client import Client, GraphFailed, GraphInterrupted, GraphRejected, Progress, ServerGone
from devtools.paths import ROOT, UserError
from devtools.server import Server, link_pack

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


class StandIn:
    """A server with ComfyUI's routes that sends prepared messages once a graph has been queued, and then waits."""

    def __init__(self) -> None:
        self.messages: list[str | bytes] = []
        self.closes = False
        self.answer: tuple[int, str] = (200, json.dumps({"prompt_id": "ours"}))
        self.asked: list[tuple[str, Any]] = []
        self.address = ""
        self._queued = asyncio.Event()

    def say(self, kind: str, prompt_id: str = "ours", **data: Any) -> None:
        self.messages.append(json.dumps({"type": kind, "data": {"prompt_id": prompt_id, **data}}))

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await self._queued.wait()
        for message in self.messages:
            await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))
        # The client's feature flags, and the end of it.
        while not self.closes and not socket.closed:
            await socket.receive()
        return socket

    async def post(self, request: web.Request) -> web.Response:
        self.asked.append((request.path, await request.json()))
        if request.path != "/prompt":
            return web.Response()
        self._queued.set()
        status, text = self.answer
        return web.Response(status=status, text=text)

    async def history(self, request: web.Request) -> web.Response:
        outputs = {"save": {"images": [{"filename": "a b&c.png", "subfolder": "x", "type": "temp"}]}}
        return web.json_response({"ours": {"outputs": outputs, "status": {"status_str": "success"}}})

    async def view(self, request: web.Request) -> web.Response:
        return web.Response(text="/".join(request.query[name] for name in ("type", "subfolder", "filename")))

    async def serve(self, ready: threading.Event, ends: asyncio.Event) -> None:
        app = web.Application()
        app.router.add_get("/ws", self.socket)
        app.router.add_get("/history/ours", self.history)
        app.router.add_get("/view", self.view)
        app.router.add_post("/{path}", self.post)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await ends.wait()
        await runner.cleanup()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server, ready, loop, ends = StandIn(), threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(ready, ends)))
    thread.start()
    assert ready.wait(10)
    yield server
    loop.call_soon_threadsafe(ends.set)
    thread.join(10)
    loop.close()


def test_a_run_follows_its_own_messages(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    # A proxy for the internet is none for this machine.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    stand_in.say("execution_error", "another's")
    stand_in.messages.append(b"a preview" * 1_000_000)
    stand_in.say("executing", node="a")
    stand_in.say("progress", node="a", value=2, max=5, more="x" * 5_000_000)
    stand_in.say("executing", node=None)
    seen: list[Progress] = []
    result = Client(stand_in.address).run({"a": {"class_type": "KSampler"}}, seen.append, timeout=60)
    assert seen == [Progress("a", "KSampler"), Progress("a", "KSampler", 2, 5)]
    assert [message["type"] for message in result.messages] == ["executing", "progress", "executing"]
    assert (result.images, result.status) == ({"save": [b"temp/x/a b&c.png"]}, "success")


def test_a_run_ends_with_what_the_server_says(stand_in: StandIn) -> None:
    error = {"exception_type": "ValueError", "exception_message": " no ", "traceback": ["a", "b"]}
    stand_in.say("execution_error", node_id="3", node_type="KSampler", **error)
    with pytest.raises(GraphFailed, match=r"^Node 3 \(KSampler\) failed with ValueError: no$") as failed:
        Client(stand_in.address).run({}, timeout=60)
    assert failed.value.traceback == "ab"
    stand_in.messages.clear()
    stand_in.say("execution_interrupted")
    with pytest.raises(GraphInterrupted):
        Client(stand_in.address).run({}, timeout=60)
    stand_in.messages.clear()
    stand_in.closes = True
    with pytest.raises(ServerGone, match="closed the connection"):
        Client(stand_in.address).run({}, timeout=60)


def test_a_run_that_takes_too_long_is_interrupted(stand_in: StandIn) -> None:
    with pytest.raises(TimeoutError, match="within 1 seconds and was interrupted"):
        Client(stand_in.address).run({}, timeout=1)
    assert [path for path, _ in stand_in.asked] == ["/prompt", "/interrupt"]


def test_a_graph_with_a_bad_branch_is_rejected_as_a_whole(stand_in: StandIn) -> None:
    errors = {"7": {"class_type": "KSampler", "errors": [{"message": "Value too big", "details": "steps"}]}}
    stand_in.answer = (200, json.dumps({"prompt_id": "ours", "node_errors": errors}))
    with pytest.raises(GraphRejected, match=r"node 7 \(KSampler\): Value too big \(steps\)") as rejected:
        Client(stand_in.address).run({}, timeout=60)
    assert rejected.value.node_errors == errors
    assert stand_in.asked[1:] == [("/queue", {"delete": ["ours"]}), ("/interrupt", {"prompt_id": "ours"})]


def test_an_answer_that_is_not_comfyuis_is_shown(stand_in: StandIn) -> None:
    stand_in.answer = (502, "<h1>Bad gateway</h1>")
    with pytest.raises(GraphRejected, match=r"\(HTTP 502\): <h1>Bad gateway"):
        Client(stand_in.address).run({}, timeout=60)


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
    image = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros_like(image)
    mask[2:4, 2:4] = 255

    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    target = tmp_path / "out.png"
    for changed, fails in (((3, 3), False), ((5, 5), True)):
        result = image.copy()
        result[changed] = 101
        files = png(image), png(mask), [png(image), png(result)]
        if fails:
            with pytest.raises(UserError, match="1 of 48 known pixels"):
                picture.join(target, *files)
        else:
            assert picture.join(target, *files) == 48
        assert Image.open(target).size == (4 * 8 + 3 * 8, 8)
    with pytest.raises(UserError, match="differ in size"):
        picture.join(target, png(image), png(mask[:4]), [png(image)])


# The editor, as people call it


@pytest.fixture
def editor(host: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A `dev.py comfyui` on a stand-in that answers; what it has said so far is read."""
    own = host(ANSWER)
    (own / "comfy").mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(own))
    command = [sys.executable, ROOT / "dev.py", "comfyui", "--port", str(server_module.free_port()), "--cpu"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def said_until_ready(editor: subprocess.Popen[str]) -> str:
    said = ""
    assert editor.stdout is not None
    for line in editor.stdout:
        said += line
        if "The editor with TrueFill is at" in line:
            return said
    assert editor.stderr is not None
    raise AssertionError(said + editor.stderr.read())


def base_of(pid: int) -> Path:
    arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return Path(arguments[arguments.index("--base-directory") + 1])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_an_interrupted_editor_puts_everything_away(editor: subprocess.Popen[str]) -> None:
    child = child_of(said_until_ready(editor))
    server = int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[1])
    base = base_of(server)
    assert base.is_dir()
    editor.send_signal(signal.SIGTERM)
    _, errors = editor.communicate(timeout=60)
    assert (editor.returncode, errors) == (130, "Interrupted.\n")
    assert wait_until(lambda: not is_alive(server) and not is_alive(child))
    assert not base.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_killed_editor_leaves_no_server(editor: subprocess.Popen[str]) -> None:
    child = child_of(said_until_ready(editor))
    server = int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[1])
    try:
        editor.kill()
        assert wait_until(lambda: not is_alive(server))
    finally:
        # The stand-in's own child does not end with it.
        os.kill(child, signal.SIGKILL)


def test_a_port_in_use_is_named(host: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    own = host(ANSWER)
    (own / "comfy").mkdir()
    monkeypatch.setenv("COMFYUI_PATH", str(own))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, ROOT / "dev.py", "comfyui", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"dev.py: Port {port} is in use; choose another one with --port.\n"
