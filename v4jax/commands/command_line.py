"""What the commands have in common: standard streams, sentences for failures, the platform."""

import contextlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Device files of what JAX's plugins drive: GPUs of NVIDIA (in Windows' Linux and on Tegra too) and
# AMD, and TPUs.
_DEVICES = ("nvidia*", "dxg", "nvmap", "kfd", "accel*", "vfio/[0-9]*")
_PLUGINS = ("xla_cuda", "rocm", "xla_rocm")
_CHOICES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "PJRT_NAMES_AND_LIBRARY_PATHS")


@contextlib.contextmanager
def process(program: str) -> Iterator[None]:
    """The surroundings of a command: call it before JAX is imported.

    What standard error does not take is lost, warnings are one line each there, and JAX keeps to
    the CPU where there is nothing else.

    Raises:
      SystemExit: with 1, as standard output is closed or does not take what was written to it.
    """
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # In this order each gets its own number back, which no other file can have then.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    choose_platform()
    stdout, stderr = _Watched(sys.stdout), _Watched(sys.stderr, forgiving=True)
    with (
        contextlib.redirect_stdout(stdout),  # pyright: ignore[reportArgumentType]
        contextlib.redirect_stderr(stderr),  # pyright: ignore[reportArgumentType]
        warnings.catch_warnings(),
    ):
        warnings.showwarning = lambda message, *_: say(f"{program}: warning: {message}")
        if closed:
            say(f"{program}: standard output is closed, so nothing was done.")
            raise SystemExit(1)
        try:
            yield
        finally:
            stderr.settle()
            if not stdout.settle():
                raise SystemExit(1)


def status(name: str, run: Callable[[], int], *, interrupted: str, out_of_memory: str) -> int:
    """The exit status of a command: what it returns, or 1 after a sentence about its failure.

    Args:
      name: of the command, the beginning of the sentence.
      run: does what is asked for.
      interrupted: what is said of an interruption.
      out_of_memory: what helps then.
    """

    def failed(why: object) -> int:
        say(f"{name}: {' '.join(str(why).split())}")
        return 1

    try:
        done = run()
        sys.stdout.flush()
        return done
    except KeyboardInterrupt:
        return failed(f"interrupted{interrupted}")
    except OSError as error:
        of_output = error is getattr(sys.stdout, "error", None)
        if of_output and isinstance(error, BrokenPipeError):
            # The reader has seen enough.
            return 1
        where = "standard output" if of_output else error.filename
        return failed(f"{f'{where}: ' if where else ''}{error.strerror or error}.")
    except ValueError as error:
        return failed(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return failed(f"out of memory; {out_of_memory}")


def say(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def choose_platform() -> None:
    """Keep JAX to the CPU where there is no other device, unless the environment has a choice.

    Plugins for devices that are not there say so at length, before the command says anything.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _CHOICES):
        return
    if any(next(Path("/dev").glob(pattern), None) for pattern in _DEVICES):
        return
    plugins = importlib.metadata.entry_points(group="jax_plugins").names
    if all(name.startswith(_PLUGINS) for name in plugins):
        os.environ["JAX_PLATFORMS"] = "cpu"


class _Watched:
    """A standard stream that remembers the first error of writing to it.

    A forgiving one goes on: there is nowhere to say so.
    """

    def __init__(self, stream: Any, *, forgiving: bool = False) -> None:
        self._stream, self._forgiving = stream, forgiving
        self.error: OSError | None = None

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            self.error = self.error or error
            if not self._forgiving:
                raise

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def settle(self) -> bool:
        """Whether all was written; else it is dropped, as Python would try again at its exit."""
        with contextlib.suppress(OSError):
            self.flush()
        if self.error is None:
            return True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        self._stream.flush()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
