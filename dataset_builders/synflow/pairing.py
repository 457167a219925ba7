"""Stage 3, task extension: which videos serve which formats, which are related, and the pairs (arXiv 2510.27571,
section 4).
"""

import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from sklearn.feature_extraction.text import TfidfVectorizer

from dataset_builders.mini.pairs import INSTRUCTIONS
from dataset_builders.mini.world import generator
from dataset_builders.synflow.answers import FRAME_STYLES, VIDEO_STYLES
from dataset_builders.synflow.captioning import COMPOSED
from dataset_builders.synflow.decontamination import benchmark_texts, text_overlap
from dataset_builders.synflow.footage import clip_spans, frame_times
from dataset_builders.synflow.publish import media_names
from dataset_builders.synflow.recipe import FORMATS
from dataset_builders.synflow.store import write_whole


NEIGHBOURS = 3  # Not in the paper: candidates for a hard negative
MARGIN = 0.02  # Not in the paper: by how much a text fits its own video better than a hard negative

VIDEO_STYLE_NAMES = {style.key: style.name for style in VIDEO_STYLES}
FRAME_STYLE_NAMES = {style.key: style.name for style in FRAME_STYLES}

# The query side's instruction by format, and by caption style where the benchmark's tasks differ by it.
T2V_INSTRUCTIONS = {
    "concise": INSTRUCTIONS["coarse"],
    "rich": INSTRUCTIONS["detailed"],
    "abstract": INSTRUCTIONS["general"],
    "keywords": INSTRUCTIONS["keywords"],
    "partial": INSTRUCTIONS["event"],
}


class BudgetError(RuntimeError):
    """There are too few pairs for the recipe's budgets."""


def lot(*keys):
    """A number that orders things at random, the same in every run."""
    return hashlib.blake2b(repr(keys).encode(), digest_size=8).hexdigest()


def split_of(recipe, group):
    share = recipe.output.validation_share
    return "validation" if generator("synflow split", recipe.seed, group).random() < share else "train"


def scaled_budgets(recipe, supply):
    """The budgets, all shrunk by one factor where a format's supply is too small, but to one pair at least.

    Args:
        recipe (`Recipe`): budgets, and whether they may shrink.
        supply (`dict`): pairs that there can be, by format.

    Raises:
        BudgetError: too few, and `shrink` is off; or a format has none at all.
    """
    wanted = {task: recipe.budgets[task] for task in FORMATS if recipe.budgets.get(task)}
    short = {task: supply.get(task, 0) for task, number in wanted.items() if supply.get(task, 0) < number}
    if not short:
        return wanted
    counts = ", ".join(f"{task}: {number} of {wanted[task]}" for task, number in short.items())
    if not recipe.shrink:
        raise BudgetError(f"too few pairs ({counts}); add videos, raise pairs_per_video, or set shrink: true")
    if not all(short.values()):
        raise BudgetError(f"a format has no pairs at all ({counts}); add videos or set its budget to 0")
    factor = min(number / wanted[task] for task, number in short.items())
    return {task: max(1, min(supply[task], round(number * factor))) for task, number in wanted.items()}


