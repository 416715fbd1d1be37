"""Upload of a model's files to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, RepoUrl

from uniapl.errors import UniAPLError, UsageError
from uniapl.training.checkpoint.best import model_files
from uniapl.training.checkpoint.model_card import CARD, PLACE


def open_repository(name: str, *, private: bool) -> RepoUrl:
    """The repository of a model on the Hub; it is created if it does not exist.

    The token is that of `hf auth login` or of the environment variable HF_TOKEN.

    Args:
        name: `name`, in the namespace of the token's user, or `namespace/name`.
        private: Create it as private, and refuse a public one.

    Raises:
        UsageError: There is no token, it gives no access, or the Hub does not respond.
    """
    api = HfApi(token=True)
    try:
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        is_public = private and not api.model_info(repository.repo_id).private
    except Exception as error:  # the Hub client raises many types
        raise UsageError(
            f"--push-to-hub '{name}': {_reason(error)}. It needs a token with write access (`hf auth login`, "
            "or HF_TOKEN in the environment), a name such as USER/NAME, and a connection to the Hub"
        ) from error
    if is_public:
        raise UsageError(
            f"--hub-private-repo: '{repository.repo_id}' exists and is public: make it private in its "
            "settings on the Hub, or choose another name"
        )
    return repository


def upload(directory: Path, repository: RepoUrl) -> list[str]:
    """Upload the files of a model, and return their names. Its card names the repository.

    Only files that the manifest of the directory lists are uploaded, and of a checkpoint only its model.

    Raises:
        UniAPLError: The upload failed; the directory is as before.
    """
    names = [name for name in model_files(directory) if (directory / name).is_file()]
    contents: dict[str, str | bytes] = {name: str(directory / name) for name in names}
    if CARD in contents:
        card = (directory / CARD).read_bytes()
        contents[CARD] = card.replace(PLACE.encode(), f'"{repository.repo_id}"'.encode())
    try:
        HfApi(token=True).create_commit(
            repository.repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in contents.items()],
            commit_message="Upload a model trained by UniAPL",
        )
    except Exception as error:  # the Hub client raises many types
        raise UniAPLError(
            f"the upload to '{repository.repo_id}' failed: {_reason(error)}. The model is complete in "
            f"'{directory}'; `uniapl export {directory} --push-to-hub {repository.repo_id}` uploads it again"
        ) from error
    return names


def _reason(error: Exception) -> str:
    """The message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}"
