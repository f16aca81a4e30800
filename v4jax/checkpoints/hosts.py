"""Work shared by the processes of `jax.distributed`, which must see the same files.

JAX is imported only where it is needed, as everything that reads files imports this.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

from v4jax.checkpoints.disk import CheckpointError


@dataclasses.dataclass(frozen=True)
class Team:
    """Processes that do a piece of work together; by default this process alone.

    Attributes:
      index: number of this process.
      count: number of processes.
    """

    index: int = 0
    count: int = 1

    def share(self, sizes: Mapping[str, int]) -> list[str]:
        """The units of work of this process: successive ones, of about as many bytes as others'."""
        total = max(sum(sizes.values()), 1)
        mine, end = [], 0
        for unit, size in sizes.items():
            end += size
            if min(int((end - size / 2) * self.count / total), self.count - 1) == self.index:
                mine.append(unit)
        return mine

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends when all processes have ended it, and fails if one has failed."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [error is not None]
        if self.count > 1:
            import numpy as np
            from jax.experimental import multihost_utils

            failed = np.ravel(multihost_utils.process_allgather(np.array(failed))).tolist()
        if error is not None:
            raise error
        if any(failed):
            raise CheckpointError(
                f"Process {failed.index(True)} failed, and so all do; its message says why."
            )

    def first(self, act: Callable[[], None]) -> None:
        """Call a function on the first process, while the others wait."""
        with self.together():
            if self.index == 0:
                act()


def all_processes() -> Team:
    """The processes of `jax.distributed`."""
    import jax

    # Asking JAX for their number starts its backends, which take the machine's accelerators.
    if not jax.distributed.is_initialized():
        return Team()
    return Team(jax.process_index(), jax.process_count())
