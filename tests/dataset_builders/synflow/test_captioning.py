"""Asking a captioner: answers are checked, servers are waited for, and what cannot be mended is said."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from datatrove.data import Document
from datatrove.pipeline.inference.run_inference import InferenceConfig

from dataset_builders.mini.world import Film, draw_scene, generator
from dataset_builders.synflow import graph
from dataset_builders.synflow.answers import AnswerError, read_answer
from dataset_builders.synflow.captioning import Answered, CaptionerError, CaptionRunner, CaptionServer, Refused
from dataset_builders.synflow.documents import WholeWriter, exclusions
from dataset_builders.synflow.prompts import TASKS, draw_profile, prompt_hash, write_prompt
from dataset_builders.synflow.recipe import PAPER_PROFILES, Captioner, Recipe
from dataset_builders.synflow.store import AnswerStore


GOOD = {"choices": [{"message": {"content": "{}"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}}


@pytest.fixture
def film():
    return Film((draw_scene(generator("film", 0), False),))


@pytest.fixture
def server():
    """A server that answers with what is put into `script`, `(status, headers, body)`, the last one for ever."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            server.seen.append((time.monotonic(), self.headers.get("Authorization")))
            status, headers, body = server.script.pop(0) if len(server.script) > 1 else server.script[0]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.seen = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(port, **settings):
    settings = Captioner(url=f"http://127.0.0.1:{port}/v1", model="m", **settings)

    async def request():
        config = InferenceConfig(server_type="endpoint", model_name_or_path="m", endpoint_url=settings.url)
        server = CaptionServer(settings, config, 0)
        try:
            return await server.make_request({"messages": []})
        finally:
            await server.server_cleanup()

    return asyncio.run(request())


def test_busy_and_broken_servers_are_asked_again(server, monkeypatch):
    monkeypatch.setenv("CAPTIONER_KEY", "secret")
    good = (200, {}, json.dumps(GOOD).encode())
    server.script = [(429, {"Retry-After": "0.6"}, b""), (500, {}, b""), (200, {}, b"no json"), (200, {}, b"[]"), good]
    assert ask(server.server_port, api_key_env="CAPTIONER_KEY")["choices"] == GOOD["choices"]
    times, keys = zip(*server.seen)
    assert times[1] - times[0] >= 0.6 and set(keys) == {"Bearer secret"} and len(times) == 5


@pytest.mark.parametrize("status, error", [(401, CaptionerError), (404, CaptionerError), (400, Refused)])
def test_what_waiting_cannot_mend_is_raised_at_once(server, status, error):
    server.script = [(status, {}, b'{"error": "no such model"}')]
    with pytest.raises(error, match="no such model"):
        ask(server.server_port)
    assert len(server.seen) == 1


def test_a_server_that_stays_away_ends_the_run_with_a_remedy(server):
    port = server.server_port
    server.server_close()
    with pytest.raises(CaptionerError, match="start the same command again"):
        ask(port, patience_seconds=0.3)


@pytest.mark.parametrize("profile", PAPER_PROFILES)
def test_the_graphs_answers_keep_the_rules(film, profile):
    captions = read_answer("video_captions", graph.answer("video_captions", film, profile=profile))
    assert min(len(text.split()) for text in captions.values()) < 20
    assert max(len(text.split()) for text in captions.values()) > 100
    true, said = graph.borne_out(captions["2"], film)
    assert true == said > 0
    read_answer("frame_captions", graph.answer("frame_captions", film, moment=0.5))


def test_queries_keep_the_rules(film):
    other = Film((draw_scene(generator("film", 1), False),))
    for task, most in (("frame_query", 50), ("clip_query", 15)):
        assert len(read_answer(task, graph.answer(task, film, other))["query"].split()) <= most
    with pytest.raises(AnswerError, match="the query has 3 words, not 5 to 15"):
        read_answer("clip_query", '{"query": "now with snow"}')


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda answer: json.dumps(answer)[:-1], "answer_not_json"),
        (lambda answer: "Here it is: " + json.dumps(answer), "answer_not_json"),
        (lambda answer: json.dumps([answer]), "answer_wrong_schema"),
        (lambda answer: json.dumps({k: v for k, v in answer.items() if k != "3"}), "answer_wrong_schema"),
        (lambda answer: json.dumps({**answer, "6": "more"}), "answer_wrong_schema"),
        (lambda answer: json.dumps({**answer, "4": 7}), "answer_wrong_schema"),
        (lambda answer: json.dumps({**answer, "1": "too short"}), "answer_word_range"),
        (lambda answer: json.dumps({**answer, "2": " ".join(answer["2"].split()[:90])}), "answer_word_range"),
    ],
)
def test_bad_answers_are_told_apart(film, change, reason):
    good = graph.captions(film, "other")
    with pytest.raises(AnswerError) as caught:
        read_answer("video_captions", change(good))
    assert caught.value.reason == reason


class Asked(NamedTuple):
    """A request without media."""

    task: str = "clip_query"
    prompt: str = "Write a query."
    target: str | None = None
    about: dict = {}

    def key(self, settings):
        return "0" * 64

    def media(self, settings):
        return []


def answered(tmp_path, answers, retries=1):
    """What comes of a request that is answered so, the last answer for ever; and the payloads that were sent."""
    settings = {"url": "http://127.0.0.1:1/v1", "model": "m", "retries": retries}
    source = {"kind": "files", "id": "a", "folder": "x"}
    recipe = Recipe(name="a", sources=[source], captioner=settings)
    runner = CaptionRunner(recipe, tmp_path, tmp_path / "answers", WholeWriter(tmp_path / "out"), list)
    sent = []

    async def generate(payload):
        sent.append(payload)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        return SimpleNamespace(text=answer, finish_reason="stop", usage=SimpleNamespace(get=usage.get))

    return asyncio.run(runner._answer(None, Asked(), generate)), sent


