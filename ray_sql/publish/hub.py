"""One repository of the Hub, through huggingface_hub's client: who may write it, what is in it, one commit per push.

The client retries an upload of large files by itself, but not the calls around it (2.4); here every call is tried again, a bounded number
of times, after an answer or an accident that may pass. A push that was cut off is simply done again: the client compares what is there
with what it has, and a commit names the one before it, so that nothing is committed twice.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ray_sql.config import Config
from ray_sql.errors import ConfigError, RaySqlError, StoreError
from ray_sql.store.retry import retry

log = logging.getLogger(__name__)
T = TypeVar("T")
License = dict[str, str]
"""A card's `license`, and for one that the Hub has no word for (`other`) `license_name` and `license_link`, where they are known."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries; longer where the Hub says so, up to LONGEST_WAIT."""
LONGEST_WAIT = 120.0
TIMEOUT = 120.0
"""Seconds of silence after which a connection counts as cut; the client's default is to wait for ever."""
PASSING = {408, 412, 429, 500, 502, 503, 504}
"""Answers after which another try may succeed; 412: another commit came first."""
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass(frozen=True)
class Pushed:
    """What a push came to: the repository's address, the commit, and whether it is a new one or was there already."""

    url: str
    commit: str
    new: bool


@dataclass(frozen=True)
class Hub:
    """A repository that this token may write."""

    api: Any
    repo_id: str
    private: bool

    def base_model(self) -> str | None:
        """The base model that the repository names; None if there is no such repository, or no weights in it.

        Raises `ConfigError` where there are weights and no base model: whatever it is, it was not published from here.
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
                f"--hub.repo_id {self.repo_id}: holds a model that names no base model; choose another --hub.repo_id"
            )
        return str(base)

    def public(self) -> bool | None:
        """Whether everybody can read the repository; None if there is none."""
        info = self._info()
        return None if info is None else not info.private

    def _info(self) -> Any:
        """What the Hub says of the repository; None if there is none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with _named(f"{self.repo_id} on {self.api.endpoint}"):
            try:
                return _attempt("reading it", lambda: self.api.model_info(self.repo_id))
            except RepositoryNotFoundError:
                return None

    def push(
        self,
        files: Mapping[str, Path | bytes],
        message: str,
        branch: str = "main",
        tag: str | None = None,
    ) -> Pushed:
        """Commit the files (path in the repository → what it holds) to a branch at once; a tag moves to that commit.

        Raises `StoreError` if the Hub does not take them, and `ConfigError` if it does not let this token.
        """
        with _named(f"{self.repo_id} on {self.api.endpoint}"):
            self._create(branch)
            before = _attempt(
                "reading it", lambda: self.api.model_info(self.repo_id, revision=branch)
            ).sha
            commit = _attempt("the commit", lambda: self._commit(files, message, branch))
            if tag is not None:
                self._tag(tag, commit)
        return Pushed(f"{self.api.endpoint}/{self.repo_id}", commit, commit != before)

    def _create(self, branch: str) -> None:
        _attempt(
            "creating it",
            lambda: self.api.create_repo(self.repo_id, private=self.private, exist_ok=True),
        )
        if branch != "main":
            _attempt(
                "the branch",
                lambda: self.api.create_branch(self.repo_id, branch=branch, exist_ok=True),
            )

    def _commit(self, files: Mapping[str, Path | bytes], message: str, branch: str) -> str:
        from huggingface_hub import CommitOperationAdd

        # Asked at every try: a try given up may be carried out while this one is under way, and only one of two with the same parent is.
        parent = self.api.model_info(self.repo_id, revision=branch).sha
        # made anew at every try: they remember what the repository held, which a commit whose answer was lost has changed
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        commit = self.api.create_commit(
            self.repo_id, operations, commit_message=message, revision=branch, parent_commit=parent
        )
        return str(commit.oid)

    def _tag(self, name: str, commit: str) -> None:
        from huggingface_hub.errors import RevisionNotFoundError

        tags = _attempt("reading tags", lambda: self.api.list_repo_refs(self.repo_id)).tags
        at = next((tag.target_commit for tag in tags if tag.name == name), None)
        if at == commit:
            return
        if at is not None:
            with suppress(
                RevisionNotFoundError
            ):  # a try before this one removed it, and its answer was lost
                _attempt("moving the tag", lambda: self.api.delete_tag(self.repo_id, tag=name))
        _attempt(
            "the tag",
            lambda: self.api.create_tag(self.repo_id, tag=name, revision=commit, exist_ok=True),
        )

    def license_of(self, model: str) -> License:
        """The licence fields that the Hub has for a model; none where it has none, or does not show that model."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            card = _attempt(f"reading {model}", lambda: self.api.model_info(model)).card_data
        except (HfHubHTTPError, HFValidationError, StoreError):
            return {}
        fields = ("license", "license_name", "license_link")
        return {name: str(value) for name in fields if card and (value := getattr(card, name))}


def login(config: Config, suffix: str = "") -> Hub:
    """The repository that `config.hub` names (and `suffix`), after making sure that the token may write it; sends nothing.

    Raises `ConfigError` without a token, for one that may only read, or that belongs to neither the repository's owner nor a member.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # one line says what was pushed, and a bar would break the display of a training run
    token = config.write_token.get_secret_value() if config.write_token else get_token()
    if not token:
        raise ConfigError(
            "publishing needs a Hub token that may write: make one and set HF_TOKEN (or run `hf auth login`)"
        )
    api = HfApi(token=token, library_name="ray_sql")
    with _named(f"the Hub at {api.endpoint}"):
        account = _attempt("whoami", api.whoami)
    user = str(account["name"])
    repo_id = config.hub.repo_id or config.output_name
    repo_id = (repo_id if "/" in repo_id else f"{user}/{repo_id}") + suffix
    _check_access(account, repo_id)
    return Hub(api, repo_id, config.hub.private)


