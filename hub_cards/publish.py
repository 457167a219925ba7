"""Pushes the repos under `build/hub/<namespace>` to the Hub, each by its type.

```bash
hf auth login
cp -r build/hub/org build/hub/me && python -m hub_cards.assemble --namespace me   # with cards that name yours
python -m hub_cards.publish --namespace me                        # all of build/hub/me
python -m hub_cards.publish --namespace me --repo gve-mini --private
```

The namespace is the user's own or an organization's. A repo becomes what its folder is: files that the folder no
longer has are deleted (they stay in the repo's history). `HF_TOKEN` takes the place of `hf auth login`.
"""

import argparse

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from hub_cards.repos import IGNORED, metadata, repo_folder, repo_names, repo_type, run_command


def check_access(api, namespace):
    """Check before anything is pushed that the token may write to the namespace.

    Raises:
        ValueError: no token, one that the Hub refuses, or somebody else's namespace.
    """
    try:
        account = api.whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError("no token; run hf auth login or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise ValueError(f"{api.endpoint} refuses the token; run hf auth login or set HF_TOKEN") from error
    names = [account["name"], *(organization["name"] for organization in account["orgs"])]
    if namespace not in names:
        raise ValueError(f"{account['name']} may not push to {namespace}; choose one of {', '.join(names)}")


def publish(folders, namespace, private=False, api=None):
    """Push repos, one after another.

    Args:
        folders (`list[Path]`): each named as its repo.
        namespace (`str`): user or organization.
        private (`bool`): of repos that are created; one that exists keeps its visibility.
        api (`HfApi`, *optional*): endpoint and token.

    Yields:
        `str`: address of each repo once it is pushed.

    Raises:
        ValueError: a folder is no repo or lacks its card (before anything is pushed), or the Hub refuses.
    """
    api = api or HfApi()
    kinds = {folder: repo_type(folder) for folder in folders}
    for folder in folders:
        if not (folder / "README.md").is_file():
            raise ValueError(f"{folder} has no README.md; run python -m hub_cards.render first")
    check_access(api, namespace)
    for folder, kind in kinds.items():
        repo_id = f"{namespace}/{folder.name}"
        space = {"space_sdk": metadata(folder)["sdk"]} if kind == "space" else {}
        try:
            url = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, **space)
            api.upload_folder(
                folder_path=folder,
                repo_id=repo_id,
                repo_type=kind,
                commit_message=f"Publish {folder.name}",
                ignore_patterns=list(IGNORED),
                delete_patterns="*",
            )
        except HfHubHTTPError as error:
            raise ValueError(f"{repo_id} was not pushed: {error}") from error
        yield str(url)


def main(words=None):
    parser = argparse.ArgumentParser(prog="hub_cards.publish", description="Pushes assembled repos to the Hub.")
    parser.add_argument("--root", default="build/hub", help="folder of the namespaces (default: %(default)s)")
    parser.add_argument("--namespace", required=True, help="user or organization, also the folder's name under root")
    parser.add_argument("--repo", nargs="+", help="names of repos (default: all that lie there)")
    parser.add_argument("--private", action="store_true", help="create them as private repos")
    arguments = parser.parse_args(words)
    names = arguments.repo or repo_names(arguments.root, arguments.namespace)
    if not names:
        folder = f"{arguments.root}/{arguments.namespace}"
        raise ValueError(
            f"no repos in {folder}; after make demo: cp -r {arguments.root}/org {folder} && "
            f"python -m hub_cards.assemble --namespace {arguments.namespace}"
        )
    folders = [repo_folder(arguments.root, arguments.namespace, name) for name in names]
    for url in publish(folders, arguments.namespace, arguments.private):
        print(url, flush=True)


if __name__ == "__main__":
    run_command("hub_cards.publish", main)
