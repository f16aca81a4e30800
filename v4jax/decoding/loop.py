"""Generation over a loaded model: prefill in chunks, then a compiled loop of decode steps.

Axis letters: B batch, T tokens, V vocabulary, N alternatives reported per token.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

from v4jax.decoding import sampling, steps
from v4jax.decoding.sampling import SamplingParams
from v4jax.model import cache as caches
from v4jax.model import params, sharding
from v4jax.model.config import ModelConfig
from v4jax.model.numerics import Numerics
from v4jax.model.transformer import Model

FinishReason = Literal["stop", "length"]
# Prefill runs in chunks of these sizes, the last one padded, so that few programs fit all prompts.
CHUNKS = (64, 512, 2048)
# Seconds between reads of the decode loop by the host.
_READ_SECONDS = 0.05


class NotFiniteError(ValueError):
    """The model's logits are NaN or infinite, so that no token can be sampled."""

    def __init__(self) -> None:
        super().__init__(
            "The model's logits are not finite, so no token can be sampled: its weights or its "
            "adapter are damaged, or too large for the dtype. Try dtype 'float32', or download the "
            "files again."
        )


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall-clock times.

    Attributes:
      prefill_seconds: seconds from the call to the first token, including compilation.
      decode_seconds: seconds from the first token to the last.
      tokens_per_second: rate of the tokens after the first; 0 if there are none.
    """

    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
      id: id of the token.
      logprob: log-probability of the token under the raw logits.
      top: the requested number of most probable tokens, with their log-probabilities.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, repr=False)
class Engine:
    """The compiled loop of a model, on one device or on the mesh of its weights.

    Attributes:
      model: the weights.
      cfg: the configuration.
      numerics: the rounding.
      dtype: dtype of activations and cache.
    """

    model: Model
    cfg: ModelConfig
    numerics: Numerics
    dtype: Any

    def __repr__(self) -> str:
        """One line instead of all weights."""
        layers, parameters = len(self.cfg.layers), params.count(Model(self.cfg))
        megabytes = sum(x.nbytes for x in jax.tree.leaves(self.model)) / 1e6
        mesh = self.mesh and {axis: n for axis, n in self.mesh.shape.items() if n > 1}
        return (
            f"Engine({layers} layers, {parameters:,} parameters in {megabytes:,.1f} MB,"
            f" computing in {np.dtype(self.dtype).name}{f', on {mesh}' if mesh else ''})"
        )

    @property
    def mesh(self) -> Mesh | None:
        """The mesh of the weights; None if they are on one device."""
        return sharding.mesh_of(self.model)

    def rows(self, batch: int) -> int:
        """The number of rows to run for a batch: padded to be sharded, except for a single row."""
        groups = sharding.row_groups(self.mesh)
        return batch if batch == 1 else -(-batch // groups) * groups

    def call(self, step: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Call one of the `steps` for this model."""
        with sharding.on(self.mesh):
            return step(*args, cfg=self.cfg, numerics=self.numerics, **static)

    def by_row(self, x_B: Shaped[np.ndarray, "B ..."]) -> Shaped[Array, "B ..."]:
        """An array of the host, sharded by rows over the devices."""
        if self.mesh is None:
            return jnp.asarray(x_B)
        return jax.device_put(x_B, sharding.place(("batch",), x_B.shape, self.mesh))

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Any, Any]:
        """The logits [B, V] after each prompt, and the cache of the prompts."""
        chunks = self.chunks(steps.prefill, prompts, capacity)
        logits_BV, _, cache = next(chunks)
        for new_BV, count_B, cache in chunks:  # noqa: B007
            # A row that ended in an earlier chunk keeps the logits of that chunk.
            logits_BV = jnp.where(count_B[:, None] > 0, new_BV, logits_BV)
        return logits_BV, cache

    def chunks(
        self, step: Callable[..., Any], prompts: Sequence[Sequence[int]], capacity: int
    ) -> Iterator[tuple[Any, Int[np.ndarray, " B"], Any]]:
        """Run a step over prompts, chunk by chunk, with a new cache.

        Yields:
          The output of the step, the number of tokens of each row in the chunk, and the cache after
          it, which the next chunk donates.
        """
        cache = caches.make(self.cfg, len(prompts), capacity, self.dtype, mesh=self.mesh)
        lengths_B = np.array([len(prompt) for prompt in prompts])
        start = 0
        for size in chunk_sizes(int(lengths_B.max())):
            tokens_BT = pad([prompt[start : start + size] for prompt in prompts], size)
            count_B = np.clip(lengths_B - start, 0, size).astype(np.int32)
            output, cache = self.call(
                step, self.model, self.by_row(tokens_BT), cache, self.by_row(count_B)
            )
            yield output, count_B, cache
            start += size

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        max_tokens: Sequence[int],
        *,
        top_logprobs: int = 0,
    ) -> Iterator[list[list[Token]]]:
        """Generate; yields each row's new tokens, including an end-of-sequence token, in blocks.

        The program is compiled once per number of rows and bucket of capacity.

        Raises:
          NotFiniteError: a row's logits are not finite.
        """
        rows = len(prompts)
        spare = self.rows(rows) - rows
        prompts = [*prompts, *[[0]] * spare]
        params = [*params, *[SamplingParams(temperature=0)] * spare]
        max_tokens = [*max_tokens, *[0] * spare]
        longest = max(len(prompt) + new for prompt, new in zip(prompts, max_tokens, strict=True))
        capacity = caches.bucket(longest, self.cfg.max_position_embeddings)
        logits_BV, cache = self.prefill(prompts, capacity)
        state = self._sampling(prompts, params)
        limit_B = self.by_row(np.array(max_tokens, np.int32))
        static = {"top_logprobs": top_logprobs}
        with sharding.on(self.mesh):
            loop, first = steps.begin(logits_BV, cache, state, limit_B, cfg=self.cfg, **static)
        yield _tokens(first)[:rows]
        count = 1
        while not bool(np.all(loop.done_B)):
            began = time.perf_counter()
            loop, block = self.call(steps.advance, self.model, loop, np.int32(count), **static)
            yield _tokens(block)[:rows]
            per_step = (time.perf_counter() - began) / count
            count = int(np.clip(_READ_SECONDS / per_step, 1, min(2 * count, steps.LOOP)))

    def _sampling(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> sampling.SamplingState:
        """The state before the first draw, sharded as in the loop."""
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        width = caches.bucket(int(lengths_B.max()), self.cfg.max_position_embeddings)
        state = sampling.init(params, self.cfg.vocab_size, pad(prompts, width), lengths_B)
        if self.mesh is None:
            return state
        return jax.device_put(state, sampling.shardings(state, self.mesh))


def chunk_sizes(tokens: int) -> list[int]:
    """Sizes of the chunks of a prefill: large ones, then the smallest that fits the rest."""
    sizes = [CHUNKS[-1]] * (tokens // CHUNKS[-1])
    if rest := tokens - sum(sizes):
        sizes.append(next(size for size in CHUNKS if size >= rest))
    return sizes


def pad(rows: Sequence[Sequence[int]], width: int) -> Int[np.ndarray, "B T"]:
    """Rows of tokens as one array, each padded with zeros."""
    out_BT = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        out_BT[i, : len(row)] = row
    return out_BT


def _tokens(block: steps.StepOutputs) -> list[list[Token]]:
    """Each row's tokens in a block of loop output."""
    block = jax.device_get(block)
    if np.isnan(block.logprob_BT[block.real_BT]).any():
        raise NotFiniteError
    return [
        [
            Token(
                int(block.token_BT[b, t]),
                float(block.logprob_BT[b, t]),
                tuple(
                    zip(
                        block.top_id_BTN[b, t].tolist(),
                        block.top_logprob_BTN[b, t].tolist(),
                        strict=True,
                    )
                ),
            )
            for t in range(block.token_BT.shape[1])
            if block.real_BT[b, t]
        ]
        for b in range(block.token_BT.shape[0])
    ]
