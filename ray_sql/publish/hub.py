"""One repository of the Hub, through huggingface_hub's client. A push is one commit.

The client (2.4) retries an upload of large files, but not the calls around it. Here every call is
tried again, a bounded number of times, after an answer or an accident that may pass. A push that
was cut off is done again. The client compares the repository's files with its own, and a commit
names its parent, so that nothing is committed twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import SecretStr

from ray_sql.config import mask_secrets
from ray_sql.config.sections import RepositorySection
from ray_sql.errors import ConfigError, RaySqlError, StoreError
from ray_sql.store.retry import retry

log = logging.getLogger(__name__)
T = TypeVar("T")
License = dict[str, str]
"""A card's `license`. One without a word of the Hub's (`other`) may have a name and a link."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries, longer if the Hub asks for it, up to LONGEST_WAIT."""
LONGEST_WAIT = 120.0
TIMEOUT = 120.0
"""Seconds of silence after which a connection counts as cut. The client waits for ever."""
PASSING = {408, 412, 429, 500, 502, 503, 504}
"""Answers after which another try may succeed. 412 means that another commit came first."""
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass(frozen=True)
class Pushed:
    """A push: the repository's address and the commit, which is `new` or existed before."""

    url: str
    commit: str
    new: bool


@dataclass(frozen=True)
class Hub:
    """A repository that this token may write."""

    api: Any
    repo_id: str
    private: bool
    kind: Literal["model", "dataset"] = "model"

    @property
    def _repo(self) -> dict[str, str]:
        return {"repo_id": self.repo_id, "repo_type": self.kind}

    def base_model(self) -> str | None:
        """Return the base model that the repository names.

        None means that there is no such repository, or that it holds no weights. Raises
        `ConfigError` for weights without a base model: they were not published from here.
        """
        info = self._info()
        if info is None or not any(
            file.rfilename.endswith(WEIGHTS) for file in info.siblings or ()
        ):
            return None
        named = info.card_data.base_model if info.card_data else None
        base = named[0] if isinstance(named, list) else named
        if base is None:
            raise ConfigError(
                f"--hub.repo_id {self.repo_id}: holds a model that names no base model; choose "
                "another --hub.repo_id"
            )
        return str(base)

    def public(self) -> bool | None:
        """Tell whether everybody can read the repository; None if there is none."""
        info = self._info()
        return None if info is None else not info.private

    def _info(self) -> Any:
        """Return the Hub's `ModelInfo`; None if there is no repository."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with _named(f"{self.repo_id} on {self.api.endpoint}"):
            try:
                return _attempt("reading it", lambda: self.api.repo_info(**self._repo))
            except RepositoryNotFoundError:
                return None

    def push(
        self,
        files: Mapping[str, Path | bytes],
        message: str,
        branch: str = "main",
        tag: str | None = None,
    ) -> Pushed:
        """Commit files, a mapping of paths in the repository to content, as one commit.

        A `tag` moves to that commit. Raises `StoreError` if the Hub does not take them, and
        `ConfigError` if this token may not write them.
        """
        with _named(f"{self.repo_id} on {self.api.endpoint}"):
            self._create(branch)
            before = _attempt("reading it", lambda: self._at(branch)).sha
            commit = _attempt("the commit", lambda: self._commit(files, message, branch))
            if tag is not None:
                self._tag(tag, commit)
        place = "datasets/" if self.kind == "dataset" else ""
        return Pushed(f"{self.api.endpoint}/{place}{self.repo_id}", commit, commit != before)

    def _at(self, branch: str) -> Any:
        return self.api.repo_info(**self._repo, revision=branch)

    def _create(self, branch: str) -> None:
        _attempt(
            "creating it",
            lambda: self.api.create_repo(**self._repo, private=self.private, exist_ok=True),
        )
        if branch != "main":
            _attempt(
                "the branch",
                lambda: self.api.create_branch(**self._repo, branch=branch, exist_ok=True),
            )

    def _commit(self, files: Mapping[str, Path | bytes], message: str, branch: str) -> str:
        from huggingface_hub import CommitOperationAdd

        # asked at every try: an abandoned try may still be carried out, and of two commits with the
        # same parent only one succeeds
        parent = self._at(branch).sha
        # made anew at every try: they remember the repository's content, which a commit may have
        # changed whose answer was lost
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        commit = self.api.create_commit(
            **self._repo,
            operations=operations,
            commit_message=message,
            revision=branch,
            parent_commit=parent,
        )
        return str(commit.oid)

    def _tag(self, name: str, commit: str) -> None:
        from huggingface_hub.errors import RevisionNotFoundError

        tags = _attempt("reading tags", lambda: self.api.list_repo_refs(**self._repo)).tags
        at = next((tag.target_commit for tag in tags if tag.name == name), None)
        if at == commit:
            return
        if at is not None:
            # an earlier try may have removed it, and its answer was lost
            with suppress(RevisionNotFoundError):
                _attempt("moving the tag", lambda: self.api.delete_tag(**self._repo, tag=name))
        _attempt(
            "the tag",
            lambda: self.api.create_tag(**self._repo, tag=name, revision=commit, exist_ok=True),
        )

    def license_of(self, model: str) -> License:
        """Return a model's licence fields on the Hub; none where the Hub does not show them."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            card = _attempt(f"reading {model}", lambda: self.api.model_info(model)).card_data
        except (HfHubHTTPError, HFValidationError, StoreError):
            return {}
        fields = ("license", "license_name", "license_link")
        return {name: str(value) for name in fields if card and (value := getattr(card, name))}


