"""A device is told in one sentence, alike wherever it is asked for."""

import pytest
import torch

from alignbench import UserError, load_backbone, load_scorer, registry
from alignbench.backbone import device_named
from alignbench.config.run_config import load_config
from alignbench.load import load_configured_backbone, load_eval
from alignbench.scorer import Metric

UNKNOWN = ("gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cuda:١", "mps", "xpu", "")
WITH_DEVICE = [n for n in registry.names("evals") if "device" in registry.find("evals", n, Metric).Settings.model_fields]


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_device_of_no_such_name_is_refused_at_every_door(name: str) -> None:
    with pytest.raises(UserError, match="device: a device is auto, cpu, cuda or cuda:N, got"):
        load_config(preset="smoke", options={"device": name})
    with pytest.raises(UserError, match="device: a device is auto, cpu, cuda or cuda:N, got"):
        load_backbone("gaussian_mixture", device=name)
    with pytest.raises(UserError, match="a device is auto, cpu, cuda or cuda:N"):
        device_named(name)


@pytest.mark.parametrize("name", WITH_DEVICE)
def test_every_eval_knows_the_same_devices(name: str) -> None:
    for device in ("auto", "cpu", "cuda", "cuda:1"):
        load_eval(name, device=device)
    for device in ("gpu", "meta"):
        with pytest.raises(UserError, match=f"{name}: device: a device is auto, cpu, cuda or cuda:N, got '{device}'"):
            load_eval(name, device=device)


def test_the_evals_with_a_device_are_those_with_a_model() -> None:
    assert {"ocr", "pickscore", "hpsv2", "imagereward", "aesthetic", "geneval", "diversity", "clip_agreement"} <= {*WITH_DEVICE}


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(
            UserError, match=rf"device {name}: torch .* (sees no CUDA GPU|is built without CUDA); take cpu, or auto"
        ):
            device_named(name)
    assert device_named("auto") == device_named("cpu") == torch.device("cpu")
    gpus(monkeypatch, 1)
    with pytest.raises(UserError, match="device cuda:7: cuda:0 is the only GPU here"):
        device_named("cuda:7")
    gpus(monkeypatch, 4)
    with pytest.raises(UserError, match="device cuda:7: the GPUs here are cuda:0 to cuda:3"):
        device_named("cuda:7")
    assert device_named("cuda:3") == torch.device("cuda:3")
    assert device_named("auto") == device_named("cuda") == torch.device("cuda")


def test_a_run_is_on_a_device_that_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    config = load_config(preset="smoke", options={"backbone": {"name": "tiny", "device": "meta"}})
    with pytest.raises(UserError, match="device meta: no image can be drawn on it"):
        load_configured_backbone(config)
    config = load_config(preset="smoke", options={"device": "cuda"})
    for device in (None, "meta"):  # the run, and its dry run
        with pytest.raises(UserError, match="device cuda: torch"):
            load_configured_backbone(config, device=device)


def test_a_reader_takes_the_device_that_auto_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    scorer = load_scorer("ocr", device="auto")
    scorer.prepare()
    assert scorer.describe()["device"] == "cpu"