class Allotment(PipelineStep):
    """Says which videos serve which formats, so that no more is cut and asked for than the budgets need."""

    type, name = "🎲", "allotment"

    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe

    def run(self, data, rank=0, world_size=1):
        documents = list(data)
        recipe = self.recipe
        for document in documents:
            document.metadata.update(split=split_of(recipe, document.metadata["group"]), serves={})
        budgets = scaled_budgets(recipe, self._supply(documents)) if documents else {}
        for task, number in budgets.items():
            self._give(documents, task, math.ceil(number * (1 + recipe.reserve)))
        for document in documents:
            serves = document.metadata["serves"]
            stills = max(serves.get("t2i", 0), serves.get("i2v", 0), serves.get("ti2v", 0))
            document.metadata["stills"] = stills
            document.metadata["captioned_stills"] = serves.get("t2i", 0)
            document.metadata["cuts"] = max(serves.get("v2v", 0), serves.get("tv2v", 0))
            yield document

    def _most(self, document, task):
        """Pairs of a format that a video can serve."""
        cutting = self.recipe.quality.cutting
        most = self.recipe.most_pairs(task)
        if task in ("t2i", "i2v", "ti2v"):
            return min(most, len(frame_times(document.metadata["shots"], cutting.frames_per_video)))
        if task in ("v2v", "tv2v"):
            facts = document.metadata
            spans = clip_spans(facts["shots"], facts["seconds"], cutting.clips_per_video, cutting.min_shot_seconds)
            return min(most, len(spans))
        return min(most, {"t2v": self.recipe.caption_rounds * len(VIDEO_STYLES), "t2t": 10}[task])

    def _supply(self, documents):
        return {task: sum(self._most(document, task) for document in documents) for task in FORMATS}

    def _give(self, documents, task, number):
        order = sorted(documents, key=lambda d: lot(self.recipe.seed, "allot", task, d.metadata["content"]))
        most = [self._most(document, task) for document in order]
        # Everybody gets one before somebody gets a second. All may serve t2v with the captions that they have anyway.
        free = len(VIDEO_STYLES) if task == "t2v" else 0
        for turn in range(max(most, default=0)):
            for document, limit in zip(order, most):
                if number <= 0 and turn >= free:
                    return
                if limit > turn:
                    document.metadata["serves"][task] = turn + 1
                    number -= 1


class Neighbours:
    """Who is like whom by caption, within pools of consecutive videos of one split.

    Args:
        documents (list of `Document`): captioned, in order.
        pool (`int`): videos compared with one another.
    """

    def __init__(self, documents, pool):
        self.pools, self.place = [], {}
        by_split = defaultdict(list)
        for document in documents:
            by_split[document.metadata["split"]].append(document)
        for members in by_split.values():
            for start in range(0, len(members), pool):
                self._add(members[start : start + pool])

    def _add(self, members):
        texts = [" ".join(captions_of(document).values()) for document in members]
        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), dtype=np.float32)
        vectors = vectorizer.fit_transform(texts)
        for row, document in enumerate(members):
            self.place[document.id] = (len(self.pools), row)
        # Transposed, a text costs what its own words cost, not what all words of the pool do.
        self.pools.append((members, vectorizer, vectors, vectors.T.tocsr()))

    def near(self, document, settings):
        """`[(similarity, Document)]` of other sources' videos, the nearest first."""
        pool, row = self.place[document.id]
        members, _, vectors, by_word = self.pools[pool]
        scores = (vectors[row] @ by_word).toarray().ravel()
        found = []
        for other in np.argsort(-scores, kind="stable")[: 8 * NEIGHBOURS].tolist():
            score = float(scores[other])
            if members[other].metadata["group"] == document.metadata["group"]:
                continue
            if settings.min_similarity <= score <= settings.max_similarity:
                found.append((score, members[other]))
        return found

    def text_scores(self, text, document):
        """Cosines of a text with the captions of all members of the document's pool, and the document's row."""
        pool, row = self.place[document.id]
        _, vectorizer, _, by_word = self.pools[pool]
        return (vectorizer.transform([text]) @ by_word).toarray().ravel(), row

    def member_scores(self, texts, document, ids):
        """Cosines of N texts with the document's own captions and with those of `ids` in the same pool: N lists."""
        pool, row = self.place[document.id]
        _, vectorizer, vectors, _ = self.pools[pool]
        rows = [row, *(self.place[other][1] for other in ids)]
        return (vectorizer.transform(texts) @ vectors[rows].T).toarray().tolist()


def captions_of(document):
    """The video's five captions, those of the first turn."""
    return next(a["answer"] for a in document.metadata["answers"] if a["task"] == "video_captions")


def facts_for_target(document):
    """What a request about two videos needs to know of the second."""
    names = ("content", "file", "seconds", "source", "number", "part", "index")
    return {"id": document.id, **{name: document.metadata[name] for name in names}}


