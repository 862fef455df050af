"""Publishing a finished folder on the hub."""

import shlex
from pathlib import Path

from upcycle.core.errors import UpcycleError


def check_repo(repo: str | None, *, private: bool) -> None:
    """Raise before the work what would keep its result from being pushed.

    Raises:
        UpcycleError: the name is none that the hub takes, or there is none to be private.
    """
    if repo is None:
        if private:
            raise UpcycleError("`private` goes with `push_to_hub=REPO`")
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UpcycleError(
            f"`push_to_hub={repo!r}` is no name such as me/model: {error}"
        ) from error


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder that is whole, with the login that `hf auth login` left or HF_TOKEN.

    Args:
        private: whether a repository that this makes is; one that is there stays as it is.

    Returns:
        The repository's address.

    Raises:
        UpcycleError: it failed; the folder is as it was, and the sentence says how to push again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Made by upcycle")
    except (Exception, KeyboardInterrupt) as error:  # whatever a network may do
        again = shlex.join(["hf", "upload", repo, str(folder)] + ["--private"] * private)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UpcycleError(
            f"{folder} is whole, but pushing it to {repo} failed ({reason}): push it again by "
            f"`{again}`"
        ) from error
    return str(url)
