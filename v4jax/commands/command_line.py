"""What the commands share: standard streams, error messages and the choice of platform."""

import contextlib
import gc
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Device files of the devices that JAX plugins support: GPUs of NVIDIA (also under WSL and on Tegra)
# and AMD, and TPUs.
_DEVICES = ("nvidia*", "dxg", "nvmap", "kfd", "accel*", "vfio/[0-9]*")
_PLUGINS = ("xla_cuda", "rocm", "xla_rocm")
_CHOICES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "PJRT_NAMES_AND_LIBRARY_PATHS")
# With Python's own threshold of 2,000 or less, a fifth of a command's time is garbage collection.
_OBJECTS_PER_COLLECTION = 100_000


@contextlib.contextmanager
def process(program: str) -> Iterator[None]:
    """The environment in which a command runs; enter it before JAX is imported.

    Errors of writing to standard error are ignored, each warning is one line there, JAX uses only
    the CPU if there is no other device, and garbage is collected rarely.

    Raises:
      SystemExit: with status 1, if standard output is closed or cannot be written.
    """
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # In this order each stream gets back its own descriptor, which no other file can take.
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    choose_platform()
    gc.set_threshold(_OBJECTS_PER_COLLECTION)
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
    """The exit status of a command: what it returns, or 1 after printing an error message.

    Args:
      name: name of the command, which begins the message.
      run: runs the command.
      interrupted: end of the message after an interruption.
      out_of_memory: advice when memory runs out.
    """

    def failed(message: object) -> int:
        say(f"{name}: {' '.join(str(message).split())}")
        return 1

    try:
        exit_status = run()
        sys.stdout.flush()
        return exit_status
    except KeyboardInterrupt:
        return failed(f"interrupted{interrupted}")
    except OSError as error:
        from_stdout = error is getattr(sys.stdout, "error", None)
        if from_stdout and isinstance(error, BrokenPipeError):
            # The reader, such as `head`, closed the pipe.
            return 1
        where = "standard output" if from_stdout else error.filename
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
    """Restrict JAX to the CPU if there is no other device, unless the environment chooses.

    Plugins without a device would otherwise print long warnings before the command's own output.
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

    A forgiving stream ignores errors: there is nowhere to report them.
    """

    def __init__(self, stream: Any, *, forgiving: bool = False) -> None:
        self._stream, self._forgiving = stream, forgiving
        self.error: OSError | None = None

    def _try(self, operation: Callable[[], Any]) -> None:
        try:
            operation()
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
        """Whether all output was written; if not, drop it, as Python would try again at exit."""
        with contextlib.suppress(OSError):
            self.flush()
        if self.error is None:
            return True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        self._stream.flush()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
