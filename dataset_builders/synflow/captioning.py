"""Asking the captioner: through datatrove's InferenceRunner, with every answer kept by content.

A request is repeated while the server is down, busy or answers nonsense below the level of JSON; an answer that is
not what it has to be is repaired once and then asked for anew, a few times.
"""

import asyncio
import base64
import contextlib
import fcntl
import math
import os
import random
import time
from functools import cached_property
from pathlib import Path

import httpx
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.inference.servers import InferenceServer
from datatrove.pipeline.inference.types import InferenceError

from dataset_builders.synflow import graph
from dataset_builders.synflow.answers import VIDEO_STYLES, AnswerError, json_schema, read_answer
from dataset_builders.synflow.footage import encode_jpeg, read_frames
from dataset_builders.synflow.prompts import draw_profile, prompt_hash, write_prompt, write_repair
from dataset_builders.synflow.sources import film_of
from dataset_builders.synflow.store import AnswerStore


# Of the composed formats: the request, and what of the reference video it shows.
COMPOSED = {"ti2v": ("frame_query", "still"), "tv2v": ("clip_query", "clip")}
REFUSED = "captioner_refused"
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.25, 30.0


class CaptionerError(RuntimeError):
    """The captioner cannot be used: the run stops, and goes on from there when it is started again."""


class Refused(RuntimeError):
    """The server will not take this request; `args` are the status and its message."""


class CaptionServer(InferenceServer):
    """Any server that speaks the OpenAI protocol, asked with patience.

    datatrove's own client ignores Retry-After, and against a server on this machine gives up at the first 500.
    """

    def __init__(self, settings, config, rank, requests_per_minute=None):
        super().__init__(config, rank)
        self.settings = settings
        self._client = None
        self._pause = 60 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0

    async def start_server(self):
        return None

    async def monitor_health(self):
        await asyncio.Future()

    async def is_ready(self):
        return True

    async def server_cleanup(self):
        if self._client is not None:
            await self._client.aclose()
        await super().server_cleanup()

    async def make_request(self, payload):
        if self._client is None:
            key = os.environ.get(self.settings.api_key_env or "", "")
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            limits = httpx.Limits(max_connections=None)
            self._client = httpx.AsyncClient(headers=headers, timeout=self.settings.timeout_seconds, limits=limits)
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        deadline, wait, problem = time.monotonic() + self.settings.patience_seconds, FIRST_WAIT_SECONDS, ""
        while True:
            await self._take_turn()
            pause = wait * random.uniform(0.7, 1.3)  # so that those who wait do not come back all at once
            try:
                response = await self._client.post(url, json=payload)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}".strip()
            else:
                if response.status_code == 200:
                    with contextlib.suppress(ValueError, LookupError, TypeError):
                        answer = response.json()
                        answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]
                        answer["usage"] = answer.get("usage") or {}
                        return answer
                    problem = "an answer without choices"
                else:
                    problem = f"status {response.status_code}: {' '.join(response.text.split())[:200]}"
                    if response.status_code in (401, 403, 404):
                        raise CaptionerError(f"{url}: {problem}; check captioner.url, model and api_key_env")
                    if response.status_code < 500 and response.status_code not in (408, 409, 425, 429):
                        raise Refused(response.status_code, problem)
                    pause = _retry_after(response, pause)
            if time.monotonic() + pause > deadline:
                raise CaptionerError(
                    f"{url}: no answer in {self.settings.patience_seconds:g} s ({problem}); see that the captioner "
                    "runs and start the same command again: nothing that was answered is asked again"
                )
            await asyncio.sleep(pause)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    async def _take_turn(self):
        """Waits until the rate limit allows another request."""
        if self._pause:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._pause
            await asyncio.sleep(turn - now)


def _retry_after(response, pause):
    try:
        return min(300.0, max(0.0, float(response.headers["retry-after"])))
    except (KeyError, ValueError):
        return pause


