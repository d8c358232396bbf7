"""A minimal WebSocket client (RFC 6455): text messages over an unencrypted connection."""

from __future__ import annotations

import base64
import os
import socket
import struct
import time

_CONTINUATION, _TEXT, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x8, 0x9, 0xA


class ConnectionLost(Exception):
    """The other side is gone."""


class WebSocket:
    """One connection. Use as a context manager."""

    def __init__(self, host: str, port: int, path: str, timeout: float = 10.0) -> None:
        """Connect and upgrade; raises OSError or ConnectionLost where nobody answers as a WebSocket server."""
        self._socket = socket.create_connection((host, port), timeout=timeout)
        self._buffer = b""
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        try:
            self._socket.sendall(request.encode())
            deadline = time.monotonic() + timeout
            while b"\r\n\r\n" not in self._buffer:
                self._fill(deadline)
            head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            if b" 101 " not in head.split(b"\r\n")[0]:
                raise ConnectionLost(f"The server refused the WebSocket: {head.splitlines()[0].decode('latin-1')}")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _fill(self, deadline: float | None) -> None:
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            raise
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        if not data:
            raise ConnectionLost("The server closed the connection.")
        self._buffer += data

    def _take(self, count: int, deadline: float | None) -> bytes:
        while len(self._buffer) < count:
            self._fill(deadline)
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def _send_frame(self, opcode: int, payload: bytes) -> None:
        # A client must mask what it sends; the mask is no secret.
        if len(payload) < 126:
            head = struct.pack("!BB", 0x80 | opcode, 0x80 | len(payload))
        elif len(payload) < 1 << 16:
            head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, len(payload))
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, len(payload))
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        try:
            self._socket.sendall(head + mask + masked)
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def send(self, text: str) -> None:
        """Send one text message."""
        self._send_frame(_TEXT, text.encode())

    def receive(self, deadline: float | None = None) -> str | None:
        """Wait for the next message: its text, or None for a binary one.

        `deadline` is a time of time.monotonic(). Raises TimeoutError past it, ConnectionLost when the server is gone.
        """
        payload, kind = b"", None
        while True:
            first, second = self._take(2, deadline)
            length = second & 0x7F
            if length == 126:
                (length,) = struct.unpack("!H", self._take(2, deadline))
            elif length == 127:
                (length,) = struct.unpack("!Q", self._take(8, deadline))
            data = self._take(length, deadline)
            opcode = first & 0x0F
            if opcode == _CLOSE:
                raise ConnectionLost("The server closed the connection.")
            if opcode == _PING:
                self._send_frame(_PONG, data)
            elif opcode != _PONG:
                kind = opcode if opcode != _CONTINUATION else kind
                payload += data
                if first & 0x80:
                    return payload.decode() if kind == _TEXT else None
