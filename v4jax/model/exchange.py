"""Routed experts on a mesh: tokens go to the devices that hold their experts, outputs come back.

The devices that together hold all experts of a layer form a group. A few tokens are gathered by the
entire group, and each device adds the outputs of its experts. Otherwise only a token's rows, one
for each of its experts, travel: each device queues the rows sent to it, and takes as many per round
as it has room for. No row is dropped; if all tokens choose one expert, there are more rounds.

Axis letters: T tokens of a device, D hidden, A experts per token, P = T * A rows of a device,
E experts, W devices of a group, Q rows that a device takes in a round.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Int32, Shaped

from pallas_kernels.grouped_matmul import sorting
from v4jax.model import sharding
from v4jax.model.sharding import ROWS

# At most so many tokens are gathered.
_FEW = 512
# Room of a round, relative to the rows of a device whose experts are chosen as often as others.
_ROOM = 1.25

# (x_TD, expert_TA, weight_TA, weights, layer) -> [T, D], the weighted sum over a token's experts.
# Ids outside 0 .. E - 1 contribute nothing. Weights are stacks [L, E, ...].
Run = Callable[..., Any]


class Tokens(NamedTuple):
    """Tokens with their experts, or -1, and the experts' weights."""

    x_TD: Float[Array, "T D"]
    expert_TA: Int[Array, "T A"]
    weight_TA: Float[Array, "T A"]


def over_experts(run: Run, tokens: Tokens, weights: Any, layer: Any) -> Float[Array, "T D"]:
    """`run` of all tokens, with each device's own experts only. Experts are never moved.

    Args:
      run: computes a sum over experts.
      tokens: tokens of the batch.
      weights: tree of the experts' weights.
      layer: index of the layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways = sharding.ways("experts")
    if mesh.empty or mesh.size == 1:
        return run(*tokens, weights, layer)
    experts = jax.tree.leaves(weights)[0].shape[1]
    if ways == 1 or experts % ways:
        # Every device holds all experts.
        axes = (ROWS, ROWS, ROWS, (), ())
        return sharding.per_device(run, *tokens, weights, layer, axes=axes, out=ROWS)
    owners = sharding.place(ROWS, tokens.x_TD.shape, mesh).spec[0] or ()
    group = sharding.mesh_axes("experts")
    split = tuple(axis for axis in group if axis in owners)
    copies = tuple(axis for axis in group if axis not in owners)
    sizes = lambda axes: math.prod(mesh.shape[axis] for axis in axes)
    is_few = len(tokens.x_TD) // sizes(owners) * sizes(split) <= _FEW

    def local(x_TD, expert_TA, weight_TA, weights, layer):
        tokens, own = Tokens(x_TD, expert_TA, weight_TA), experts // ways
        if is_few:
            return _gathered(run, tokens, weights, layer, (split, copies, own))
        return _shared(run, tokens, weights, layer, (group, copies, own))

    rows, stacks = PartitionSpec(owners or None), sharding.partition_spec((None, "experts"))
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, stacks, PartitionSpec()),
        out_specs=rows,
        check_vma=False,
    )(*tokens, weights, layer)


def _gathered(run: Run, tokens: Tokens, weights: Any, layer: Any, where: Any) -> Array:
    """Every device of the group has all tokens, and adds the outputs of its experts."""
    split, copies, own = where
    if split:
        tokens = jax.lax.all_gather(tokens, split, axis=0, tiled=True)
    first = jax.lax.axis_index(sharding.mesh_axes("experts")) * own
    total_TD = run(tokens.x_TD, tokens.expert_TA - first, tokens.weight_TA, weights, layer)
    if split:
        total_TD = jax.lax.psum_scatter(total_TD, split, scatter_dimension=0, tiled=True)
    return jax.lax.psum(total_TD, copies) if copies else total_TD


def _shared(run: Run, tokens: Tokens, weights: Any, layer: Any, where: Any) -> Array:
    """Devices with the same tokens share them, exchange their rows and gather the outputs."""
    group, copies, own = where
    settings = _Settings(run, group, own)
    if not copies:
        return _exchanged(settings, tokens, weights, layer)
    T, ways = len(tokens.x_TD), jax.lax.axis_size(copies)
    share = -(-T // ways)
    start = jax.lax.axis_index(copies) * share

    def part(x: Array, fill: int) -> Array:
        x = jnp.pad(x, ((0, share * ways - T), (0, 0)), constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(x, start, share)

    shared = Tokens(part(tokens.x_TD, 0), part(tokens.expert_TA, -1), part(tokens.weight_TA, 0))
    total_TD = _exchanged(settings, shared, weights, layer)
    return jax.lax.all_gather(total_TD, copies, axis=0, tiled=True)[:T]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What computes the sums, the mesh axes of the group, and the experts of each device."""

    run: Run
    group: tuple[str, ...]
    own: int


