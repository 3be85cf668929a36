"""Judges that mean harm, or are something else: a real server on localhost whose behaviour the
caller chooses."""

import gzip
import json
import math
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HUGE = '{"content": [{"top_logprobs": [{"token": "7", "logprob": 1e9}]}]}'
ANSWER = '{"choices": [{"message": {"content": %s}, "logprobs": %s}]}'


class Handler(BaseHTTPRequestHandler):
    """Answers for the model "m": the client's greeting (server.greeting, if there is one), and
    questions by server.behave(handler, number of the question, its body)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] != "m":
            return self.fail(404)
        if body["messages"][0]["content"] == "Hello":
            if self.server.greeting:
                return self.server.greeting(self)
            return self.say("Hi") if self.server.alive() else self.fail(503)
        with self.server.lock:
            self.server.asked.append((self.headers, body))
            number = len(self.server.asked)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            self.server.behave(self, number, body)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def reply(self, status, content):
        self.raw(json.dumps(content).encode(), status)

    def say(self, text, likely=None):
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
        }
        if likely:
            top = [
                {"token": token, "logprob": math.log(p), "bytes": None}
                for token, p in likely.items()
            ]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        self.reply(
            200,
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
            },
        )

    def fail(self, status=500):
        self.reply(status, {"error": {"message": "something went wrong", "type": "server_error"}})

    def hang_up(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def log_message(self, *args):
        pass

    # --- What no judge does ---

    def begin(self, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def raw(self, body, status=200, **headers):
        self.begin(status, **{"Content_Length": str(len(body)), **headers})
        self.wfile.write(body)

    def answer(self, content, likely="null"):
        """An answer in which content and probabilities are any JSON."""
        self.raw((ANSWER % (content, likely)).encode())

    def stream(self, part, pause=0.0, seconds=20.0):
        """Writes `part` again and again, until the client hangs up."""
        started = time.monotonic()
        try:
            while time.monotonic() - started < seconds:
                self.wfile.write(part)
                self.server.written += len(part)
                time.sleep(pause)
        except OSError:
            pass


def begun(handler, part, pause=0.0, seconds=20.0, **head):
    handler.begin(**head)
    handler.stream(part, pause, seconds)


def head_that_drips(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    handler.stream(b"X-Drip: 1\r\n", pause=0.1, seconds=3)


def half(handler):
    handler.begin(Content_Length="1000")
    handler.wfile.write(b'{"choices": [')
    handler.hang_up()


HARM = {  # what a handler does instead of an answer
    "an endless body": lambda h: begun(h, b"[" * 65536),
    "an endless error": lambda h: begun(h, b"no " * 20000, status=400),
    "a body that drips": lambda h: begun(h, b" ", pause=0.1, seconds=3),
    "a head that drips": head_that_drips,
    "a large body": lambda h: begun(h, b"1" * 65536, Content_Length=str(300_000_000)),
    "a small body that unpacks to a megabyte": lambda h: h.raw(
        gzip.compress(bytes(2**20)), Content_Encoding="gzip"
    ),
    "half a body": half,
    "silence": lambda h: time.sleep(3),
    "a broken line": lambda h: h.hang_up(),
    "no JSON": lambda h: h.raw(b"<html>"),
    "a page": lambda h: h.raw(b"<html>", Content_Type="text/html"),
    "JSON nested deep": lambda h: h.raw(b"[" * 100_000),
    "nothing": lambda h: h.raw(b"null"),
    "a list": lambda h: h.raw(b"[1, 2]"),
    "no choices": lambda h: h.raw(b'{"choices": []}'),
    "choices of another kind": lambda h: h.raw(b'{"choices": {"a": 1}}'),
    "a choice without a message": lambda h: h.raw(b'{"choices": [{"message": null}]}'),
    "content that is a list": lambda h: h.answer('["5"]'),
    "content that is a number": lambda h: h.answer("5.5"),
    "a long number": lambda h: h.answer(f'"{"9" * 500_000}"'),
    "half a letter": lambda h: h.answer('"\\ud800"'),
    "redirects without end": lambda h: h.begin(307, Location=h.path, Content_Length="0"),
    "another protocol": lambda h: h.wfile.write(b"220 smtp ready\r\n" * 10),
    "chances beyond measure": lambda h: h.answer('"7"', HUGE),
    "chances of another kind": lambda h: h.answer('"7"', '{"content": [1]}'),
}  # fmt: skip
SPOKEN = (
    "a long number",
    "half a letter",
    "chances beyond measure",
    "chances of another kind",
)  # a greeting may be so


def start(behave, greeting=None):
    """A server in a thread of this process -> (its URL, the server)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.handle_error = (
        True,
        lambda request, client: None,
    )  # a client that did not wait
    server.behave, server.greeting, server.alive = behave, greeting, lambda: True
    server.asked, server.lock, server.now, server.most, server.written = (
        [],
        threading.Lock(),
        0,
        0,
        0,
    )
    threading.Thread(
        target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True
    ).start()
    return f"http://127.0.0.1:{server.server_port}/v1", server
