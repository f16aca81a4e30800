"""Manifold-constrained hyper-connections (report, section 2.2): collapse, mix and expand streams.

The N residual streams of a token are stored side by side, [B, T, N * D], so that no step changes
their layout. TPU kernels read the streams once per function; XLA's form on TPUs keeps them in
float32 in between, on GPUs it does not. XLA computes the gradients, with recomputation.

Axis letters: B batch, T tokens, N streams, D hidden, M = N * D, Q mixing weights.
"""

from typing import Any

from jaxtyping import Array, Float, Float32

from pallas_kernels.hyper import reference, tpu
from pallas_kernels.hyper.reference import sinkhorn
from pallas_kernels.implementations import Impl, check_arrays, check_number, check_whole
from pallas_kernels.reference_gradients import differentiable

__all__ = ["head", "post", "pre", "sinkhorn"]

_run = differentiable("hyper", {"tpu": tpu, "xla": reference, "reference": reference})


def pre(
    x_BTM: Float[Array, "B T M"],
    fn_QM: Float[Array, "Q M"],
    base_Q: Float32[Array, " Q"],
    scale_3: Float32[Array, " 3"],
    *,
    streams: int,
    steps: int,
    eps: float,
    norm_eps: float,
    impl: Impl = "auto",
) -> tuple[Float[Array, "B T D"], Float32[Array, "B T N"], Float32[Array, "B T N N"]]:
    """A sublayer's input, and how to mix its output back in.

    The mixing logits are a projection of the streams' root-mean-square norm, in float32 at full
    precision on every device.

    Args:
      x_BTM: the streams.
      fn_QM: the projection, Q = 2N + N * N: to the streams' weights, the output's, and comb.
      base_Q: bias of the logits.
      scale_3: scale of the logits of each of the three parts.
      streams: N.
      steps: row/column passes of `sinkhorn`, at least 1.
      eps: added to the streams' weights, and eps of `sinkhorn`.
      norm_eps: eps of the norm.
      impl: 'auto' picks the best form for the compile target.

    Returns:
      The collapsed streams in x's dtype; the weight of the sublayer's output in each stream;
      comb[j, k], the weight of old stream j in new stream k.

    Raises:
      NotImplementedError: no such form, or it does not support these arguments.
      TypeError: an array that is not floating-point.
      ValueError: shapes that do not match, or no streams or steps.
    """
    for name, value in (("streams", streams), ("steps", steps)):
        check_whole("hyper.pre", name, value, least=0)
    if streams < 1 or steps < 1:
        raise ValueError(
            f"hyper.pre: {streams} streams and {steps} steps; both must be at least 1."
        )
    check_number("hyper.pre", eps=eps, norm_eps=norm_eps)
    arrays = {"x_BTM": x_BTM, "fn_QM": fn_QM, "base_Q": base_Q, "scale_3": scale_3}
    _check("hyper.pre", arrays, streams, Q=streams * (2 + streams))
    static = {"streams": streams, "steps": steps, "eps": eps, "norm_eps": norm_eps}
    return _run("pre", impl, (x_BTM, fn_QM, base_Q, scale_3), **static)


def post(
    output_BTD: Float[Array, "B T D"],
    x_BTM: Float[Array, "B T M"],
    post_BTN: Float[Array, "B T N"],
    comb_BTNN: Float[Array, "B T N N"],
    *,
    impl: Impl = "auto",
) -> Float[Array, "B T M"]:
    """New streams: post[k] * output + sum over j of comb[j, k] * x[j].

    Computed in the dtype of the weights, returned in that of x.

    Raises:
      NotImplementedError, TypeError, ValueError: as for `pre`.
    """
    sizes = check_arrays("hyper.post", {"x_BTM": x_BTM, "post_BTN": post_BTN})
    N = sizes["N"]
    arrays = {"x_BTM": x_BTM, "output_BTD": output_BTD}
    arrays |= {"post_BTN": post_BTN, "comb_BTNN": comb_BTNN}
    _check("hyper.post", arrays, N, D=sizes["M"] // max(N, 1))
    return _run("post", impl, (output_BTD, x_BTM, post_BTN, comb_BTNN))


def head(
    x_BTM: Float[Array, "B T M"],
    fn_NM: Float[Array, "N M"],
    base_N: Float32[Array, " N"],
    scale_1: Float32[Array, " 1"],
    *,
    eps: float,
    norm_eps: float,
    impl: Impl = "auto",
) -> Float[Array, "B T D"]:
    """Collapse the streams to one, before the final norm.

    Raises:
      NotImplementedError, TypeError, ValueError: as for `pre`.
    """
    arrays = {"x_BTM": x_BTM, "fn_NM": fn_NM, "base_N": base_N, "scale_1": scale_1}
    _check("hyper.head", arrays, check_arrays("hyper.head", {"fn_NM": fn_NM})["N"])
    check_number("hyper.head", eps=eps, norm_eps=norm_eps)
    return _run("head", impl, (x_BTM, fn_NM, base_N, scale_1), eps=eps, norm_eps=norm_eps)


def _check(op: str, arrays: dict[str, Any], streams: int, **sizes: int) -> None:
    channels = check_arrays(op, arrays, sizes={"N": streams, **sizes})["M"]
    if streams < 1 or channels % streams:
        raise ValueError(f"{op}: x_BTM has {channels} channels, not {streams} equal streams.")
