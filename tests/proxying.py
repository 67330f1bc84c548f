"""A web proxy: CONNECT tunnels and plain requests passed on, both counted."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import select
import socket
import threading
import urllib.parse


class Proxy:
    """A context manager; `tunnels` and `requests` are the addresses that were asked for."""

    def __init__(self, *, refuses=False):
        self.tunnels = []
        self.requests = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_CONNECT(self):
                outer.tunnels.append(self.path)
                if refuses:
                    self.send_error(403 if refuses is True else refuses)
                    return
                host, port = self.path.rsplit(":", 1)
                with socket.create_connection((host.strip("[]"), int(port))) as far:
                    self.send_response(200)
                    self.end_headers()
                    outer.pass_on(self.connection, far)
                self.close_connection = True

            def do_POST(self):
                outer.requests.append(self.path)
                if refuses:
                    self.send_error(403 if refuses is True else refuses)
                    return
                parts = urllib.parse.urlsplit(self.path)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                far = http.client.HTTPConnection(parts.netloc)
                with contextlib.closing(far):
                    far.request("POST", parts.path, body, {"Content-Type": "application/json"})
                    answer = far.getresponse()
                    data = answer.read()
                self.send_response(answer.status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._stop, self._stopping = socket.socketpair()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def pass_on(self, near, far):
        """Carry bytes both ways until a side closes, or the proxy does."""
        other = {near: far, far: near}
        while True:
            ready, _, _ = select.select([near, far, self._stopping], [], [])
            for side in ready:
                if side is self._stopping:
                    return
                try:
                    data = side.recv(1 << 16)
                    if not data:
                        return
                    other[side].sendall(data)
                except OSError:
                    return

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._stopping.close()