class _Queues(NamedTuple):
    """The rows of all devices of a group.

    Attributes:
      order_P: this device's rows in the order of their experts.
      real: number of rows that have an expert; they come first.
      count_WE: rows that each device has for each expert.
      rounds: rounds until every queue is empty, the same on all devices of the mesh.
    """

    order_P: Int32[Array, " P"]
    real: Int32[Array, ""]
    count_WE: Int32[Array, "W E"]
    rounds: Int32[Array, ""]


class _Transfer(NamedTuple):
    """Where and how many rows each device of the group is sent, as in `ragged_all_to_all`."""

    input_offset_W: Int32[Array, " W"]
    send_size_W: Int32[Array, " W"]
    output_offset_W: Int32[Array, " W"]
    receive_size_W: Int32[Array, " W"]


class _Round(NamedTuple):
    """A round's transfers, there and back, and the expert of each row received, or -1."""

    there: _Transfer
    back: _Transfer
    expert_Q1: Int32[Array, "Q 1"]


def _queues(settings: _Settings, expert_TA: Int[Array, "T A"], room: int) -> _Queues:
    ways = jax.lax.axis_size(settings.group)
    experts = settings.own * ways
    key_P, order_P = sorting.sort_by_expert(expert_TA.reshape(-1), experts)
    bounds = jnp.searchsorted(key_P, jnp.arange(experts + 1), method="compare_all")
    count_E = jnp.diff(bounds).astype(jnp.int32)
    count_WE = jax.lax.all_gather(count_E, settings.group)
    longest = jnp.max(jnp.sum(count_WE.reshape(ways, ways, -1), axis=(0, 2)))
    # Devices of other groups too: a loop's collectives may span the entire mesh.
    longest = jax.lax.pmax(longest, jax.sharding.get_abstract_mesh().axis_names)
    rounds = (longest + room - 1) // room
    return _Queues(order_P, bounds[-1].astype(jnp.int32), count_WE, rounds)


def _round(settings: _Settings, queues: _Queues, number: Any, room: int) -> _Round:
    """What a device's queue holds at places number * room .. (number + 1) * room - 1."""
    ways, me = jax.lax.axis_size(settings.group), jax.lax.axis_index(settings.group)
    count_WEo = queues.count_WE.reshape(ways, ways, settings.own)
    count_WW = jnp.sum(count_WEo, axis=2)  # from, to
    start_WW = jnp.cumsum(count_WW, axis=1) - count_WW  # in the order of the device they are from
    before_WW = jnp.cumsum(count_WW, axis=0) - count_WW  # in the queue of the device they go to
    first = number * room
    low_WW = jnp.clip(first - before_WW, 0, count_WW)
    size_WW = jnp.clip(first + room - before_WW, 0, count_WW) - low_WW
    from_WW = start_WW + low_WW
    to_WW = jnp.where(size_WW > 0, before_WW + low_WW - first, 0)
    there = _Transfer(from_WW[me], size_WW[me], to_WW[me], size_WW[:, me])
    back = _Transfer(to_WW[:, me], size_WW[:, me], from_WW[:, me], size_WW[me])

    # A queue has the rows of each device in turn, which are in the order of their experts.
    end_C = jnp.cumsum(count_WEo[:, me].reshape(-1))
    place_Q = first + jnp.arange(room)
    expert_Q = jnp.searchsorted(end_C, place_Q, side="right", method="compare_all") % settings.own
    expert_Q = jnp.where(place_Q < end_C[-1], expert_Q, -1).astype(jnp.int32)
    return _Round(there, back, expert_Q[:, None])


def _send(
    settings: _Settings,
    x: Shaped[Array, "..."],
    transfer: _Transfer,
    into: Shaped[Array, "..."],
) -> Shaped[Array, "..."]:
    """`into`, with the rows that this device receives."""
    ragged = functools.partial(jax.lax.ragged_all_to_all, axis_name=settings.group)
    dense = functools.partial(_send_dense, settings)
    return jax.lax.platform_dependent(
        *(x, into, *transfer), tpu=ragged, cuda=ragged, rocm=ragged, default=dense
    )


