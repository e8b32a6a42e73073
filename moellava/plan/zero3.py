# SPDX-License-Identifier: Apache-2.0
"""What ZeRO-3 has whole when a step is fullest: DeepSpeed 0.19.8's `PartitionedParameterCoordinator`, gone through on
the sizes of a model alone.

Before each module's forward and backward its own parameters are gathered. Then the next ones of the recorded order are
fetched ahead, until `stage3_prefetch_bucket_size` is reached, as long as fewer numbers than
`stage3_max_live_parameters` are gathered; every module fetches ahead, activations and containers too, so that the front
runs away from the work until that limit stops it. Uses that the front passes while the parameter is whole are not
fetched again. After a module its parameters are let go, but small ones (`stage3_param_persistence_threshold`).

`stage3_max_reuse_distance` would keep those that the backward needs soon. What it says is looked up in a cache that
DeepSpeed fills in the first pass of a finished recording, by module and place in the order, and never empties; and
every run here does forwards without a backward before its first step, to see whether MLPs may run over trained
positions alone and samples may share a row (`moellava/train/rows.py`, `packing.py`). A forward without a backward knows
no later use: from then on weights are let go after every forward. So a model below the limit is whole early in the
forward, where activations are few, and has let go of nearly all when they are many; of one above it the front holds
the limit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

LIVE = 1_000_000_000
"""`stage3_max_live_parameters`, in our file and by default."""


@dataclass(frozen=True)
class Settings:
    """DeepSpeed's, in numbers of parameters.

    Args:
        prefetch: that are fetched ahead at a time.
        persistent: of a parameter that stays.
        live: gathered, from where on nothing is fetched ahead.
    """

    prefetch: int
    persistent: int
    live: int = LIVE


def usual(hidden_size: int) -> Settings:
    """Those of our file, as transformers fills in `auto`."""
    return Settings(prefetch=int(0.9 * hidden_size**2), persistent=10 * hidden_size)


@dataclass(frozen=True)
class Visit:
    """A module's turn in a step.

    Args:
        own: numbers of its own parameters, by their place in the model.
        forward: else backward.
    """

    own: dict[int, int]
    forward: bool


def visits_of(model: Any) -> list[Visit]:
    """A step's visits in order: the words first, whose places the tower's output takes, then the modules as they are
    named. In the backward are those where something trains, in them or before them."""
    places: dict[int, int] = {}
    forward, backward, trains = [], [], False
    words, named = model.get_input_embeddings(), list(model.modules())
    around = [one for one in named[1:] if one is not words and any(inner is words for inner in one.modules())]
    outer = [named[0], *around[:1]]
    for module in [*outer, words, *(one for one in named if one is not words and not any(one is o for o in outer))]:
        own = list(module.parameters(recurse=False))
        visit = {places.setdefault(id(one), len(places)): one.numel() for one in own}
        trains = trains or (module is not words and any(one.requires_grad for one in own))
        forward.append(Visit(visit, True))
        if trains or any(one.requires_grad for one in module.parameters()):
            backward.append(Visit(visit, False))
    return forward + backward[::-1]


def whole_in_the_backward(visits: list[Visit], settings: Settings) -> int:
    """Numbers that are gathered at most from the forward of the last module with parameters, the head, to the step's
    end: activations are all there then, or gradients are.

    Args:
        visits: of `visits_of`.
        settings: DeepSpeed's.
    """
    queue = deque((place, step) for step, visit in enumerate(visits) for place in sorted(visit.own))
    sizes = {place: count for visit in visits for place, count in visit.own.items()}
    turn = max(step for step, visit in enumerate(visits) if visit.forward and visit.own)
    front, whole, most = dict.fromkeys(sizes, -1), dict[int, int](), 0
    for step, visit in enumerate(visits):
        whole |= visit.own
        waiting = {place for place in visit.own if front[place] < step}
        while waiting:
            place, front[place] = queue.popleft()
            waiting.discard(place)
        room, ahead = min(settings.live - sum(whole.values()), settings.prefetch), 0
        while queue and ahead < room:
            place, front[place] = queue.popleft()
            if place not in whole:
                whole[place] = sizes[place]
                ahead += sizes[place]
        if step >= turn:
            most = max(most, sum(whole.values()))
        for place, count in visit.own.items():
            if count > settings.persistent:
                whole.pop(place, None)
    return most