class CaptionRunner(InferenceRunner):
    """datatrove's runner with a patient server, answers kept by content, and a count that nothing was lost.

    Args:
        recipe (`Recipe`): what to ask whom.
        work (`Path`): folder of the run, for locks.
        store (`str`): folder of the [`AnswerStore`].
        writer (`WholeWriter`): gets each document with `metadata["answers"]`.
        requests (callable): `(recipe, document)` to a list of [`Request`].
        workers (`int`): tasks that share the rate limit and the concurrency.
    """

    def __init__(self, recipe, work, store, writer, requests, workers=1):
        settings = recipe.captioner
        self.recipe, self.work, self.store_folder, self.requests = recipe, Path(work), str(store), requests
        self.workers = workers
        config = InferenceConfig(
            server_type="endpoint",
            endpoint_url=settings.url or None,
            model_name_or_path=settings.model,
            max_concurrent_generations=max(1, settings.concurrency // workers),
            metric_interval=3600,
        )
        super().__init__(self._answer_all, config, writer, metadata_key="answers")

    def _init_server(self, rank):
        rate = self.recipe.captioner.requests_per_minute
        return CaptionServer(self.recipe.captioner, self.config, rank, rate and rate / self.workers)

    def run(self, data, rank=0, world_size=1):
        documents = list(data)
        # Whoever is still at this part, say because only its driver was killed, finishes first: its answers are used.
        locks = self.work / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / f"{Path(str(self.output_writer.output_folder.path)).name}-{rank:05d}", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                super().run(iter(documents), rank, world_size)
            except InferenceError as error:
                if isinstance(error.error, CaptionerError):
                    raise error.error from None
                raise
        written = self.stats["documents_processed"].total if documents else 0
        if written != len(documents):
            raise RuntimeError(f"part {rank}: {len(documents) - written} documents were not written; start again")

    async def _answer_all(self, document, generate):
        """The answers to all of a document's requests, in order."""
        requests = self.requests(self.recipe, document)
        answers = await asyncio.gather(*(self._answer(document, request, generate) for request in requests))
        return {"answers": answers}

    async def _answer(self, document, request, generate):
        """`{"answer": ...}` or `{"reason": ..., "detail": ...}`, with what it is about."""
        about = {"task": request.task, "target": request.target, **request.about, "prompt": prompt_hash(request.task)}
        settings = self.recipe.captioner
        if settings.kind == "graph":
            how = {"profile": request.profile, "moment": request.moment, "turn": request.turn}
            text = graph.answer(request.task, *request.films(), **how)
            return {**about, "answer": read_answer(request.task, text)}
        store = AnswerStore(self.store_folder)
        key = request.key(settings)
        stored = await asyncio.to_thread(store.get, key)
        if stored is None:
            stored = await self._pay(request, key, generate)
            if stored.get("reason") != REFUSED:  # nothing was paid, and a server that is set up otherwise may take it
                await asyncio.to_thread(store.put, key, stored)
        for name in ("input_tokens", "output_tokens", "requests"):
            self.stat_update(name, value=stored[name], unit="answer")
        return {**about, **{name: stored[name] for name in ("answer", "reason", "detail") if name in stored}}

    async def _pay(self, request, key, generate):
        """Ask, repair once, ask anew; the last failure's reason is the answer's."""
        settings = self.recipe.captioner
        media = await asyncio.to_thread(request.media, settings)
        spent = {"input_tokens": 0, "output_tokens": 0, "requests": 0}
        failure = said = None
        for attempt in range(settings.retries + 1):
            messages = [{"role": "user", "content": [*media, {"type": "text", "text": request.prompt}]}]
            for repair in (False, True):
                payload = {
                    "messages": messages,
                    "temperature": settings.temperature,
                    "max_tokens": settings.max_tokens,
                    "seed": int(key[:7], 16) + attempt,
                }
                if settings.structured:
                    payload["response_format"] = json_schema(request.task)
                try:
                    result = await _generated(generate, payload)
                except Refused as error:
                    return {**spent, "reason": REFUSED, "detail": str(error.args[1])}
                spent["requests"] += 1
                spent["input_tokens"] += result.usage.get("prompt_tokens") or 0
                spent["output_tokens"] += result.usage.get("completion_tokens") or 0
                try:
                    if result.finish_reason == "length":
                        raise AnswerError("answer_truncated", f"it is longer than {settings.max_tokens} tokens")
                    return {**spent, "answer": read_answer(request.task, result.text)}
                except AnswerError as error:
                    failure, said = error, result.text[:4000]
                if not repair:
                    bad = {"role": "assistant", "content": said}
                    messages = [*messages, bad, {"role": "user", "content": write_repair(failure)}]
        return {**spent, "reason": failure.reason, "detail": str(failure), "said": said}


async def _generated(generate, payload):
    try:
        return await generate(payload)
    except InferenceError as error:
        # Its own message would repeat all pictures.
        raise (error.__cause__ or RuntimeError(str(error.error)[:300])) from None


class Request:
    """One thing to ask of the captioner.

    Args:
        recipe (`Recipe`): the seed and the profiles.
        task (`str`): of `prompts.TASKS`.
        document (`Document`): the video, or the reference of a composed query.
        still (`int`, *optional*): which of its frames is asked about.
        clip (`int`, *optional*): which of its clips.
        target (`dict`, *optional*): metadata of the video that a composed query leads to.
        turn (`int`): how often the same was asked before, under another profile.
    """

    def __init__(self, recipe, task, document, still=None, clip=None, target=None, turn=0):
        self.recipe, self.task, self.document = recipe, task, document
        self.still, self.clip, self._target, self.turn = still, clip, target, turn
        facts = document.metadata
        self.target = target["id"] if target else None
        self.profile = "other"
        if task == "video_captions":
            again = f"|{turn}" if turn else ""
            self.profile = draw_profile(recipe.seed, facts["content"] + again, recipe.profiles)
        self.content = [facts["content"], *([f"turn {turn}"] if turn else [])]
        if still is not None:
            self.content.append(facts["frames"][still]["time"])
        if clip is not None:
            self.content.append(facts["clips"][clip]["span"])
        if target is not None:
            self.content.append(target["content"])
        self.about = {"still": still, "clip": clip, "profile": self.profile}

    @cached_property
    def prompt(self):
        about = "|".join(map(str, self.content))
        hint = self.document.metadata["raw_text"] if self.task.endswith("captions") else None
        return write_prompt(self.task, self.recipe.seed, about, self.recipe.captioner, self.profile, hint)

    @property
    def moment(self):
        """Where in its video the still is, 0 to 1."""
        if self.still is None:
            return None
        return self.document.metadata["frames"][self.still]["time"] / self.document.metadata["seconds"]

    def key(self, settings):
        """The store's key: all that the answer depends on."""
        names = ("model", "temperature", "max_tokens", "send", "frames", "side", "structured", "retries")
        return AnswerStore.key(
            task=self.task,
            prompt=self.prompt,
            templates=prompt_hash(self.task),
            content=self.content,
            **{name: getattr(settings, name) for name in names},
        )

    def films(self):
        """Scene graphs of the reference and of the target (None without one), for rendered videos."""
        target = None
        if self._target is not None:
            target = Document(text=" ", id=self._target["id"], metadata=self._target)
        return film_of(self.recipe, self.document), target and film_of(self.recipe, target)

    def media(self, settings):
        """The pictures or videos of the request, as parts of an OpenAI message."""
        facts, parts = self.document.metadata, []
        if self.still is not None:
            parts += _pictures([Path(facts["frames"][self.still]["file"]).read_bytes()])
        elif self.clip is not None:
            length = facts["clips"][self.clip]["span"]
            parts += _video(facts["clips"][self.clip]["file"], length[1] - length[0], settings)
        else:
            parts += _video(facts["file"], facts["seconds"], settings)
        if self._target is not None:
            parts += _video(self._target["file"], self._target["seconds"], settings)
        return parts


def _video(path, seconds, settings):
    if settings.send == "video":
        data = base64.b64encode(Path(path).read_bytes()).decode()
        return [{"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}]
    times = [seconds * k / max(1, settings.frames - 1) for k in range(settings.frames)]
    return _pictures([encode_jpeg(frame, 90, settings.side) for frame in read_frames(path, times)])


def _pictures(files):
    urls = [f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" for data in files]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def caption_requests(recipe, document):
    """Five captions of the video, once or in several turns, and of each still that text-to-image pairs need."""
    stills = range(min(document.metadata["captioned_stills"], len(document.metadata["frames"])))
    frames = [Request(recipe, "frame_captions", document, still=still) for still in stills]
    turns = max(1, math.ceil(document.metadata["serves"].get("t2v", 0) / len(VIDEO_STYLES)))
    return [*(Request(recipe, "video_captions", document, turn=turn) for turn in range(turns)), *frames]


def composition_requests(recipe, document):
    """A query for each relation of the video to another that composed pairs need."""
    requests = []
    for relation in document.metadata["relations"]:
        task, medium = COMPOSED[relation["task"]]
        part = {medium: relation["part"]}
        requests.append(Request(recipe, task, document, target=relation["target"], **part))
    return requests


class Answered(BaseFilter):
    """Drops videos whose captions could not be had, and notes every other answer that is missing.

    Args:
        needed (`str`, *optional*): the task without any of whose answers the video is dropped.
    """

    name = "answered"

    def __init__(self, exclusion_writer, needed=None):
        super().__init__(exclusion_writer)
        self.needed = needed

    def filter(self, document):
        answers = document.metadata["answers"][0]["answers"]
        document.metadata["answers"] = [answer for answer in answers if "answer" in answer]
        asked = [answer for answer in answers if answer["task"] == self.needed]
        if asked and not any("answer" in answer for answer in asked):
            document.metadata["detail"] = asked[0]["detail"]
            return False, asked[0]["reason"]
        for number, answer in enumerate(answers):
            if "answer" not in answer:
                facts = {"part": document.metadata["part"], "filter_reason": answer["reason"], **answer}
                lost = Document(text=answer["detail"], id=f"{document.id}#{answer['task']}-{number}", metadata=facts)
                self.exclusion_writer.write(lost)
        return True
