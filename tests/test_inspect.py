"""What `inspect` computes and reads, checked against the releases' own figures."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import targets
from tests.checkpoints import tiny, write_release
from v4jax import facts, presets
from v4jax.checkpoints import convert
from v4jax.commands import inspect, kernels
from v4jax.model import config_json
from v4jax.model.params import count
from v4jax.model.transformer import Model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("inspect") / "hf", tiny(), 0)


# The sums over all tensors in the headers of the released files.
@pytest.mark.parametrize(
    ("name", "nbytes"),
    [("flash", 159_609_485_896), ("pro", 864_704_792_696), ("flash-0731", 166_878_536_440)],
)
def test_bytes_match_the_release(name: str, nbytes: int) -> None:
    assert sum(facts.release_bytes(presets.get(name)).values()) == nbytes


@pytest.mark.parametrize(("name", "rate"), [("flash", 3514.25), ("pro", 5031.4375)])
def test_deployed_cache_takes_the_reported_bytes_per_token(name: str, rate: float) -> None:
    assert facts.cache_bytes(presets.get(name))["fp8 + fp4"] == rate


@pytest.mark.parametrize(("name", "billions"), [("flash", 13.3), ("pro", 48.9)])
def test_active_parameters_match_the_report(name: str, billions: float) -> None:
    assert round(facts.report(presets.get(name)).active / 1e9, 1) == billions


@pytest.mark.parametrize(("name", "billions"), [("flash", 284), ("pro", 1573)])
def test_total_parameters_match_the_report(name: str, billions: int) -> None:
    assert round(facts.report(presets.get(name)).total / 1e9) == billions


def test_backbone_and_mtp_add_up_to_the_model() -> None:
    report = facts.report(presets.get("flash"))
    assert report.total + report.mtp == count(Model(presets.get("flash")))


def test_one_device_fewer_could_not_hold_the_bytes() -> None:
    nbytes = 159_609_485_896
    for name, number in facts.devices(nbytes).items():
        capacity = facts.DEVICES[name] * facts.GIB
        assert (number - 1) * capacity < nbytes <= number * capacity


@pytest.mark.parametrize("expert_dtype", ["fp4", "fp8"])
def test_computed_bytes_match_written_files(expert_dtype: Any, tmp_path: Path) -> None:
    cfg = tiny(expert_dtype=expert_dtype)
    directory = write_release(tmp_path / "hf", cfg, 0, fill="bytes")
    assert inspect.find(str(directory)).held == facts.release_bytes(cfg)


@pytest.mark.parametrize("name", presets.names())
def test_show_prints_every_preset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.show(inspect.config_of(name))
    out = capsys.readouterr().out
    assert f"DeepSeek-V4 {name};" in out
    assert f"{sum(facts.release_bytes(presets.get(name)).values()):,}" in out
    assert "\x1b" not in out


def test_show_prints_the_schedule_and_its_segments(capsys: pytest.CaptureFixture[str]) -> None:
    inspect.show(presets.get("flash"))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    start = lines.index("Layers of one compiled loop repeats")
    segments = ["sliding + hash 2", "csa + hash 1", "hca + routed 20", "csa + routed"]
    assert lines[start + 1 : start + 5] == segments
    assert "fp8 + fp4 (DeepSeek's) 3,514.25 0.43 GiB 3.43 GiB" in lines


def test_a_short_context_has_its_own_column(capsys: pytest.CaptureFixture[str]) -> None:
    inspect.show(presets.get("tiny"))
    assert "at 65,536" in capsys.readouterr().out


def test_a_drafter_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    inspect.show(presets.get("flash-0731"))
    out = capsys.readouterr().out
    assert "DSpark drafter" in out
    assert "chat format '0731'" in out


def test_a_directory_reports_what_its_files_hold(checkpoint: Path) -> None:
    subject = inspect.find(str(checkpoint))
    assert subject.config == tiny()
    assert subject.held == facts.release_bytes(tiny())


def test_float32_scales_are_found_in_the_files(tmp_path: Path) -> None:
    directory = write_release(tmp_path / "hf", tiny(), 0, scales="F32", fill="bytes")
    held = inspect.find(str(directory)).held
    assert held is not None
    assert held["F32"] > facts.release_bytes(tiny())["F32"]


def test_a_native_checkpoint_reports_what_its_arrays_hold(checkpoint: Path, tmp_path: Path) -> None:
    convert.convert(checkpoint, tmp_path / "keep")
    convert.convert(checkpoint, tmp_path / "wide", weights="float32")
    keep, wide = (inspect.find(str(tmp_path / name)) for name in ("keep", "wide"))
    assert keep.config == wide.config == tiny()
    assert keep.held is not None
    assert wide.held is not None
    assert keep.held["U8"] == facts.release_bytes(tiny())["I8"]
    assert wide.held["F32"] == 4 * count(Model(tiny()))


def test_missing_mtp_tensors_are_left_out_of_the_configuration(tmp_path: Path) -> None:
    directory = write_release(tmp_path / "hf", tiny(num_nextn_predict_layers=0), 0, fill="bytes")
    file = directory / "config.json"
    file.write_text(json.dumps(config_json.to_json(tiny())))
    assert inspect.config_of(str(directory)).num_nextn_predict_layers == 0


def test_a_configuration_alone_is_enough(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        subject = inspect.find(str(path))
        assert subject.config == tiny()
        assert subject.held is None


def test_an_existing_path_comes_before_a_preset(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint, tmp_path / "flash")
    monkeypatch.chdir(tmp_path)
    assert inspect.config_of("flash") == tiny()


def test_only_the_configuration_of_a_hub_id_is_fetched(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    def resolve(name: str, *, revision: str, allow_patterns: list[str]) -> Path:
        requests.append((name, revision, allow_patterns))
        return checkpoint

    monkeypatch.setattr(inspect.hub, "resolve", resolve)
    subject = inspect.find("some/model", revision="v1")
    assert subject.config == tiny()
    assert subject.held is None
    assert requests == [("some/model", "v1", ["config.json"])]


def test_an_unknown_name_lists_the_alternatives() -> None:
    with pytest.raises(ValueError, match="no such file or directory") as caught:
        inspect.find("flsh")
    for part in ("Hub id", *presets.names(), "Did you mean 'flash'?"):
        assert part in str(caught.value)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint"):
        inspect.find(str(tmp_path))


def test_damaged_weights_are_detected(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "hf")
    shard = next((tmp_path / "hf").glob("*00001*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=shard.name):
        inspect.find(str(tmp_path / "hf"))


def test_kernels_of_a_chip_are_listed_with_what_kept_others_from_running(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = dataclasses.replace(tiny(), layers=tiny().layers[:1], num_nextn_predict_layers=0)
    kernels.show(cfg, "v6e")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "decode hyper.head tpu 1" in lines
    assert any(line.startswith("prefill hyper.pre tpu 2") for line in lines)
    assert any(line.startswith("decode rotary.rotate xla") for line in lines)
    assert any("The TPU kernel takes 64 or" in line for line in lines)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise RuntimeError("libtpu was not found")

    monkeypatch.setattr(targets, "devices", missing)
    with pytest.raises(
        ValueError, match=r"no compiler for v6e is installed .*pip install 'v4jax\[tpu\]'"
    ):
        kernels.show(tiny(), "v6e")
