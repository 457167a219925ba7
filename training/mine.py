"""Hard negatives: what a prober ranks high for a query, but not so high that it is likely an answer.

A recipe that names a `negative_corpus` mines from it at its start, or at every epoch's with that epoch's prober. A
corpus is a repo with the columns `text`, `image`, `video` (any of them) and, if known, `source_id`; or a pairs repo,
whose targets are taken. Embeddings are kept by the content of what they embed and the weights of the prober, so that
a mining that was killed goes on, and one of a grown corpus embeds what is new. The corpus is shared over the ranks:
each indexes its part with FAISS, and the best of all parts are merged, so that the result is that of one rank.

Streamed tasks are mined window by window, and only the places of what was found are kept, four bytes each: the corpus
must fit on disk and its embeddings into memory, the pairs need not. A streamed query that occurs again in another
window is not recognised there: its other answers are kept out by their scores alone.
"""

import hashlib
import shutil
import uuid
from collections import defaultdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from training.pairs import COLUMNS, ROWS_AT_ONCE, SIDES, FrameStore, read_chunk, read_pairs, task_names
from training.streaming import StreamedPairs


EMBED_AT_ONCE = 256  # sides between two writes of the cache
FIRST_DEPTH = 64  # candidates looked at; more where filtering leaves too few
FOUND_AT_ONCE = 2**24  # candidates of all queries and ranks in one search, 12 bytes each


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


def check_top_k(streams, top_k):
    """Raise a `ValueError` if a task's steps take more mined negatives than are kept: they would go without."""
    for task, stream in streams.items():
        needed = stream.hard_negatives
        if needed > top_k:
            raise ValueError(f"mine_top_k must be at least {needed}, the hard_negatives of {task}, got {top_k}")