class Relation(PipelineStep):
    """Notes for each captioned video its neighbours, and for those that serve composed formats whom to ask about."""

    type, name = "🔗", "relation"

    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe

    def run(self, data, rank=0, world_size=1):
        documents = list(data)
        settings = self.recipe.composition
        neighbours = Neighbours(documents, settings.pool)
        for document in documents:
            near = neighbours.near(document, settings)
            document.metadata["neighbours"] = [other.id for _, other in near[:NEIGHBOURS]]
            document.metadata["relations"] = [
                {"task": task, "part": part, "similarity": round(score, 4), "target": facts_for_target(other)}
                for task in COMPOSED
                for part, (score, other) in enumerate(near[: document.metadata["serves"].get(task, 0)])
            ]
            yield document


def write_pairs(recipe, work, pairs):
    """Writes `{format: pairs}` in a random order, as many as the budgets say, to `paired/<format>-<split>-<n>.jsonl`.

    `paired/media.json` gets the files that they use, each by its name in the dataset.

    Returns:
        `dict`: number of pairs by format.
    """
    budgets = scaled_budgets(recipe, {task: len(found) for task, found in pairs.items()})
    size, name_of, media = recipe.output.rows_per_shard, media_names(recipe, work), {}
    for task, number in budgets.items():
        taken = sorted(pairs[task], key=lambda pair: lot(recipe.seed, "take", pair["pair_id"]))[:number]
        for split in ("train", "validation"):
            rows = [pair for pair in taken if pair["split"] == split]
            shards = math.ceil(len(rows) / size)
            for shard in range(shards):
                lines = b"".join(orjson.dumps(row) + b"\n" for row in rows[shard * size : (shard + 1) * size])
                write_whole(work / "paired" / f"{task}-{split}-{shard:05d}-of-{shards:05d}.jsonl", lines)
        media |= {name_of(file): file for pair in taken for file in _files(pair)}
    write_whole(work / "paired" / "media.json", orjson.dumps(media, option=orjson.OPT_SORT_KEYS))
    return budgets


def _files(pair):
    sides = pair["query"], pair["target"], *pair["negatives"]
    return [side[medium] for side in sides for medium in ("image", "video") if medium in side]


def pair_row(task, document, k, query, target, **facts):
    """The `k`-th pair of a format that a video serves; what raw videos do not tell of themselves is None."""
    about = document.metadata
    return {
        "pair_id": f"{task}/{document.id}/{k}",
        "split": about["split"],
        "query": query,
        "target": target,
        "negatives": [],
        "instruction": INSTRUCTIONS.get(task),
        "task": task,
        "source_id": document.id,
        "target_id": document.id,
        "span": [0.0, about["seconds"]] if "seconds" in about else None,
        "caption_style": None,
        "prompt_hash": None,
        "captioner": None,
        "scores": {"similarity": about.get("similarity"), "motion": about.get("motion"), "relation": None},
        **facts,
    }


class FoundPairs(PipelineStep):
    """Text-to-video pairs as they were found, raw or filtered: the video's own caption and the video, no negative."""

    type, name = "👥", "found pairs"

    def __init__(self, recipe, work, exclusion_writer):
        super().__init__()
        self.recipe, self.work, self.exclusion_writer = recipe, Path(work), exclusion_writer

    def run(self, data, rank=0, world_size=1):
        pairs = []
        with self.exclusion_writer:
            for document in data:
                if document.text.strip():
                    pairs.append(self._pair(document))
                else:
                    document.metadata["filter_reason"] = "text_empty"
                    self.exclusion_writer.write(document)
        write_pairs(self.recipe, self.work, {"t2v": pairs})
        yield from ()

    def _pair(self, document):
        document.metadata["split"] = split_of(self.recipe, document.metadata["group"])
        sides = {"text": document.text}, {"video": document.metadata["file"]}
        return pair_row("t2v", document, 0, *sides, instruction=INSTRUCTIONS["coarse"])


