"""Loading by several processes: each reads what its devices hold, and the values are the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import checkpoints, loading, quick
from tests.test_convert import assert_same_checkpoint, contents, write_modules, write_saved
from v4jax.checkpoints import convert, zarr_arrays

CFG = checkpoints.tiny(
    vocab_size=2048,
    hidden_size=512,
    moe_intermediate_size=256,
    num_attention_heads=8,
    layers=checkpoints.tiny().layers[:3],
    num_nextn_predict_layers=0,
)
MESHES = (
    *({axis: 8} for axis in ("fsdp", "expert", "tensor")),
    *({"fsdp": 2, "expert": 4}, {"expert": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}),
    *({"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "expert": 2, "tensor": 2}),
)
# The layouts of transformers.
SAVED = {"saved": write_saved, "modules": write_modules}
MIXED = ({"fsdp": 4, "tensor": 2}, {"data": 8})


@pytest.mark.slow
def test_two_processes_convert_together_and_read_what_their_devices_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zarr_arrays, "_CHUNK_BYTES", loading.CHUNK_BYTES)
    release, base, native = (tmp_path / name for name in ("release", "base", "native"))
    checkpoints.write_release(release, CFG, 0, shards=3, fill="bytes")
    small = checkpoints.tiny(expert_dtype="fp8")
    checkpoints.write_release(base, small, 0, scales="F32", fill="bytes")
    for kind, write in SAVED.items():
        write(tmp_path / kind)
    convert.convert(release, tmp_path / "dense", weights="bfloat16")
    loads = [
        (release, release, True, "bfloat16", MESHES),
        (release, release, False, "bfloat16", MESHES[::3]),
        (native, release, True, "bfloat16", MESHES),
        (native, release, False, "bfloat16", MESHES[1::3]),
        (tmp_path / "dense", release, False, "bfloat16", MIXED),
        *((base, base, keep, "float32", MIXED) for keep in (True, False)),
        *((tmp_path / kind, tmp_path / kind, False, "float32", MIXED) for kind in SAVED),
    ]
    file, exported = tmp_path / "cases.json", tmp_path / "exported"
    work = {"convert": (release, native, exported), "load": loads}
    file.write_text(json.dumps(work, default=str))
    first, second = run(2, "tests.loading", file)
    assert first[0].startswith("Process 1 failed")
    assert second[0] == "the disk is gone"
    assert len(first) == len(second) == 1 + sum(len(case[-1]) for case in loads)

    convert.convert(release, tmp_path / "alone")
    assert contents(native) == contents(tmp_path / "alone")
    assert_same_checkpoint(exported, release)
    chunks = list((native / "weights" / "embed_VD").glob("[0-9]*"))
    assert len(chunks) > 8
    assert not list(tmp_path.glob("*.unfinished"))


def run(processes: int, module: str, *arguments: object) -> list[list[str]]:
    """Run a module as several processes of 8 devices; the lines that each writes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    each = f"--xla_force_host_platform_device_count={8 // processes}"
    environment = os.environ | {"XLA_FLAGS": f"{quick.FLAGS} {each}", "V4JAX_CACHE": "off"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, f"localhost:{port}", str(processes), str(number)]
            + [str(argument) for argument in arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    outputs = []
    for process in started:
        stdout, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr[-3000:]
        outputs.append([line for line in stdout.splitlines() if not line.startswith("[Gloo]")])
    return outputs
