"""A captioner for tests: it speaks the OpenAI protocol, answers from the scene graph and fails at will.

It finds the film behind a request by its pictures alone: the nearest of all frames of the films that it knows. So a
flow that sends the wrong pictures gets wrong answers. Run as a program it prints its port and serves until killed.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
from PIL import Image

from dataset_builders.mini.render import frame_times, render
from dataset_builders.synflow import graph
from dataset_builders.synflow.recipe import RenderedSource
from dataset_builders.synflow.rendered import draw_video


FAULTS = ("malformed", "words", "truncated", "429", "500", "slow", "dropped")
GRID = 14  # pictures are compared at this size


def look(picture):
    return np.asarray(picture.convert("RGB").resize((GRID, GRID), Image.Resampling.BOX), np.float32).ravel()


def pictures_of(part):
    """The picture, or every other frame of the video, in a part of a message."""
    data = base64.b64decode(part[part["type"]]["url"].partition(",")[2])
    if part["type"] == "image_url":
        return [Image.open(io.BytesIO(data))]
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_image() for frame in container.decode(video=0)][::2]


class Eyes:
    """Films by their pictures."""

    def __init__(self, films):
        self.films, rows, self.owners, self.moments = films, [], [], []
        for number, film in enumerate(films):
            stills = range(0, film.frames, 2)
            for index, frame in zip(stills, render(film, stills)):
                rows.append(look(Image.fromarray(frame)))
                self.owners.append(number)
                self.moments.append(index / max(1, len(frame_times(film)) - 1))
        self.rows = np.stack(rows)

    def see(self, pictures):
        """The film that most pictures come from, and the moment (0 to 1) of the first of them."""
        nearest = [int(((self.rows - look(p)) ** 2).sum(axis=1).argmin()) for p in pictures]
        owners = [self.owners[row] for row in nearest]
        owner = max(sorted(set(owners)), key=owners.count)
        return self.films[owner], self.moments[nearest[0]]


class Captioner(ThreadingHTTPServer):
    """The server.

    Args:
        films (list of `Film`): what it may be shown.
        faults (`float`): share of requests that go wrong, in all ways of `FAULTS` alike.
        seed (`int`): of the faults.
        port (`int`): 0 takes a free one.
        log (`str`, *optional*): file that gets a line for each good answer that was sent.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, films, faults=0.0, seed=0, port=0, log=None):
        self.eyes, self.faults, self.log = Eyes(films), faults, log
        self._chance = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self.counts = dict.fromkeys((*FAULTS, "good"), 0)
        self.paid = {}  # request -> good answers sent
        self.sent = []  # kinds of media and name of the JSON schema of each request
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def draw_fault(self):
        with self._lock:
            fault = None
            if self._chance.random() < self.faults:
                fault = FAULTS[int(self._chance.integers(len(FAULTS)))]
            self.counts[fault or "good"] += 1
            return fault

    def note(self, request):
        with self._lock:
            self.paid[request] = self.paid.get(request, 0) + 1
            if self.log:
                with open(self.log, "a") as lines:
                    lines.write(request + "\n")

    def answer(self, message):
        """The right answer to the first message of a conversation."""
        text = "".join(part["text"] for part in message if part["type"] == "text")
        media = [pictures_of(part) for part in message if part["type"] != "text"]
        pictures = [picture for part in media for picture in part]
        task = re.match(r"Task: (\w+), version \d+\.", text)[1]
        if task == "video_captions":
            film, _ = self.eyes.see(pictures)
            weight = re.search(r"most weight to what (stands|happens)", text)
            profile = {"stands": "spatial", "happens": "temporal", None: "other"}[weight and weight[1]]
            return graph.answer(task, film, profile=profile)
        if task == "frame_captions":
            film, moment = self.eyes.see(pictures)
            return graph.answer(task, film, moment=moment)
        shows_videos = any(part["type"] == "video_url" for part in message)
        part = len(media[0]) if shows_videos or task == "frame_query" else len(pictures) // 2
        return graph.answer(task, self.eyes.see(pictures[:part])[0], self.eyes.see(pictures[part:])[0])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(200, {"object": "list", "data": [{"id": "stand-in"}]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        fault = self.server.draw_fault()
        if fault == "429":
            return self._send(429, {"error": {"message": "too many requests"}}, {"Retry-After": "0.05"})
        if fault == "500":
            return self._send(500, {"error": {"message": "out of memory"}})
        if fault == "dropped":
            self.close_connection = True
            return None
        if fault == "slow":
            time.sleep(0.3)
        first = request["messages"][0]["content"]
        schema = request.get("response_format", {}).get("json_schema", {})
        self.server.sent.append(
            ({part["type"] for part in first} - {"text"}, schema.get("name"), schema.get("strict"))
        )
        text, finish = self.server.answer(first), "stop"
        if fault == "malformed":
            text = "Sure! Here it is:\n" + text[:-1]
        elif fault == "words":
            text = json.dumps({key: "too short" for key in json.loads(text)} | {"1": "x " * 60})
        elif fault == "truncated":
            text, finish = text[: len(text) // 2], "length"
        if fault in (None, "slow"):
            self.server.note(hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest())
        words = len(text.split())
        usage = {"prompt_tokens": 100, "completion_tokens": words, "total_tokens": 100 + words}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        return self._send(200, {"object": "chat.completion", "choices": [choice], "usage": usage})

    def _send(self, status, content, headers=None):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--videos", type=int, required=True)
    parser.add_argument("--planted", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log")
    arguments = parser.parse_args()
    source = RenderedSource(kind="rendered", id="films", videos=arguments.videos, faults=arguments.planted)
    films = [draw_video(source, arguments.seed, number).film for number in range(arguments.videos)]
    server = Captioner(films, arguments.faults, port=arguments.port, log=arguments.log)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
