"""Answers that were paid for, by content: whoever asks the same again gets them from here."""

import hashlib
import json
import os
import uuid
from pathlib import Path


def write_whole(path, data):
    """Write a file under a temporary name and rename it: it is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_bytes(data if isinstance(data, bytes) else data.encode())
    os.replace(temporary, path)


class AnswerStore:
    """A folder of JSON files, one a request, named by the hash of all that the request's answer depends on.

    It belongs to no task, run or recipe: any number of processes read and write it at once.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    @staticmethod
    def key(**facts):
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _path(self, key):
        return self.folder / key[:2] / key[2:4] / f"{key[4:]}.json"

    def get(self, key):
        """The stored answer, a dict, or None."""
        try:
            return json.loads(self._path(key).read_text())
        except FileNotFoundError:
            return None

    def put(self, key, answer):
        write_whole(self._path(key), json.dumps(answer, sort_keys=True))