def _send_dense(settings: _Settings, x: Array, into: Array, *transfer: Array) -> Array:
    """`ragged_all_to_all` where the compiler has none: every pair moves as much as fits."""
    input_offset_W, _, output_offset_W, receive_size_W = transfer
    most = min(len(x), len(into))
    exchange = lambda x_W: jax.lax.all_to_all(x_W, settings.group, 0, 0, tiled=True)
    at = jnp.arange(most)[None]
    sent_WS = exchange(x[jnp.minimum(input_offset_W[:, None] + at, len(x) - 1)])
    place_WS = exchange(output_offset_W)[:, None] + at
    place_WS = jnp.where(at < receive_size_W[:, None], place_WS, len(into))
    return into.at[place_WS].set(sent_WS, mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(settings: _Settings, tokens: Tokens, weights: Any, layer: Any) -> Array:
    return _run(settings, tokens, weights, layer)[0]


def _run(
    settings: _Settings, tokens: Tokens, weights: Any, layer: Any
) -> tuple[Float[Array, "T D"], _Queues]:
    (T, D), A = tokens.x_TD.shape, tokens.expert_TA.shape[1]
    room = _room(T * A)
    queues = _queues(settings, tokens.expert_TA, room)
    x_PD = tokens.x_TD[queues.order_P // A]
    weight_P = tokens.weight_TA.reshape(-1)[queues.order_P]

    def one(number: Array, out_PD: Array) -> Array:
        step = _round(settings, queues, number, room)
        x_QD, weight_Q = (_received(settings, x, step, room) for x in (x_PD, weight_P))
        out_QD = settings.run(x_QD, step.expert_Q1, weight_Q[:, None], weights, layer)
        return _send(settings, out_QD.astype(x_PD.dtype), step.back, out_PD)

    out_PD = jax.lax.fori_loop(0, queues.rounds, one, jnp.zeros((T * A, D), x_PD.dtype))
    return sorting.sum_choices(out_PD, queues.order_P, queues.real, A), queues


def _room(rows: int) -> int:
    return -(-int(_ROOM * rows) // 8) * 8


def _received(settings: _Settings, x: Array, step: _Round, room: int) -> Array:
    return _send(settings, x, step.there, jnp.zeros((room, *x.shape[1:]), x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Saved:
    """Residuals of the backward pass: inputs, queues, and which leaves of the weights learn."""

    tokens: Tokens
    weights: Any
    layer: Any
    queues: _Queues
    learns: tuple[bool, ...] = dataclasses.field(metadata={"static": True})


def _forward(settings: _Settings, tokens: Any, weights: Any, layer: Any) -> Any:
    learns = tuple(primal.perturbed for primal in jax.tree.leaves(weights))
    values = lambda primals: jax.tree.map(lambda primal: primal.value, primals)
    tokens, weights, layer = values(tokens), values(weights), values(layer)
    total_TD, queues = _run(settings, tokens, weights, layer)
    return total_TD, _Saved(tokens, weights, layer, queues, learns)


def _backward(settings: _Settings, saved: _Saved, grad_TD: Any) -> Any:
    if isinstance(grad_TD, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    (x_TD, expert_TA, weight_TA), A = saved.tokens, saved.tokens.expert_TA.shape[1]
    room, queues = _room(expert_TA.size), saved.queues
    token_P = queues.order_P // A
    rows = x_TD[token_P], grad_TD.astype(x_TD.dtype)[token_P]
    weight_P = weight_TA.reshape(-1)[queues.order_P]
    leaves, tree = jax.tree.flatten(saved.weights)
    pairs = list(zip(leaves, saved.learns, strict=True))
    learned = [leaf for leaf, learns in pairs if learns]

    def one(number: Array, sums: Any) -> Any:
        step = _round(settings, queues, number, room)
        x_QD, grad_QD, weight_Q = (_received(settings, x, step, room) for x in (*rows, weight_P))

        def run(x_QD: Array, weight_Q1: Array, learned: list[Array]) -> Array:
            rest = iter(learned)
            chosen = [next(rest) if learns else leaf for leaf, learns in pairs]
            return settings.run(
                x_QD, step.expert_Q1, weight_Q1, tree.unflatten(chosen), saved.layer
            )

        out_QD, pull = jax.vjp(run, x_QD, weight_Q[:, None], learned)
        dx_QD, dweight_Q1, dlearned = pull(grad_QD.astype(out_QD.dtype))
        dx_PD, dweight_P, dweights = sums
        return (
            _send(settings, dx_QD, step.back, dx_PD),
            _send(settings, dweight_Q1[:, 0], step.back, dweight_P),
            jax.tree.map(jnp.add, dweights, dlearned),
        )

    sums = jax.tree.map(jnp.zeros_like, (rows[0], weight_P, learned))
    dx_PD, dweight_P, dlearned = jax.lax.fori_loop(0, queues.rounds, one, sums)
    dx_TD = sorting.sum_choices(dx_PD, queues.order_P, queues.real, A).astype(x_TD.dtype)
    dweight_TA = sorting.unsorted(dweight_P, queues.order_P, queues.real, A)
    rest = iter(dlearned)
    dweights = tree.unflatten([next(rest) if learns else None for learns in saved.learns])
    return Tokens(dx_TD, None, dweight_TA), dweights, None  # pyright: ignore[reportArgumentType]


_exchanged.defvjp(_forward, _backward, symbolic_zeros=True)
