"""Which devices count as fast in bfloat16."""

from pathlib import Path

import pytest
import torch

from alignbench.runtime import hardware

CPU = torch.device("cpu")
X86 = "processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fpu avx512f avx512_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n"
OLD = "processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t: bf16 avx512_bf16\n"


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hardware, "PROCESSOR", tmp_path / "cpuinfo")
    hardware._processor_features.cache_clear()
    monkeypatch.setattr(hardware, "_processor_features", hardware._processor_features.__wrapped__)
    return tmp_path / "cpuinfo"


@pytest.mark.parametrize(("text", "fast"), [(X86, True), (ARM, True), (OLD, False)], ids=["x86", "arm", "old"])
def test_a_processor_is_fast_if_it_lists_the_feature(processor: Path, text: str, fast: bool) -> None:
    processor.write_text(text)
    assert hardware.has_fast_bfloat16(CPU) is fast


def test_an_unknown_processor_is_not_fast(processor: Path) -> None:
    assert hardware.has_fast_bfloat16(CPU) is False


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_is_fast_from_ampere_on(capability: tuple[int, int], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hardware.has_fast_bfloat16(torch.device("cuda", 0)) is fast


@pytest.mark.parametrize("fast", [True, False])
def test_auto_asks_for_bfloat16_where_it_is_fast_and_bf16_everywhere(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(hardware, "has_fast_bfloat16", lambda device: fast)
    asked = {precision: hardware.computes_in_bfloat16(precision, CPU) for precision in ("same", "fp32", "bf16", "auto")}
    assert asked == {"same": False, "fp32": False, "bf16": True, "auto": fast}