def _check_access(account: Mapping[str, Any], repo_id: str) -> None:
    """Raise `ConfigError` if whoami's answer says that its token cannot write the repository."""
    token = account.get("auth", {}).get("accessToken", {})
    owner, role = repo_id.split("/")[0], token.get("role")
    if role == "read":
        raise ConfigError(
            f"the Hub token of {account['name']} may only read; make one that may write, and set HF_TOKEN"
        )
    members = {str(one["name"]): one.get("roleInOrg") for one in account.get("orgs", ())}
    if owner != account["name"] and members.get(owner, "read") == "read":
        raise ConfigError(
            f"--hub.repo_id {repo_id}: {account['name']} may not write there; use {account['name']}/{repo_id.split('/')[1]}, or the "
            f"token of a member of {owner} who may"
        )
    scopes = token.get("fineGrained", {}).get("scoped")
    if (
        role == "fineGrained"
        and scopes is not None
        and not any(_covers(scope, repo_id) for scope in scopes)
    ):
        raise ConfigError(
            f"the Hub token of {account['name']} has no right to write {repo_id}; give it `write access to contents` of {owner}'s "
            "repositories, or set HF_TOKEN to one that has it"
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
                f"{what} failed {failures} times, at last with {_reason(error)}"
            ) from None
        seconds = max(WAITS[failures - 1], min(_asked_to_wait(error), LONGEST_WAIT))
        log.warning("the Hub: %s failed (%s); again in %.0f s", what, _reason(error), seconds)
        return seconds

    return retry(attempt, wait)


def _is_final(error: Exception) -> bool:
    """Whether another try would fail in the same way: the Hub understood and refused, or the client was told not to ask."""
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
    """The Hub's answer behind an error; the client wraps what an upload raises."""
    return next(
        (found for one in _chain(error) if (found := getattr(one, "response", None)) is not None),
        None,
    )


def _status(error: BaseException) -> int | None:
    response = _response(error)
    return None if response is None else int(response.status_code)


def _asked_to_wait(error: BaseException) -> float:
    response = _response(error)
    text = "" if response is None else str(response.headers.get("retry-after", ""))
    return float(text) if text.isdigit() else 0.0


def _reason(error: BaseException) -> str:
    """One line of an error, from the cause that a user can recognise."""
    status, first = _status(error), list(_chain(error))[-1]
    if status is not None:
        return f"HTTP {status}"
    return f"{type(first).__name__}: {' '.join(str(first).split())[:200]}".rstrip(": ")


@contextmanager
def _named(place: str) -> Iterator[None]:
    """What the client raises for good, as one line about `place`."""
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
                f"{place}: the token may not write there (HTTP {status}); choose another --hub.repo_id, or set HF_TOKEN to a token "
                "that may"
            ) from None
        raise StoreError(f"{place}: refused: {' '.join(str(error).split())[:300]}") from None
