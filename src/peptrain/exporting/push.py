"""Upload an export to a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from peptrain.errors import ConfigError, PeptrainError
from peptrain.text import one_line

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
LONGEST = 200  # characters of an error of the hub that are shown


def check_push(repo: str) -> None:
    """Raise ConfigError for a push that can't succeed: a bad name, no token, or no network wanted.

    It asks nothing of the network.
    """
    from huggingface_hub import constants, get_token

    if NAME.fullmatch(repo) is None:
        raise ConfigError(f"--push {one_line(repo)}: must be ORG/NAME, a repository of the hub")
    if constants.is_offline_mode():
        raise ConfigError(f"--push {repo}: HF_HUB_OFFLINE forbids it; unset it")
    if get_token() is None:
        raise ConfigError(
            f"--push {repo}: there is no token of the hub; log in with `hf auth login`, or set"
            " HF_TOKEN to one that may write"
        )


def push(folder: Path, repo: str, message: str, tag: str | None = None) -> str:
    """Upload the files of `folder` as one commit; return its address.

    The repository is created if there is none, and then it is private. Files that are only there
    stay. tag: a name for the commit, by which `from_pretrained(..., revision=tag)` finds it. Raises
    PeptrainError if the hub refuses it or can't be reached.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(repo, private=True, exist_ok=True)
        made = hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        if tag is not None:
            hub.create_tag(repo, tag=tag, revision=made.oid, exist_ok=True)
    except Exception as error:  # of the hub, of the network, of four libraries
        said = " ".join(str(error).split())[:LONGEST]
        raise PeptrainError(
            f"--push {repo}: {type(error).__name__}: {said}; check the token's rights and the"
            " network, then push again"
        ) from error
    return str(made.commit_url)
