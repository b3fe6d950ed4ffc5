"""Several servers of one model as one: each candidate is loaded on one of them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np

from zo_adapt.errors import OptionError, ServedModelError, ServerReplyError
from zo_adapt.serve.protocol import BASE, Candidate, Limits, Scores, ServedModel, Texts, Writing


class ServerPool(ServedModel):
    """One replica for every url: ``ServerPool([VLLMServer(url) for url in urls])``.

    A candidate goes to the server that has the fewest, and all are asked at once. Replicas of one
    kind give the same values; the self-test compares them, since it asks candidates on all of them.

    Args:
        servers: At least one; closed together.

    Raises:
        OptionError: No server.
        ServerReplyError: (when asked) An adapter of that name is not loaded.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from zo_adapt import PeftServer
        >>> config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> pool = ServerPool([PeftServer(model, adapters=4), PeftServer(model, adapters=2)])
        >>> pool.limits.adapters, len(pool.score(["", ""], [[1, 2], [3, 4, 5]]))
        (6, 2)
    """

    def __init__(self, servers: Sequence[ServedModel]) -> None:
        if not servers:
            raise OptionError("a pool of no servers; give at least one")
        self._servers = list(servers)
        self._threads = ThreadPoolExecutor(len(servers), thread_name_prefix="zo-pool")
        self._place: dict[str, int] = {}

    @property
    def limits(self) -> Limits:
        """As many adapters as all hold together, and else what the least of them can do."""
        each = [server.limits for server in self._servers]
        ranks = [one.rank for one in each if one.rank is not None]
        positions = [one.positions for one in each if one.positions is not None]
        modules = [one.target_modules for one in each if one.target_modules is not None]
        return replace(
            each[0],
            adapters=sum(one.adapters for one in each),
            rank=min(ranks, default=None),
            positions=min(positions, default=None),
            target_modules=frozenset.intersection(*modules) if modules else None,
            scores=all(one.scores for one in each),
            generates=all(one.generates for one in each),
            prompts=all(one.prompts for one in each),
            refuses=frozenset().union(*(one.refuses for one in each)),
        )

    def loaded(self) -> list[str]:
        """The candidates that are on a server."""
        return list(self._place)

    def load(self, candidate: Candidate, lora_config: Mapping[str, Any]) -> None:
        """See ``ServedModel``."""
        held = list(self._place.values())
        room = [s.limits.adapters - held.count(i) for i, s in enumerate(self._servers)]
        place = max(range(len(room)), key=lambda index: room[index])
        self._servers[place].load(candidate, lora_config)
        self._place[candidate.name] = place

    def score(
        self,
        names: Sequence[str],
        token_ids: Texts,
        *,
        starts: Sequence[int] | None = None,
        others: bool = False,
    ) -> list[Scores]:
        """See ``ServedModel``."""

        def ask(server: ServedModel, rows: list[int]) -> list[Scores]:
            first = None if starts is None else [starts[row] for row in rows]
            own, texts = [names[row] for row in rows], [token_ids[row] for row in rows]
            return server.score(own, texts, starts=first, others=others)

        return self._asked(names, ask)

    def choose(self, names: Sequence[str], token_ids: Texts, choices: Sequence[int]) -> np.ndarray:
        """See ``ServedModel``."""

        def ask(server: ServedModel, rows: list[int]) -> list[np.ndarray]:
            own, texts = [names[row] for row in rows], [token_ids[row] for row in rows]
            return list(server.choose(own, texts, choices))

        return np.array(self._asked(names, ask)).reshape(len(names), len(choices))

    def generate(
        self,
        names: Sequence[str],
        token_ids: Texts,
        writing: Writing,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """See ``ServedModel``."""

        def ask(server: ServedModel, rows: list[int]) -> list[list[int]]:
            drawn = None if seeds is None else [seeds[row] for row in rows]
            own, texts = [names[row] for row in rows], [token_ids[row] for row in rows]
            return server.generate(own, texts, writing, drawn)

        return self._asked(names, ask)

    def unload(self, names: Sequence[str]) -> None:
        """See ``ServedModel``."""
        places = {name: self._place.pop(name) for name in names if name in self._place}
        errors = []
        for place, server in enumerate(self._servers):
            try:
                server.unload([name for name, own in places.items() if own == place])
            except ServedModelError as error:  # the others are there
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """See ``ServedModel``."""
        self._threads.shutdown()
        for server in self._servers:
            server.close()

    def _asked(
        self, names: Sequence[str], ask: Callable[[ServedModel, list[int]], list[Any]]
    ) -> list[Any]:
        """The answers of all servers, in the order of the texts."""
        rows: dict[int, list[int]] = {}
        for row, name in enumerate(names):
            place = row % len(self._servers) if name == BASE else self._place.get(name)
            if place is None:
                raise ServerReplyError(f"no adapter named {name!r} is loaded")
            rows.setdefault(place, []).append(row)
        futures = {
            place: self._threads.submit(ask, self._servers[place], own)
            for place, own in rows.items()
        }
        wait(futures.values())  # nothing is asked any more when this is left
        found: dict[int, Any] = {}
        for place, future in futures.items():
            found.update(zip(rows[place], future.result(), strict=True))
        return [found[row] for row in range(len(names))]
