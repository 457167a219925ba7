"""Documents between the stages: JSON Lines by part, read and written with datatrove.

A part is a fixed run of videos; datatrove's task number is the part's. So the data does not depend on how many tasks
run at once, and a stage resumes part by part.
"""

import os
import platform
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


UNFINISHED = ".unfinished"
NODE = platform.node().partition(".")[0]


def part_name(part):
    return f"{part:05d}"


class PartReader(JsonlReader):
    """The documents of one part in the videos' order; none where the stage before kept none.

    Args:
        folder (`str`): of `<part>.jsonl` files.
        every (`bool`): a single task reads all parts.
    """

    name = "part"

    def __init__(self, folder, every=False):
        os.makedirs(folder, exist_ok=True)
        super().__init__(str(folder), compression=None, add_file_path=False)
        self.folder, self.every = str(folder), every

    def run(self, data=None, rank=0, world_size=1):
        names = sorted(path.name for path in Path(self.folder).glob("*.jsonl"))
        wanted = names if self.every else [name for name in names if name == f"{part_name(rank)}.jsonl"]
        for name in wanted:
            documents = sorted(self.read_file(name), key=lambda document: document.metadata["index"])
            self.stat_update("documents", value=len(documents), unit="input_file")
            yield from documents


class WholeWriter(JsonlWriter):
    """A JSON Lines writer whose files appear when they are complete, never half-written.

    Args:
        folder (`str`): where to.
        output_filename (`str`): template; `${rank}` is the part, other tags are metadata.
    """

    def __init__(self, folder, output_filename="${rank}.jsonl"):
        super().__init__(str(folder), output_filename=output_filename, compression=None)

    def _get_output_file_with_retry(self, output_filename):
        return super()._get_output_file_with_retry(f"{output_filename}.{NODE}+{os.getpid()}{UNFINISHED}")

    def __exit__(self, exc_type, exc_val, exc_tb):
        names = list(self.output_mg.get_open_files())
        self.close()
        for name in names:
            path = self.output_folder.resolve_paths(name)
            if exc_type is None:
                os.replace(path, path.removesuffix(UNFINISHED).rpartition(".")[0])
            else:
                os.unlink(path)


def exclusions(work, stage):
    """Writer of what a stage drops: `dropped/<stage>/<reason>/<part>.jsonl`."""
    return WholeWriter(Path(work) / "dropped" / stage, "${filter_reason}/${part}.jsonl")


def new_document(index, part, source, name, text, group=None, file=None, number=None):
    """A video at the beginning of the flow. `text` is never empty, or datatrove would drop it without a word."""
    return Document(
        text=text if text.strip() else " ",
        id=f"{source}/{name}",
        metadata={
            "index": index,
            "part": part_name(part),
            "source": source,
            "group": f"{source}/{group or name}",
            "file": file,
            "number": number,
        },
    )


def count_dropped(work):
    """`{(stage, reason): videos or answers}` from the exclusion files."""
    counts = {}
    for path in sorted((Path(work) / "dropped").glob("*/*/*.jsonl")):
        with open(path, "rb") as lines:
            key = path.parts[-3], path.parts[-2]
            counts[key] = counts.get(key, 0) + sum(1 for _ in lines)
    return counts
