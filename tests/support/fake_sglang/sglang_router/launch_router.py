"""Answers /workers as sglang-router does: a change is accepted at once and takes place a little later."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

arguments = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
key = next((word.split("=", 1)[1] for word in sys.argv if word.startswith("--api-key=")), None)
workers: dict[str, dict] = {}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {"workers": list(workers.values())})

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.allowed() and wanted.get("api_key") == key:
            id = f"id/of/{len(workers)}"
            workers[id] = {"id": id, "url": wanted["url"], "is_healthy": False}
            threading.Timer(0.3, workers[id].update, kwargs={"is_healthy": True}).start()
        self.answer(202, {"status": "accepted"})

    def do_DELETE(self):
        id = unquote(self.path.removeprefix("/workers/"))
        if self.allowed():
            threading.Timer(0.3, workers.pop, args=(id, None)).start()
        self.answer(202 if id in workers else 404, {"status": "accepted"})

    def allowed(self):
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def answer(self, status, body):
        payload = json.dumps(body).encode()
        self.send_response(status if self.allowed() else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    time.sleep(0.3)
    ThreadingHTTPServer((arguments["--host"], int(arguments["--port"])), Handler).serve_forever()
