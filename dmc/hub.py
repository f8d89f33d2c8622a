"""Models by their name on the Hugging Face Hub, ``org/name`` or ``org/name@revision``, wherever a directory is taken.

A local directory comes first. Only the configuration, the tokenizer and safetensors weights are fetched, into the cache of
huggingface_hub (HF_HOME); what is there already is used without a network.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w][\w./-]*))?")
_SETTINGS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_WEIGHTS = ("*.safetensors",)


def located(name: str | Path, *, weights: bool = True) -> Path:
    """The directory of a model: the local one of that path or, if there is none, the Hub's of that name, fetched.

    Args:
        name: a path, or ``org/name`` or ``org/name@revision``. What is in a local directory (``runs/mine`` where ``runs`` is
            one) is a path, whether it is there or not.
        weights: False leaves the weights out.

    Returns:
        The directory; a path that is not there is returned as it is, for its reader to reject.

    Raises:
        ValueError: if the Hub has no such model or revision, does not let it be read, or cannot be reached; one sentence
            with the remedy.
    """
    path, found = Path(name), _NAME.fullmatch(str(name))
    if path.exists() or not found or path.parent.exists():
        return path
    from huggingface_hub import snapshot_download

    repository, revision = found.groups()
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                ignore_patterns=["*/*"],
                allow_patterns=[*_SETTINGS, *(_WEIGHTS if weights else ())],
            )
        )
    except Exception as error:
        said = _refusal(error, repository, revision)
        if said is None:
            raise
        raise ValueError(f"there is no local directory {name}, and {said}") from None


def shown(name: str | Path) -> str:
    """How a model is called in outputs: its directory's name, or that on the Hub."""
    path = Path(name)
    return path.resolve().name if path.exists() or not _NAME.fullmatch(str(name)) or path.parent.exists() else str(name)


def check_name(repository: str) -> None:
    """Rejects what is not the name of a repository.

    Raises:
        ValueError: if it is not ``org/name``.
    """
    found = _NAME.fullmatch(repository)
    if not found or found[2]:
        raise ValueError(f"{repository!r} is not a name on the Hub: names have the form org/name")


def push(directory: str | Path, repository: str, *, private: bool) -> str:
    """Upload a directory's files to a model repository of the Hub, which is made if it is not there.

    Args:
        directory: that `checkpoints.export_hf.export` wrote.
        repository: ``org/name``.
        private: of a repository that is made.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the Hub rejects or cannot be reached; one sentence, with the command that tries again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(directory), commit_message="Export of dmc").commit_url)
    except Exception as error:
        said = _refusal(error, repository, None)
        if said is None:
            raise
        again = f"try again with hf upload {repository} {directory}"
        raise ValueError(f"{directory} is written but not uploaded: {said}; {again}") from None


def _refusal(error: Exception, repository: str, revision: str | None) -> str | None:
    """What an error of huggingface_hub means to a user; None for an error of the program."""
    from huggingface_hub import constants, errors

    log_in = "log in with hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} is gated: accept its terms at {constants.ENDPOINT}/{repository} and {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision} on the Hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub ({constants.ENDPOINT}) has no model {repository} that you may read; for a private one {log_in}"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the Hub does not allow it for {repository}: {log_in}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"the Hub ({constants.ENDPOINT}) cannot be reached"
        return f"{repository} is not in the cache of huggingface_hub while {why}"
    of_network = type(error).__module__.startswith("httpx")  # whichever of its two packages huggingface_hub uses
    if of_network or isinstance(error, OSError | errors.HfHubHTTPError | errors.HFValidationError):
        return f"the Hub failed on {repository} ({type(error).__name__}: {' '.join(str(error).split())})"
    return None
