"""Builds UVRB as Hub repos, in four flavours, from the authors' release, the upstream datasets or an index.

```bash
# from the authors' archives, unpacked under one folder
python -m dataset_builders.uvrb build --source /data/UVRB
python -m dataset_builders.uvrb build --source /data/UVRB --flavours uvrb-nano --nano_model build/hub/org/gve-mini
# from the upstream datasets: a YAML file of `key: {annotations: FILE, videos: FOLDER}`
python -m dataset_builders.uvrb build --upstream sources.yaml --datasets msrvtt msrvtt_i2v
# an index, which holds no media, with one's own files
python -m dataset_builders.uvrb join --index org/uvrb-index --videos msrvtt=/data/msrvtt didemo=/data/didemo
# what is wrong with a source, without building anything; exit code 1 if something is
python -m dataset_builders.uvrb validate --source /data/UVRB --report report.json
```

Killed at any moment, the same command goes on where it stopped.
"""

import argparse
import os
import sys
from pathlib import Path

import datasets

from dataset_builders.hub_layout import write_whole
from dataset_builders.uvrb.build import FLAVOURS, REPORT, build, check, report_json, summarise
from dataset_builders.uvrb.join import open_index
from dataset_builders.uvrb.sources import open_release
from dataset_builders.uvrb.tasks import get_tasks
from dataset_builders.uvrb.upstream import open_upstream


def main(words=None):
    """Command line.

    Returns:
        `int`: exit code; 2, with one line, for what the caller can put right.
    """
    arguments = _parse(words)
    datasets.disable_progress_bars()
    try:
        return _run(arguments)
    except (ValueError, OSError) as error:
        print(f"dataset_builders.uvrb: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parse(words):
    parser = argparse.ArgumentParser(prog="python -m dataset_builders.uvrb", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("build", "repos from a source"),
        ("join", "repos from an index and own files"),
        ("validate", "only the report"),
    ):
        command = commands.add_parser(name, help=text)
        if name == "join":
            command.add_argument("--index", required=True, help="folder or Hub name of the index flavour")
            command.add_argument("--videos", nargs="+", required=True, metavar="[KEY=]FOLDER", help="own files")
        else:
            source = command.add_mutually_exclusive_group(required=True)
            source.add_argument("--source", help="folder of the authors' release")
            source.add_argument("--upstream", help="YAML file: annotations and videos by dataset key")
        command.add_argument("--datasets", nargs="+", metavar="KEY", help="default: all that the source has")
        command.add_argument("--cache", default="build/cache/uvrb", help="prepared files (default: %(default)s)")
        command.add_argument("--processes", type=int, default=os.cpu_count(), help="default: %(default)s")
        if name == "validate":
            command.add_argument("--report", help="where the report goes, as JSON")
            continue
        command.add_argument("--flavours", nargs="+", choices=FLAVOURS, default=list(FLAVOURS[:1]))
        command.add_argument("--root", default="build/hub/org", help="folder of the namespace (default: %(default)s)")
        command.add_argument("--nano_model", help="GVE repo that chooses the nano flavour's distractors")
        command.add_argument("--seed", type=int, default=0, help="of the nano flavour's queries")
    return parser.parse_args(words)


def _run(arguments):
    if arguments.processes < 1:
        raise ValueError(f"--processes {arguments.processes}: give a whole number from 1")
    keys = arguments.datasets and [task.key for task in get_tasks(arguments.datasets)]
    if arguments.command == "join":
        pairs = [word.rpartition("=") for word in arguments.videos]
        tasks, source = open_index(arguments.index, {key: folder for key, _, folder in pairs}, keys), "index"
    elif arguments.upstream:
        tasks, source = open_upstream(arguments.upstream, keys), "upstream"
    else:
        tasks, source = open_release(arguments.source, keys), "release"
    if arguments.command == "validate":
        _, _, report = check(tasks, Path(arguments.cache), clips=False, processes=arguments.processes)
        if arguments.report:
            write_whole(arguments.report, report_json(report))
    else:
        folders, report = build(
            tasks,
            arguments.flavours,
            arguments.root,
            arguments.cache,
            arguments.processes,
            arguments.nano_model,
            arguments.seed,
            source,
        )
        for folder in folders:
            print(f"wrote {folder}; what was touched or left out: {folder / REPORT}")
    print("\n".join(summarise(report)))
    faulty = report["problems"] or not all(row["agrees"] for row in report["datasets"].values())
    return int(arguments.command == "validate" and bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
