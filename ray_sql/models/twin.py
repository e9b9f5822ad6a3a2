"""A base model in memory once, under more than one adapter."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ray_sql.models.cpu_linear import ExpandedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same weights in memory, whose layers are its own.

    An adapter changes the layers that it is put on, and answers with its weights merged into them.
    So two adapters over a model and its twin do not meet. Call it before the first is put on.
    """
    shared: dict[int, Any] = {id(weight): weight for weight in model.parameters()}
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, ExpandedLinear):
            shared[id(forward)] = forward
    return copy.deepcopy(model, shared)
