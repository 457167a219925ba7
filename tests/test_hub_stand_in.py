"""The stand-in Hub answers the real client as the Hub does, errors included."""

import subprocess
import sys
import urllib.request
from pathlib import Path

import hub_stand_in


pytest_plugins = ["hub_fixtures"]

CLIENT = """
import os, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

kind, options = sys.argv[1], {"space_sdk": "gradio"} if sys.argv[1] == "space" else {}
api, repo, here = HfApi(), {"repo_id": "org/thing", "repo_type": sys.argv[1]}, Path("folder")
content = os.urandom(100_000)
(here / "a sub").mkdir(parents=True)
(here / "a sub" / "big.bin").write_bytes(content)
(here / "empty.txt").touch()
(here / "README.md").write_text("---\\nlicense: mit\\nsdk: gradio\\n---\\n# a thing")

api.create_repo(**repo, **options)
api.create_repo(**repo, **options, exist_ok=True)
api.upload_folder(**repo, folder_path=here)
local = Path(snapshot_download(**repo))
assert (local / "a sub" / "big.bin").read_bytes() == content and (local / "empty.txt").read_bytes() == b""
info = api.repo_info(**repo, files_metadata=True)
sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in info.siblings}
assert sizes["a sub/big.bin"] == (100_000, True) and sizes["empty.txt"] == (0, False) and ".gitattributes" in sizes
tree = [entry.path for entry in api.list_repo_tree(**repo, expand=True)]
assert tree == [".gitattributes", "README.md", "a sub", "empty.txt"], tree
assert [commit.title for commit in api.list_repo_commits(**repo)][-1] == "initial commit"

api.create_tag(**repo, tag="v1")
api.create_branch(**repo, branch="next/one")
api.delete_folder("a sub", **repo, revision="next/one")
api.delete_file("empty.txt", **repo, revision="next/one")
assert set(api.list_repo_files(**repo, revision="next/one")) == {".gitattributes", "README.md"}
assert "empty.txt" in api.list_repo_files(**repo, revision="v1")
assert {ref.name for ref in api.list_repo_refs(**repo).branches} == {"main", "next/one"}
api.delete_branch(**repo, branch="next/one")
known = api.get_paths_info(**repo, paths=["README.md", "a sub", "gone"])
assert [entry.path for entry in known] == ["README.md", "a sub"]

def refused(error, word, action):
    try:
        action()
    except error as raised:
        assert word in str(raised), raised
    else:
        raise AssertionError(f"no {error.__name__}")

refused(EntryNotFoundError, "has no gone.txt", lambda: hf_hub_download(**repo, filename="gone.txt"))
refused(RevisionNotFoundError, "no revision old", lambda: api.list_repo_files(**repo, revision="old"))
refused(RepositoryNotFoundError, "org/nothing", lambda: api.list_repo_files("org/nothing", repo_type=kind))
refused(HfHubHTTPError, "rights", lambda: api.create_repo("other/thing", repo_type=kind, **options))
refused(HfHubHTTPError, "already", lambda: api.create_repo(**repo, **options))
refused(HfHubHTTPError, "nvalid", lambda: HfApi(token="hf_wrong").whoami())
refused(HfHubHTTPError, "nvalid", lambda: HfApi(token=False).create_repo("org/other", repo_type=kind, **options))
bad = {"path_or_fileobj": b"---\\nlicense: [\\n---\\n", "path_in_repo": "README.md"}
refused(ValueError, "Invalid metadata", lambda: api.upload_file(**repo, **bad))
parent = {"path_or_fileobj": b"x", "path_in_repo": "x", "parent_commit": "0" * 40}
refused(HfHubHTTPError, "commit has happened", lambda: api.upload_file(**repo, **parent))

api.delete_repo(**repo)
assert not api.repo_exists(**repo)
api.create_repo("org/secret", repo_type=kind, private=True, **options)
refused(RepositoryNotFoundError, "", lambda: HfApi(token=False).repo_info("org/secret", repo_type=kind))
"""


def test_the_real_client_is_served(hub, run_client, tmp_path):
    for kind in ("model", "dataset", "space"):
        (tmp_path / kind).mkdir()
        run_client(["-c", CLIENT, kind], cwd=tmp_path / kind)
    assert not [entry for entry in hub.log if entry[2] >= 500]


def test_ranges(hub, run_client):
    write = """
api.create_repo('org/ranged')
api.upload_file(path_or_fileobj=b'0123456789', path_in_repo='x', repo_id='org/ranged')
"""
    run_client(["-c", f"from huggingface_hub import HfApi; api = HfApi(){write}"])
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{hub.url}/org/ranged/resolve/main/x", headers={"Range": "bytes=2-4"})
    with opener.open(request) as answer:
        assert (answer.status, answer.headers["Content-Range"], answer.read()) == (206, "bytes 2-4/10", b"234")


def test_storage_outlives_the_server(tmp_path):
    with hub_stand_in.HubStandIn(tmp_path) as hub:
        entry = hub.hub.storage.put(b"content")
        repo = {"kind": "models", "id": "org/kept", "branches": {}, "tags": {}, "commits": {}}
        sha = hub.hub.storage.commit(repo, "main", "first", "", {"file": entry})
    with hub_stand_in.HubStandIn(tmp_path) as hub:
        assert hub.hub.storage.read("models", "org/kept")["branches"] == {"main": sha}


def test_command_line_prints_what_a_client_needs(tmp_path):
    command = [sys.executable, Path(hub_stand_in.__file__), "--root", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        settings = dict(word.split("=", 1) for word in process.stdout.readline().split())
        assert settings["HF_ENDPOINT"].startswith("http://127.0.0.1:")
        assert settings["HF_TOKEN"] == hub_stand_in.TOKEN and settings["HF_HUB_DISABLE_XET"] == "1"
    finally:
        process.terminate()
        process.wait()