def check_reads(name, prober, streams, corpus):
    """Raise a `ValueError` if a prober cannot embed the corpus, or the pairs that negatives are wanted for."""
    if not all(map(prober.reads, corpus.sides)):
        raise ValueError(f"prober {name!r} cannot read all of the corpus: choose one that can")
    for task, stream in streams.items():
        pairs, _ = stream.probe_pairs(len(stream), 0) if stream.hard_negatives else ([], None)
        if not all(prober.reads(pair.query) and prober.reads(pair.target) for pair in pairs):
            raise ValueError(f"prober {name!r} cannot read {task}: choose another, or set its hard_negatives to 0")


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
    try:
        configs = [chosen] if chosen else task_names(repo)
    except ValueError as error:
        raise ValueError(f"no corpus at {repo!r}: give a dataset folder or Hub name as negative_corpus") from error
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
    accelerator.wait_for_everyone()  # all know the same before one writes more, or they would share out unlike lists
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
        # Few queries may have to look at the whole corpus: not all of them at once.
        at_once = max(1, FOUND_AT_ONCE // (min(depth, len(corpus.sides)) * accelerator.num_processes))
        for start in range(0, len(waiting), at_once):
            part = waiting[start : start + at_once]
            for row, found, found_scores in zip(part, *index.search(query_rows[part], depth)):
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


class MinedRows:
    """Mined negatives of a streamed task by row, as places in the corpus.

    Args:
        folder (`Path`): what [`mine_windows`] left; its name is what a checkpoint remembers.
        rows (`int`): of the task.
        sides (list of [`Side`]): of the corpus.

    Raises:
        ValueError: the folder is gone.
    """

    def __init__(self, folder, rows, sides):
        if not folder.is_dir():
            raise ValueError(f"mined negatives are missing at {folder}: set overwrite to start anew")
        self.name, self._sides, places = folder.name, sides, None
        for path in folder.glob("*.npz"):
            with np.load(path) as part:
                if places is None:
                    places = np.full((rows, part["places"].shape[1]), -1, dtype=np.int32)
                places[part["rows"]] = part["places"]
        self._places = np.full((rows, 0), -1, dtype=np.int32) if places is None else places

    def get(self, row, default):
        """Negatives of a row, hardest first; the default where none was found."""
        return [self._sides[place] for place in self._places[row] if place >= 0] or default


def mine_windows(stream, corpus, corpus_rows, embed, folder, rules, accelerator, together=False):
    """Mine for a streamed task, window by window; what a killed call has finished stays.

    Args:
        stream ([`StreamedPairs`]): the task.
        corpus ([`Corpus`]), corpus_rows (`np.ndarray` of shape `(C, D)`): what is mined from.
        embed (`Callable`): from sides and their `store` to `(M, D)`.
        folder (`Path`): receives a file a window: rows of its pairs, and places, -1 where there are fewer.
        rules ([`MiningRules`]), accelerator (`Accelerator`), together (`bool`): see [`mine`] and [`embed_all`].
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = {path.stem for path in folder.glob("*.npz")}
    accelerator.wait_for_everyone()  # all have looked before one writes
    for number, name in enumerate(stream.window_names()):
        if name in done:
            continue
        rows, pairs, store = stream.window(number)
        queries = [(pair.query, pair.instruction) for pair in pairs]
        targets = [(pair.target, None) for pair in pairs]
        cache = EmbeddingCache(folder / "embeddings", name)
        embedded = embed_all(queries + targets, partial(embed, store=store), cache, accelerator, together)
        found = mine(pairs, corpus, *np.split(embedded, 2), corpus_rows, rules, accelerator)
        accelerator.wait_for_everyone()  # all have read the cache
        if accelerator.is_main_process:
            places = np.array([each + [-1] * (rules.top_k - len(each)) for each in found], dtype=np.int32)
            temporary = folder / f".{name}.tmp"
            with open(temporary, "wb") as file:
                np.savez(file, rows=np.array(rows, dtype=np.int64), places=places.reshape(-1, rules.top_k))
            temporary.rename(folder / f"{name}.npz")
            shutil.rmtree(folder / "embeddings" / name)
    accelerator.wait_for_everyone()


def mine_streams(streams, corpus, embed, prober, rules, accelerator, together=False):
    """Mine for every task of a run that takes negatives, and give the streams what was found.

    Args:
        streams (`dict[str, PairStream]` or `dict[str, StreamedPairs]`): their `mined` is set.
        corpus ([`Corpus`]): its store holds the media of pairs that are not streamed, too.
        embed (`Callable`): from a list of `([`Side`], str or None)` and the `store` of their media to `(M, D)`.
        prober (`str`): what tells the prober's weights apart.
        rules ([`MiningRules`]), accelerator (`Accelerator`), together (`bool`): see [`mine`] and [`embed_all`].
    """
    cache_folder = corpus.store.folder.parent
    cache = EmbeddingCache(cache_folder / "embeddings", prober)
    here = partial(embed, store=corpus.store)
    corpus_rows = embed_all([(side, None) for side in corpus.sides], here, cache, accelerator, together)
    for task, stream in streams.items():
        if not stream.hard_negatives:
            continue
        if isinstance(stream, StreamedPairs):
            content = repr([prober, rules, corpus.digest(), stream.digest()])
            name = f"{task}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
            mine_windows(
                stream, corpus, corpus_rows, embed, cache_folder / "mined" / name, rules, accelerator, together
            )
            give_mined(stream, corpus, name)
            continue
        queries = [(pair.query, pair.instruction) for pair in stream.pairs]
        targets = [(pair.target, None) for pair in stream.pairs]
        rows = embed_all(queries + targets, here, cache, accelerator, together)
        found = mine(stream.pairs, corpus, *np.split(rows, 2), corpus_rows, rules, accelerator)
        stream.mined = {row: [corpus.sides[place] for place in places] for row, places in enumerate(found) if places}


def give_mined(stream, corpus, name):
    """Give a streamed task the negatives that were mined for it under a name.

    Raises:
        ValueError: they are gone.
    """
    stream.mined = MinedRows(corpus.store.folder.parent / "mined" / name, len(stream), corpus.sides)
    stream.mined_store = corpus.store
