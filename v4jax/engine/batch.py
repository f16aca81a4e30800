"""Requests answered together on the caller's thread, by an engine that is gone afterwards."""

import collections
from collections.abc import Iterator, Sequence

from v4jax.decoding.loaded import Loaded, NotFiniteError
from v4jax.engine import settings
from v4jax.engine.build import build
from v4jax.engine.request import Event, Request
from v4jax.engine.settings import Settings
from v4jax.model import cache as caches

# Most requests that run at once.
_ROWS = 16
# Tokens of a prompt that are read at once: the first that holds the longest prompt, or the last.
_CHUNKS = (512, 2048)


def answer(
    model: Loaded, requests: Sequence[Request], *, speculate: str | None = None
) -> Iterator[tuple[int, Event]]:
    """The events of some requests, each with the request's index.

    A few sizes of the engine serve all requests, so that few programs are compiled.

    Raises:
      NotFiniteError: a request's logits are not finite.
      RuntimeError: a request's watcher or constraint has raised an error.
      ValueError: `speculate` is not valid for the model.
    """
    core = build({None: model}, _settings(model, requests, speculate))
    events: collections.deque[tuple[int, Event]] = collections.deque()
    sequences = []
    for i, request in enumerate(requests):
        sequence = core.sequence(request, lambda event, i=i: events.append((i, event)))
        core.add(sequence)
        sequences.append(sequence)
    left = len(requests)
    while left:
        core.step()
        while events:
            i, event = events.popleft()
            left -= event.finish is not None
            yield i, event
            if event.finish == "error":
                if sequences[i].failed:
                    raise RuntimeError("A request could not be read to its end; the log says why.")
                raise NotFiniteError


def _settings(model: Loaded, requests: Sequence[Request], speculate: str | None) -> Settings:
    """The sizes of an engine for some requests."""
    longest = max(len(request.tokens) + request.max_tokens for request in requests)
    limit, prompt = model.config.max_position_embeddings, max(len(r.tokens) for r in requests)
    rows = min(1 << (len(requests) - 1).bit_length(), _ROWS)
    sizes = Settings(
        max_seqs=rows,
        context=min(caches.bucket(longest, limit), limit),
        chunk=next((size for size in _CHUNKS if size >= prompt), _CHUNKS[-1]),
        drafts=settings.drafts_of(speculate, model),
        snapshots=64 if len(requests) > 1 else 0,
        top=max(request.top_logprobs for request in requests),
        scores=any(request.prompt_logprobs for request in requests),
    )
    return settings.check(sizes, model)
