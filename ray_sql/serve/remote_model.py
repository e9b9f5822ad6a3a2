"""The tuned model behind an endpoint that speaks OpenAI's protocol: vLLM, for example."""

from __future__ import annotations

from collections.abc import Sequence

from ray_sql.config.sections import AnswersSection
from ray_sql.evaluate.endpoint import Endpoint
from ray_sql.generate.answers import OnAnswer
from ray_sql.generate.decoder import Needed, always
from ray_sql.serve.engine import More
from ray_sql.serve.prompter import Asked


class RemoteModel:
    """An endpoint that answers prompts: one greedy answer each."""

    def __init__(self, settings: AnswersSection) -> None:
        self._endpoint = Endpoint.find(settings)
        self.described: dict[str, str] = dict(self._endpoint.described.get("ray_sql", {}))

    def answer(
        self,
        asked: Sequence[Asked],
        settings: AnswersSection,
        on_answer: OnAnswer,
        more: More | None = None,
        needed: Needed = always,
    ) -> None:
        """Answer prompts, and those that wait with them, several asked at a time.

        An endpoint is asked whether or not the answers are still `needed`.
        """
        joined = more(lambda question: True) if more else []
        turns = [one.turns for one in (*asked, *joined)]
        for index, answer in enumerate(self._endpoint.answer_all(turns, settings.max_new_tokens)):
            on_answer(index, answer)

    def close(self) -> None:
        """Leave the endpoint as it is."""
