"""Answers /model_info and /generate as SGLang does; the environment variable FAKE says what goes wrong."""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAILURES = {
    "cuda": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.\nnanobind: leaked 4 instances!",
    "model": "Traceback (most recent call last):\n  File x\nOSError: /models/none has no config.json\nleft over",
    "flag": "launch_server.py: error: unrecognized arguments: --no-such-flag",
    "port": "ERROR:    [Errno 98] error while attempting to bind on address: address already in use",
}
arguments = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
key = next((word.split("=", 1)[1] for word in sys.argv if word.startswith("--api-key=")), None)
version, mode = arguments["--weight-version"], os.environ.get("FAKE", "")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"weight_version": "another" if mode == "stranger" else version})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if mode == "dies generating":
            print("CUDA out of memory", flush=True)
            os._exit(3)
        if mode == "never generates":
            time.sleep(60)
        self.answer({"output_ids": [1], "meta_info": {"completion_tokens": 1, "weight_version": version}})

    def answer(self, body):
        allowed = key is None or self.headers.get("Authorization") == f"Bearer {key}"
        payload = json.dumps(body if allowed else {"error": "Unauthorized"}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    logging.info("server_args=%s", sys.argv)
    if mode in FAILURES:
        print(FAILURES[mode], flush=True)
        sys.exit(1)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        logging.info("child=%d", child.pid)
    if mode == "spawns":  # as SGLang starts its scheduler
        said = multiprocessing.get_context("spawn").Process(target=logging.warning, args=(f"of a child: {sys.argv}",))
        said.start()
        said.join()
    if mode == "slow":
        time.sleep(600)
    server = ThreadingHTTPServer((arguments["--host"], int(arguments["--port"])), Handler)
    if mode != "stubborn":
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()
