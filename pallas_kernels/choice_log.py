"""Which form of each operation programs have, where `impl='auto'` left the choice to the target."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, order=True)
class Choice:
    """One choice of a form.

    Attributes:
      operation: the operation and its function, such as 'sparse_attention.decode'.
      target: 'tpu', 'gpu', or 'any' where the choice does not depend on the target.
      form: 'tpu' and 'gpu' are Pallas kernels, 'xla' is not.
      reason: why a TPU or GPU gets XLA's form; empty where it gets the kernel.
      arrays: dtype and shape of each array, such as 'bfloat16[8,1,64,512]'.
    """

    operation: str
    target: str
    form: str
    reason: str
    arrays: tuple[str, ...]


_counts: collections.Counter[Choice] = collections.Counter()


def choices() -> dict[Choice, int]:
    """Each choice made in this process so far, and how often.

    A choice is made when a program is lowered for a TPU or GPU, attached or not; choices that
    depend on no target when it is traced. A layer that is scanned is lowered once.
    """
    return dict(sorted(_counts.items()))


def clear_choices() -> None:
    """Forget the choices made so far."""
    _counts.clear()


def record(operation: str, target: str, form: str, leaves: Sequence[Any], reason: str = "") -> None:
    """Count a choice; `leaves` are the arrays of the call."""
    arrays = tuple(map(_described, leaves))
    _counts[Choice(operation, target, form, reason, arrays)] += 1


def _described(x: Any) -> str:
    dtype, shape = getattr(x, "dtype", type(x).__name__), getattr(x, "shape", ())
    return f"{dtype}[{','.join(map(str, shape))}]"
