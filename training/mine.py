"""Hard negatives: what a prober ranks high for a query, but not so high that it is likely an answer.

A recipe that names a `negative_corpus` mines from it at its start, or at every epoch's with that epoch's prober. A
corpus is a repo with the columns `text`, `image`, `video` (any of them) and, if known, `source_id`; or a pairs repo,
whose targets are taken. Embeddings are kept by the content of what they embed and the weights of the prober, so that
a mining that was killed goes on, and one of a grown corpus embeds what is new. The corpus is shared over the ranks:
each indexes its part with FAISS, and the best of all parts are merged, so that the result is that of one rank.
"""

import hashlib
import uuid
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from training.pairs import COLUMNS, ROWS_AT_ONCE, SIDES, FrameStore, read_chunk, read_pairs, task_names


EMBED_AT_ONCE = 256  # sides between two writes of the cache
FIRST_DEPTH = 64  # candidates looked at; more where filtering leaves too few


class MiningRules(NamedTuple):
    """What is a hard negative.

    Attributes:
        top_k (`int`): most negatives a query.
        margin (`float`): a negative's cosine with the query is below the positive's by at least this.
        relative_margin (`float`): and at most this share of it, where the positive's is above 0.
        identical_tolerance (`float`, *optional*): a candidate whose cosine with the positive is within this of 1 is
            the positive; None compares contents only.
    """

    top_k: int
    margin: float = 0.0
    relative_margin: float = 0.95
    identical_tolerance: float | None = 1e-5


class Corpus(NamedTuple):
    """What negatives are taken from.

    Attributes:
        sides (list of [`Side`]): different contents, in order.
        sources (list of `set`): ids of the source videos of each; empty where unknown.
        store ([`FrameStore`]): of their media.
        skipped (list of [`Skipped`]): rows that could not be read.
    """

    sides: list
    sources: list
    store: FrameStore
    skipped: list

    def digest(self):
        """Twelve digits that tell the content apart."""
        known = [(tuple(side), sorted(sources)) for side, sources in zip(self.sides, self.sources)]
        return hashlib.sha256(repr(known).encode()).hexdigest()[:12]


def read_corpus(name, split, store, progress=False):
    """A corpus or the targets of a pairs repo, each content once; media go to the store, not sealed before the end.

    Args:
        name (`str`): folder or Hub name; `name:config` for one config.
        split (`str`): its split; a corpus with another single split is read all the same.
        store ([`FrameStore`]): receives the media and is sealed.
        progress (`bool`): show a bar.

    Raises:
        ValueError: there is no such repo, no such column, or nothing readable in it.
    """
    repo, _, chosen = name.partition(":")
    found, skipped = {}, []
    configs = [chosen] if chosen else task_names(repo)
    if "all" in configs:  # UVRD's config of all tasks
        configs = ["all"]
    for config in configs:
        rows = _stream(repo, config, split)
        if set(COLUMNS) <= set(rows.column_names):
            pairs, broken = read_pairs(repo, config, split, store, progress=progress)
            entries = [(pair.target, pair.source_id) for pair in pairs]
        else:
            entries, broken = _corpus_rows(rows, repo, config, store, progress)
        skipped += broken
        for side, source in entries:
            found.setdefault(side, set()).update([] if source is None else [source])
    if find_spec("faiss") is None:
        raise ValueError("mining needs faiss: pip install faiss-cpu")
    if not found:
        raise ValueError(f"corpus {name!r} has no readable row")
    store.seal()
    return Corpus(list(found), list(found.values()), store, skipped)


