"""States on hosts: the same bits back, on the same mesh only; and where a run's time went."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.model import sharding
from v4jax_train import goodput, journal
from v4jax_train.local_states import LocalStates


def state(seed: float = 0.0, **sizes: int) -> Any:
    """A tree with split, replicated and scalar leaves of several dtypes."""
    mesh = sharding.make_mesh(**(sizes or {"fsdp": 4, "data": 2}))
    place = lambda x, *axes: jax.device_put(x, sharding.place(axes, x.shape, mesh))
    return {
        "embed": place(jnp.arange(64.0).reshape(8, 8) + seed, "embed", None),
        "scale": [place(jnp.full((3,), seed, jnp.bfloat16), None)],
        "step": place(jnp.int32(seed)),
        "key": place(jnp.array([1, 2**32 - 1], jnp.uint32), None),
    }


def saved(hosts: Path, run: Path, *steps: int) -> LocalStates:
    states = LocalStates(str(hosts), run)
    for step in steps:
        states.save(step, state(step), {"step": step, "losses": [float(step)]})
    states.close()
    return states


def test_a_state_comes_back_bit_for_bit_where_it_was(tmp_path: Path) -> None:
    saved(tmp_path / "hosts", tmp_path / "run", 1, 2, 3)
    again = LocalStates(str(tmp_path / "hosts"), tmp_path / "run")
    assert again.latest() == 3
    restored = again.restore(state(), 3)
    assert restored is not None
    tree, notes = restored
    assert notes == {"step": 3, "losses": [3.0]}
    for actual, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(state(3)), strict=True):
        assert (actual.dtype, actual.sharding) == (expected.dtype, expected.sharding)
        np.testing.assert_array_equal(actual, expected)
    again.close()
    # Two are kept, each complete.
    files = sorted(file.name.split(".")[0] for file in (tmp_path / "hosts").rglob("*.*"))
    assert files == ["2", "3"]


def test_another_mesh_or_a_damaged_file_is_not_used(tmp_path: Path) -> None:
    states = saved(tmp_path, tmp_path / "run", 4)
    with pytest.warns(UserWarning, match=r"The last state of the run is used instead\."):
        assert states.restore(state(fsdp=8), 4) is None
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"The last state of the run is used instead\."):
        assert states.restore(state(), 4) is None


def test_states_of_other_runs_and_of_steps_not_continued_do_not_count(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    states = saved(hosts, tmp_path / "run", 4, 6)
    assert LocalStates(str(hosts), tmp_path / "other" / "run").latest() is None
    (other,) = (folder.parent / "0of4" for folder in hosts.glob("*/0of1"))
    other.mkdir()
    states.remove_after(4)
    assert states.latest() == 4
    assert not other.exists()
    states.remove_after(0)
    assert states.latest() is None
    none = LocalStates("", tmp_path)
    none.save(1, state(), {})
    assert none.latest() is None


def test_a_host_without_room_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    states = LocalStates(str(tmp_path / "file"), tmp_path / "run")
    states.save(1, state(), {})
    with pytest.warns(UserWarning, match="No state was saved on this host: .*Not a directory"):
        states.close()


def test_goodput_counts_steps_once_over_all_starts(tmp_path: Path) -> None:
    first = journal.Journal(tmp_path)
    times = lambda began, ended, **seconds: {"began": began, "ended": ended, "seconds": seconds}
    for step in (1, 2, 3, 4):
        first.write("step", step, seconds=10.0)
        if step == 2:
            first.write("time", step, start=times(100.0, 130.0, step=20.0, compile=8.0))
    first.close()  # killed after step 4
    second = journal.Journal(tmp_path, after=2)
    assert second.lost == 20.0
    second.write("time", 3, start=times(160.0, 170.0, step=5.0, lost=20.0))
    second.write("time", 4, start=times(160.0, 200.0, step=25.0, compile=8.0, lost=20.0))
    second.close()
    seconds = goodput.read(tmp_path)
    assert {name: value for name, value in seconds.items() if value} == {
        "step": 45.0, "compile": 16.0, "lost": 20.0, "other": 19.0,
    }  # fmt: skip
    text = "Goodput 45.0% of 100 s; steps done again 20.0%, other 19.0%, compilation 16.0%."
    assert goodput.text(seconds) == text
