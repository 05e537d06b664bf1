"""Uploading an exported policy to the Hugging Face hub, where that is asked for."""

from pathlib import Path

from drpo_lightning.errors import SettingError


def make_repository(name: str, *, private: bool) -> None:
    """Makes the repository of a model, unless there is one, which shows that it can be written to.

    The token is the one that `hf auth login` has kept, or that stands in `HF_TOKEN`; it is not read here.

    Args:
        name: `owner/name`.
        private: whether others can see it; one that is there stays as it is.

    Raises:
        SettingError: if the name is none, or the hub refuses or is not reached.
    """
    from huggingface_hub import HfApi

    if name.count("/") != 1:
        raise SettingError(f"`push_to_hub` must be `owner/name`, got {name!r}")
    try:
        HfApi().create_repo(name, private=private, exist_ok=True)
    except Exception as error:  # of the hub's client, or of the HTTP library under it, which has changed
        raise SettingError(
            f"`push_to_hub` {name!r} cannot be written to: {_line(error)}. Log in by `hf auth login` as somebody who "
            "may, or leave it out and upload the folder later: `hf upload OWNER/NAME FOLDER`"
        ) from error


def upload(folder: str | Path, name: str) -> str:
    """Uploads a folder as one commit.

    Args:
        folder: an exported policy.
        name: its repository, which exists.

    Returns:
        Address of the repository.

    Raises:
        RuntimeError: if it fails; the folder stays, and the message says how to try again.
    """
    from huggingface_hub import HfApi

    try:
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Trained by drpo-lightning")
    except Exception as error:  # as above
        raise RuntimeError(
            f"the policy is in {str(folder)!r}, but could not be uploaded to {name!r}: {_line(error)}. Try again by "
            f"`hf upload {name} {folder}`"
        ) from error
    return str(commit.repo_url)


def _line(error: Exception) -> str:
    """An error's text in one line."""
    return " ".join(str(error).split()).rstrip(".")