def _stream(repo, config, split):
    try:
        builder = datasets.load_dataset_builder(repo, config)
        splits = list(builder.config.data_files or {})
        split = split if split in splits or len(splits) != 1 else splits[0]
        return datasets.load_dataset(repo, config, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read corpus {repo!r}, config {config!r}: {' '.join(str(error).split())}") from error


def _corpus_rows(rows, repo, config, store, progress):
    """`(side, source)` of a corpus's rows, and what could not be read."""
    kinds = [kind for kind in ("text", "image", "video") if kind in rows.column_names]
    if not kinds:
        raise ValueError(f"corpus {repo!r}, config {config!r}, has none of the columns text, image, video")
    rows = rows.select_columns([name for name in (*kinds, "source_id") if name in rows.column_names])
    entries, skipped, first = [], [], 0
    with tqdm(desc=f"reading {config}", unit="row", disable=not progress, leave=False) as bar:
        for table in rows.with_format("arrow").iter(ROWS_AT_ONCE):
            # A row is read as the target of a pair whose query does not matter.
            rest = dict.fromkeys(SIDES) | {"query_text": "any", "negatives": None, "instruction": None}
            as_pairs = [
                rest | {f"target_{kind}": row[kind] for kind in kinds} | {"source_id": row.get("source_id")}
                for row in table.to_pylist()
            ]
            pairs, broken = [], []
            read_chunk(config, first, as_pairs, store, pairs, broken)
            entries += [(pair.target, pair.source_id) for pair in pairs]
            skipped += broken
            first += len(as_pairs)
            bar.update(len(as_pairs))
    return entries, skipped


class EmbeddingCache:
    """Embeddings on disk by content and prober; every writer adds files of its own, whole or not at all.

    Args:
        folder (`str` or `os.PathLike`): shared by all ranks.
        prober (`str`): what tells the prober's weights apart.
    """

    def __init__(self, folder, prober):
        self._folder = Path(folder) / prober
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rows, self._read = {}, set()
        self.refresh()

    def __contains__(self, side):
        return self.key(side) in self._rows

    def __getitem__(self, side):
        """Embedding of a `([`Side`], instruction)`: `(D,)` float32."""
        return self._rows[self.key(side)]

    @staticmethod
    def key(side):
        return hashlib.sha256(repr((tuple(side[0]), side[1])).encode()).hexdigest()

    def put(self, sides, rows):
        """Keep embeddings `(len(sides), D)`."""
        temporary = self._folder / f".{uuid.uuid4().hex}.tmp"
        with open(temporary, "wb") as file:
            np.savez(file, keys=np.array([self.key(side) for side in sides]), rows=rows.astype(np.float32))
        temporary.rename(self._folder / f"{uuid.uuid4().hex}.npz")

    def refresh(self):
        """Read what other ranks have written."""
        for path in sorted(self._folder.glob("*.npz")):
            if path.name not in self._read:
                self._read.add(path.name)
                with np.load(path, allow_pickle=False) as saved:
                    self._rows.update(zip(saved["keys"].tolist(), saved["rows"]))


def embed_all(sides, embed, cache, accelerator, together=False):
    """Embeddings of sides, each content once, shared over the ranks.

    Args:
        sides (list of `([`Side`], str or None)`): contents and instructions.
        embed (`Callable`): from such a list to `(M, D)`.
        cache ([`EmbeddingCache`]): on storage that all ranks share.
        accelerator (`Accelerator`): the ranks.
        together (`bool`): ranks must call `embed` as often and with as many sides (sharded weights).

    Returns:
        `np.ndarray` of shape `(len(sides), D)`, float32, L2-normalised, on every rank.
    """
    accelerator.wait_for_everyone()
    cache.refresh()
    new = [side for side in dict.fromkeys(sides) if side not in cache]
    mine = new[accelerator.process_index :: accelerator.num_processes]
    count = len(mine)
    if together:
        mine = mine + new[:1] * (-(-len(new) // accelerator.num_processes) - count)
    starts = range(0, len(mine), EMBED_AT_ONCE)
    for start in tqdm(starts, desc="embedding", unit="batch", disable=not accelerator.is_main_process, leave=False):
        part = mine[start : start + EMBED_AT_ONCE]
        cache.put(part[: max(count - start, 0)], embed(part).numpy()[: max(count - start, 0)])
    accelerator.wait_for_everyone()
    cache.refresh()
    rows = np.stack([cache[side] for side in sides])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class _ShardedIndex:
    """Exact inner-product search in a corpus whose parts lie on the ranks."""

    def __init__(self, rows, accelerator):
        import faiss  # optional: only mining needs it

        self._accelerator = accelerator
        self._places = np.arange(accelerator.process_index, len(rows), accelerator.num_processes)
        self._index = faiss.IndexFlatIP(rows.shape[1])
        self._index.add(np.ascontiguousarray(rows[self._places]))

    def search(self, queries, depth):
        """Places and cosines of the best of the whole corpus, best first; the lower place of two that are alike."""
        depth_here = min(depth, len(self._places))
        scores = np.empty((len(queries), 0), dtype=np.float32)
        places = np.empty((len(queries), 0), dtype=np.int64)
        if depth_here:
            scores, found = self._index.search(np.ascontiguousarray(queries), depth_here)
            places = self._places[found]
        if self._accelerator.num_processes > 1:
            parts = gather_object([(scores, places)])
            scores, places = (np.concatenate(each, axis=1) for each in zip(*parts))
        order = np.lexsort((places, -scores))[:, :depth]
        return np.take_along_axis(places, order, axis=1), np.take_along_axis(scores, order, axis=1)


def mine(pairs, corpus, query_rows, target_rows, corpus_rows, rules, accelerator):
    """Hard negatives of pairs.

    A candidate is left out if it outscores the rules' margins, is the query or a target of the same query (by content,
    or by an embedding that is the positive's), or comes from the positive's source video.

    Args:
        pairs (list of [`Pair`]): P of them.
        corpus ([`Corpus`]): C sides.
        query_rows, target_rows (`np.ndarray` of shape `(P, D)`), corpus_rows (`(C, D)`): L2-normalised.
        rules ([`MiningRules`]): see there.
        accelerator (`Accelerator`): the ranks, each of which has all of the above.

    Returns:
        list of lists of places in the corpus, hardest first, at most `top_k` each; the same on every rank.
    """
    place_of = {side: place for place, side in enumerate(corpus.sides)}
    of_source = defaultdict(set)
    for place, sources in enumerate(corpus.sources):
        for source in sources:
            of_source[source].add(place)
    same_query = defaultdict(set)
    for pair in pairs:
        same_query[pair.query] |= {place_of.get(pair.query), place_of.get(pair.target)}
    positives = (query_rows * target_rows).sum(1)
    limits = np.minimum(
        positives - rules.margin, np.where(positives > 0, positives * rules.relative_margin, positives)
    )

    index, mined = _ShardedIndex(corpus_rows, accelerator), [[] for _ in pairs]
    waiting, depth = np.arange(len(pairs)), max(FIRST_DEPTH, 4 * rules.top_k)
    while len(waiting):
        places, scores = index.search(query_rows[waiting], depth)
        for row, found, found_scores in zip(waiting, places, scores):
            forbidden = same_query[pairs[row].query] | of_source.get(pairs[row].source_id, set())
            fits = found_scores <= limits[row]
            if rules.identical_tolerance is not None:
                fits &= corpus_rows[found] @ target_rows[row] < 1 - rules.identical_tolerance
            mined[row] = [int(place) for place, fit in zip(found, fits) if fit and place not in forbidden]
            mined[row] = mined[row][: rules.top_k]
        waiting = np.array([row for row in waiting if len(mined[row]) < rules.top_k], dtype=np.int64)
        if depth >= len(corpus.sides):
            break
        depth *= 4
    return mined


def mine_streams(streams, corpus, embed, prober, rules, accelerator, together=False, cache_folder=None):
    """Mine for every task of a run, and give the streams what was found.

    Args:
        streams (`dict[str, PairStream]`): their `mined` is set.
        corpus ([`Corpus`]): its store holds the pairs' media too.
        embed (`Callable`), together (`bool`): see [`embed_all`].
        prober (`str`): what tells the prober's weights apart.
        rules ([`MiningRules`]), accelerator (`Accelerator`): see [`mine`].
        cache_folder (`str`, *optional*): of embeddings. Default: beside the corpus's frames.
    """
    cache = EmbeddingCache(cache_folder or corpus.store.folder.parent / "embeddings", prober)
    corpus_rows = embed_all([(side, None) for side in corpus.sides], embed, cache, accelerator, together)
    for stream in streams.values():
        queries = [(pair.query, pair.instruction) for pair in stream.pairs]
        targets = [(pair.target, None) for pair in stream.pairs]
        rows = embed_all(queries + targets, embed, cache, accelerator, together)
        found = mine(stream.pairs, corpus, *np.split(rows, 2), corpus_rows, rules, accelerator)
        stream.mined = {row: [corpus.sides[place] for place in places] for row, places in enumerate(found) if places}
