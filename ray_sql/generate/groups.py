"""Questions whose prompts begin alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_sql.generate.questions import Question
from ray_sql.rows import common_prefix


@dataclass
class Group:
    """Questions whose prompts share their first `prefix` tokens.

    `members` are indices of questions. At least one token of each prompt is the question's own.
    """

    members: list[int]
    prefix: int


def group_prompts(prompts: Sequence[Sequence[int]], databases: Sequence[str]) -> list[Group]:
    """Return groups by database and common prefix, the largest first.

    A question joins if all members still share at least half of their prompts. A schema that was
    trimmed, or is shown in part, would cost the others their prefix.
    """
    groups: dict[str, list[Group]] = defaultdict(list)
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        prompt = prompts[index]
        for group in groups[databases[index]]:
            # the longest of the group: what it can give up, all can
            longest = prompts[group.members[0]]
            shared = common_prefix([list(longest[: group.prefix]), list(prompt[:-1])])
            if shared * 2 >= len(longest):
                group.members.append(index)
                group.prefix = shared
                break
        else:
            groups[databases[index]].append(Group([index], len(prompt) - 1))
    flat = [group for by_database in groups.values() for group in by_database]
    return sorted(flat, key=lambda group: -len(group.members))


def group_known(
    prompts: Sequence[Sequence[int]], databases: Sequence[str], known: Mapping[str, Sequence[int]]
) -> list[Group]:
    """Return a group for each database of which the begin of every prompt is known.

    A prompt that begins otherwise is a group of its own, without a prefix.
    """
    groups: dict[str, Group] = {}
    others = []
    for index, (prompt, database) in enumerate(zip(prompts, databases, strict=True)):
        if prefix := known_prefix(prompt, known.get(database, ())):
            groups.setdefault(database, Group([], prefix)).members.append(index)
        else:
            others.append(Group([index], 0))
    return [*groups.values(), *others]


def known_prefix(prompt: Sequence[int], begin: Sequence[int]) -> int:
    """Return the length of a begin if a prompt goes on behind it, else 0."""
    goes_on = len(prompt) > len(begin) and list(prompt[: len(begin)]) == list(begin)
    return len(begin) if goes_on else 0


def token_counts(questions: Sequence[Question]) -> dict[str, float]:
    """Return the mean tokens of a prompt, and those computed where prompts that begin alike share.

    With links of its own, a question has a schema of its own, and shares less.
    """
    prompts = [question.input_ids for question in questions]
    groups = group_prompts(prompts, [question.db_id for question in questions])
    tokens, count = sum(map(len, prompts)), max(1, len(prompts))
    saved = sum(group.prefix * (len(group.members) - 1) for group in groups)
    return {
        "prompt_tokens": round(tokens / count, 1),
        "computed_tokens": round((tokens - saved) / count, 1),
    }