GOOD_QUERY = '{"query": "the same but seen from above"}'


def test_a_bad_answer_is_repaired_once(tmp_path):
    said, sent = answered(tmp_path, ["no json", GOOD_QUERY])
    assert said["answer"] == {"query": "the same but seen from above"} and len(sent) == 2
    first, bad, repair = sent[1]["messages"]
    assert sent[0]["messages"] == [first] and bad == {"role": "assistant", "content": "no json"}
    assert "it is no JSON" in repair["content"]
    assert answered(tmp_path, ["not asked"])[1] == []  # it was kept


def test_after_repair_it_is_asked_anew_and_then_dropped_with_the_last_reason(tmp_path):
    said, sent = answered(tmp_path, ["no json", "no json", "no json", '{"query": "too short"}'])
    assert said["reason"] == "answer_word_range" and "2 words, not 5 to 15" in said["detail"]
    assert [len(payload["messages"]) for payload in sent] == [1, 3, 1, 3]
    assert len({payload["seed"] for payload in sent}) == 2  # another draw, not the same again
    assert answered(tmp_path, [GOOD_QUERY])[1] == []  # it was paid for, and is not asked again


def test_a_refusal_is_not_kept(tmp_path):
    """Nothing was paid for it, and the server may be set up otherwise the next time."""
    said, sent = answered(tmp_path, [Refused(400, "max_tokens is too large")])
    assert (said["reason"], said["detail"], len(sent)) == ("captioner_refused", "max_tokens is too large", 1)
    assert "answer" in answered(tmp_path, [GOOD_QUERY])[0]


def test_the_rate_limit_parts_requests_evenly(monkeypatch):
    """Three at once, 120 a minute: at 0, 0.5 and 1 s; one that comes late waits for nothing."""
    now, waited = [100.0], []

    async def sleep(seconds):
        waited.append(round(seconds, 6))

    monkeypatch.setattr("dataset_builders.synflow.captioning.time.monotonic", lambda: now[0])
    monkeypatch.setattr("dataset_builders.synflow.captioning.asyncio.sleep", sleep)
    config = InferenceConfig(server_type="endpoint", model_name_or_path="m", endpoint_url="http://x/v1")

    async def turns():
        server = CaptionServer(Captioner(url="http://x/v1"), config, 0, requests_per_minute=120)
        for _ in range(3):
            await server._take_turn()
        now[0] = 110.0
        await server._take_turn()

    asyncio.run(turns())
    assert waited == [0.0, 0.5, 1.0, 0.0]


def test_a_video_is_dropped_where_no_turn_gave_captions(tmp_path):
    def document(name, *answers):
        facts = {"answers": [{"answers": [{"task": "video_captions", **answer} for answer in answers]}]}
        return Document(text=" ", id=name, metadata={"part": "00000", **facts})

    bad, good = {"reason": "answer_not_json", "detail": "no"}, {"answer": {"1": "a"}}
    documents = [document("one", good, bad), document("none", bad, bad)]
    kept = list(Answered(exclusions(tmp_path, "caption"), needed="video_captions").run(iter(documents)))
    assert [(each.id, len(each.metadata["answers"])) for each in kept] == [("one", 1)]
    (path,) = (tmp_path / "dropped" / "caption" / "answer_not_json").iterdir()
    dropped = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert sorted(dropped) == ["none", "one#video_captions-1"]


def test_prompts_keep_the_papers_constraints():
    captioner = Captioner(url="http://x/v1")
    for task in TASKS:
        text = write_prompt(task, 0, "content", captioner, "temporal", "a <<<raw>>> caption")
        assert text == write_prompt(task, 0, "content", captioner, "temporal", "a <<<raw>>> caption")
        assert "English" in text and "JSON" in text and "schooling" in text and len(prompt_hash(task)) == 12
    text = write_prompt("video_captions", 0, "content", captioner, "temporal", "a <<<raw>>> caption")
    assert all(
        rule in text for rule in ("10 to 25", "80 to 200", "30 to 100", "5 to 30", "10 to 70", "<<<a raw caption>>>")
    )
    assert "50 to 200" in write_prompt("frame_captions", 0, "content", captioner)
    assert "50 words at most" in write_prompt("frame_query", 0, "content", captioner)
    assert "5 to 15 words" in write_prompt("clip_query", 0, "content", captioner)
    assert len({prompt_hash(task) for task in TASKS}) == 4


def test_profiles_come_in_their_shares():
    drawn = [draw_profile(0, str(number), PAPER_PROFILES) for number in range(2000)]
    other_order = dict(sorted(PAPER_PROFILES.items(), reverse=True))
    assert drawn[:100] == [draw_profile(0, str(number), other_order) for number in range(100)]
    for profile, share in PAPER_PROFILES.items():
        assert abs(drawn.count(profile) / 2000 - share) < 0.04


def test_the_store_returns_what_was_put_under_the_same_facts_alone(tmp_path):
    store = AnswerStore(tmp_path)
    key = store.key(task="a", content=["x"], model="m")
    assert store.get(key) is None
    store.put(key, {"answer": {"1": "é"}})
    assert AnswerStore(tmp_path).get(store.key(model="m", content=["x"], task="a")) == {"answer": {"1": "é"}}
    assert store.get(store.key(task="a", content=["y"], model="m")) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"]