def login(
    settings: RepositorySection,
    output_name: str,
    write_token: SecretStr | None,
    kind: Literal["model", "dataset"] = "model",
) -> Hub:
    """Return the repository of the settings, by default named `output_name`. Sends nothing.

    Raises `ConfigError` without a token, for one that may only read, and for one that belongs to
    neither the repository's owner nor a member.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    # one line says what was pushed, and a bar would break the display of a training run
    disable_progress_bars()
    token = token_of(write_token)
    if not token:
        raise ConfigError(
            "publishing needs a Hub token that may write: make one and set HF_TOKEN (or run "
            "`hf auth login`)"
        )
    api = HfApi(token=token, library_name="ray_sql")
    with _named(f"the Hub at {api.endpoint}"):
        account = _attempt("whoami", api.whoami)
    repo_id = settings.repo_id or output_name
    try:
        if "/" not in repo_id:
            repo_id = f"{account['name']}/{repo_id}"
        _require_access(account, repo_id)
    except (AttributeError, KeyError, TypeError):
        raise StoreError(
            f"the Hub at {api.endpoint}: its answer to whoami is none of a Hub; correct HF_ENDPOINT"
        ) from None
    return Hub(api, repo_id, settings.private, kind)


def token_of(write_token: SecretStr | None) -> str | None:
    """Return the token to publish with: the one given, or the client's own; None without any."""
    from huggingface_hub import get_token

    return write_token.get_secret_value() if write_token else get_token()


def _require_access(account: Mapping[str, Any], repo_id: str) -> None:
    """Raise `ConfigError` if the token of whoami's answer cannot write the repository."""
    token = account.get("auth", {}).get("accessToken", {})
    owner, role = repo_id.split("/")[0], token.get("role")
    if role == "read":
        raise ConfigError(
            f"the Hub token of {account['name']} may only read; make one that may write, and set "
            "HF_TOKEN"
        )
    members = {str(org["name"]): org.get("roleInOrg") for org in account.get("orgs", ())}
    if owner != account["name"] and members.get(owner, "read") == "read":
        raise ConfigError(
            f"--hub.repo_id {repo_id}: {account['name']} may not write there; use "
            f"{account['name']}/{repo_id.split('/')[1]}, or the token of a member of {owner} "
            "who may"
        )
    scopes = token.get("fineGrained", {}).get("scoped")
    if (
        role == "fineGrained"
        and scopes is not None
        and not any(_covers(scope, repo_id) for scope in scopes)
    ):
        raise ConfigError(
            f"the Hub token of {account['name']} has no right to write {repo_id}; give it "
            f"`write access to contents` of {owner}'s repositories, or set HF_TOKEN to one that "
            "has it"
        )


def _covers(scope: Mapping[str, Any], repo_id: str) -> bool:
    return (
        scope["entity"].get("name") in (repo_id, repo_id.split("/")[0])
        and "repo.write" in scope["permissions"]
    )


def _attempt(what: str, action: Callable[[], T]) -> T:
    """Return `action`'s result, trying again after errors that may pass.

    A final error is raised as it is.
    """
    from huggingface_hub.utils import get_session

    def attempt() -> T:
        get_session().timeout = TIMEOUT
        return action()

    def wait(error: Exception, failures: int) -> float:
        if _is_final(error):
            raise error
        if failures > len(WAITS):
            raise StoreError(
                f"{what} failed {failures} times, at last with {reason(error)}"
            ) from None
        seconds = max(WAITS[failures - 1], min(_asked_to_wait(error), LONGEST_WAIT))
        log.warning("the Hub: %s failed (%s); again in %.0f s", what, reason(error), seconds)
        return seconds

    return retry(attempt, wait)


def _is_final(error: Exception) -> bool:
    """Tell whether another try must fail too: the Hub refused, or the client is offline."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    if status is not None:
        return status not in PASSING
    malformed = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    return malformed or isinstance(error, OfflineModeIsEnabled | RaySqlError | FileNotFoundError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _response(error: BaseException) -> Any:
    """Return the Hub's answer behind an error, which the client may have wrapped."""
    responses = (getattr(cause, "response", None) for cause in _chain(error))
    return next((response for response in responses if response is not None), None)


def _status(error: BaseException) -> int | None:
    response = _response(error)
    return None if response is None else int(response.status_code)


def _asked_to_wait(error: BaseException) -> float:
    response = _response(error)
    text = "" if response is None else str(response.headers.get("retry-after", ""))
    return float(text) if text.isdigit() else 0.0


def reason(error: BaseException) -> str:
    """Return an error in one line, from the cause that a user can recognise."""
    status, first = _status(error), list(_chain(error))[-1]
    if status is not None:
        return f"HTTP {status}"
    return f"{type(first).__name__}: {mask_secrets(' '.join(str(first).split()))[:200]}".rstrip(
        ": "
    )


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Raise the client's final errors as one line about `place`."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except StoreError as error:
        raise StoreError(f"{place}: {error}") from None
    except OfflineModeIsEnabled:
        raise StoreError(
            f"{place}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it"
        ) from None
    except (ValueError, OSError, RuntimeError) as error:
        status = _status(error)
        if status == 401:
            raise ConfigError(
                f"{place}: the token is not accepted; make a new one and set HF_TOKEN"
            ) from None
        if status in (402, 403, 404):
            raise ConfigError(
                f"{place}: the token may not write there (HTTP {status}); choose another "
                "--hub.repo_id, or set HF_TOKEN to a token that may"
            ) from None
        # not the error's own words where a header may be in them
        raise StoreError(f"{place}: refused: {reason(error)}") from None