class Pairing(PipelineStep):
    """Makes the pairs of all formats, in the budgets' proportions, and writes them by format, split and shard.

    A composed query is dropped where its text alone ranks its target first among the videos of its pool.
    """

    type, name = "👥", "pairing"

    def __init__(self, recipe, work, exclusion_writer):
        super().__init__()
        self.recipe, self.work, self.exclusion_writer = recipe, Path(work), exclusion_writer

    def run(self, data, rank=0, world_size=1):
        documents = list(data)
        if not documents:
            raise BudgetError(
                f"no video got usable captions, so there are no pairs; {self.work / 'dropped'} says why. Mend the "
                f"captioner, remove {self.work} (and the answers, see --store, if its settings stay), start again"
            )
        self._neighbours = Neighbours(documents, self.recipe.composition.pool)
        self._by_id = {document.id: document for document in documents}
        with self.exclusion_writer:
            pairs = {task: self._pairs(documents, task) for task in FORMATS if self.recipe.budgets.get(task)}
        budgets = write_pairs(self.recipe, self.work, pairs)
        for task, number in budgets.items():
            self.stat_update(task, value=number, unit="task")
        summary = {"pairs": budgets, "videos": len(documents)}
        write_whole(self.work / "paired" / "summary.json", json.dumps(summary, sort_keys=True))
        yield from ()

    def _pairs(self, documents, task):
        make, kept = getattr(self, f"_{task}"), []
        for document in documents:
            for pair in make(document) if task in document.metadata["serves"] else ():
                if self._is_in_benchmark(pair):
                    self._drop(document, task, "text_in_benchmark", pair["query"]["text"])
                else:
                    kept.append(pair)
        return kept

    def _is_in_benchmark(self, pair):
        """Whether a text that the captioner wrote is one of the benchmark's queries."""
        settings = self.recipe.decontamination
        if settings is None:
            return False
        ngram_set = benchmark_texts(settings)
        texts = [side["text"] for side in (pair["query"], pair["target"]) if side.get("text")]
        return any(text_overlap(text, ngram_set, settings.ngram) > settings.max_overlap for text in texts)

    def _drop(self, document, task, reason, detail):
        facts = {"part": document.metadata["part"], "filter_reason": reason, "task": task}
        self.exclusion_writer.write(Document(text=detail, id=f"{document.id}#{task}", metadata=facts))

    def _asked(self, answer):
        return {"prompt_hash": answer["prompt"], "captioner": self.recipe.captioner.model}

    def _styles(self, document, turn=0):
        """The five captions' keys at random: the first is the video's new text."""
        rng = generator("new text", self.recipe.seed, document.metadata["content"], *([turn] if turn else []))
        return [str(key) for key in rng.permutation(list("12345"))]

    def _video_captions(self, document):
        """The answers of all turns."""
        return [a for a in document.metadata["answers"] if a["task"] == "video_captions"]

    def _t2v(self, document):
        turns = enumerate(self._video_captions(document))
        said = [(answer, key) for turn, answer in turns for key in self._styles(document, turn)]
        said = said[: document.metadata["serves"]["t2v"]]
        near = document.metadata["neighbours"]
        texts = [answer["answer"][key] for answer, key in said]
        scores = self._neighbours.member_scores(texts, document, near)
        for k, ((answer, key), text, (own, *others)) in enumerate(zip(said, texts, scores)):
            style = VIDEO_STYLE_NAMES[key]
            negatives = self._negative_of_text(text, document, own, others)
            if negatives is None:
                self._drop(document, "t2v", "pair_without_negative", text)
                continue
            row = pair_row("t2v", document, k, {"text": text}, {"video": document.metadata["file"]})
            row.update(caption_style=style, instruction=T2V_INSTRUCTIONS[style], negatives=negatives)
            yield {**row, **self._asked(answer)}

    def _negative_of_text(self, text, document, own, others):
        """The nearest video that the text fits worse than its own; None where all others lie too near or far."""
        near = document.metadata["neighbours"]
        for other, score in zip(near, others):
            if score < own - MARGIN:
                return [{"video": self._by_id[other].metadata["file"]}]
        scores, row = self._neighbours.text_scores(text, document)
        members = self._neighbours.pools[self._neighbours.place[document.id][0]][0]
        # No neighbour will do: the best among all that the text fits worse.
        below = [i for i in np.argsort(-scores, kind="stable").tolist() if i != row and scores[i] < own - MARGIN]
        groups = document.metadata["group"]
        below = [i for i in below[:NEIGHBOURS] if members[i].metadata["group"] != groups]
        return [{"video": members[below[0]].metadata["file"]}] if below else None

    def _t2t(self, document):
        said = self._video_captions(document)[0]
        keys = self._styles(document)
        combinations = [(a, b) for i, a in enumerate(keys) for b in keys[i + 1 :]]
        for k, (first, second) in enumerate(combinations[: document.metadata["serves"]["t2t"]]):
            short, long = sorted((said["answer"][first], said["answer"][second]), key=len)
            styles = sorted((VIDEO_STYLE_NAMES[first], VIDEO_STYLE_NAMES[second]))
            row = pair_row("t2t", document, k, {"text": short}, {"text": long}, caption_style="+".join(styles))
            yield {**row, **self._asked(said)}

    def _t2i(self, document):
        for said in document.metadata["answers"]:
            if said["task"] == "frame_captions":
                rng = generator("new text", self.recipe.seed, document.metadata["content"], said["still"])
                key = str(rng.integers(1, 6))
                frame = document.metadata["frames"][said["still"]]
                row = pair_row("t2i", document, said["still"], {"text": said["answer"][key]}, {"image": frame["file"]})
                row.update(span=[frame["time"], frame["time"]], caption_style=FRAME_STYLE_NAMES[key])
                yield {**row, **self._asked(said)}

    def _i2v(self, document):
        for k, frame in enumerate(document.metadata["frames"][: document.metadata["serves"]["i2v"]]):
            target = {"video": document.metadata["file"]}
            span = [frame["time"], frame["time"]]
            yield pair_row("i2v", document, k, {"image": frame["file"]}, target, span=span)

    def _v2v(self, document):
        for k, clip in enumerate(document.metadata["clips"][: document.metadata["serves"]["v2v"]]):
            target = {"video": document.metadata["file"]}
            yield pair_row("v2v", document, k, {"video": clip["file"]}, target, span=list(clip["span"]))

    def _ti2v(self, document):
        return self._composed("ti2v", document)

    def _tv2v(self, document):
        return self._composed("tv2v", document)

    def _composed(self, task, document):
        """Reference and text to a related video; the reference's own video, which the picture alone would find, is the
        hard negative.
        """
        facts = document.metadata
        relations = [relation for relation in facts["relations"] if relation["task"] == task]
        for _ in range(facts["serves"][task] - len(relations)):
            self._drop(document, task, "no_related_video", "none within the bounds on similarity")
        asked, medium = COMPOSED[task]
        said = {answer[medium]: answer for answer in facts["queries"] if answer["task"] == asked}
        for relation in relations:
            part = relation["part"]
            if part not in said:
                continue  # the captioner's exclusions tell why
            if task == "ti2v":
                frame = facts["frames"][part]
                reference, span = {"image": frame["file"]}, [frame["time"], frame["time"]]
            else:
                clip = facts["clips"][part]
                reference, span = {"video": clip["file"]}, list(clip["span"])
            target = self._by_id[relation["target"]["id"]]
            text = said[part]["answer"]["query"]
            scores, row = self._neighbours.text_scores(text, target)
            ahead = int((scores > scores[row]).sum())
            if scores[row] > 0 and ahead < self.recipe.composition.text_alone_rank:
                self._drop(document, task, "text_alone_suffices", text)
                continue
            query = {"text": text, **reference}
            made = pair_row(task, document, part, query, {"video": target.metadata["file"]}, span=span)
            made.update(target_id=target.id, negatives=[{"video": facts["file"]}])
            made["scores"] = {**made["scores"], "relation": relation["similarity"]}
            yield {**made, **self._asked(said[part])}
