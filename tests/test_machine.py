"""What the machine says about itself, without torch."""

import os

import pytest

from postgrad import machine


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Put a program called nvidia-smi first on the path; returns how to set its answer."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def answer(line, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{line}'\nexit {code}\n"
        )
        program.chmod(0o755)
        return tmp_path / "asked"

    return answer


def test_a_gpu_is_described_by_its_driver(driver, monkeypatch):
    asked = driver("NVIDIA H100 80GB HBM3, 80000, 9.0, 700.00")
    found = machine.gpu()
    assert found == machine.Gpu("NVIDIA H100 80GB HBM3", 80000 * 2**20, True, 700.0)
    assert machine.hardware()["gpu"] == found.name
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    machine.gpu()
    assert asked.read_text().split()[-2:] == ["-i", "2"]


def test_an_old_gpu_without_a_power_limit(driver):
    driver("Tesla T4, 15000, 7.5, [N/A]")
    assert machine.gpu() == machine.Gpu("Tesla T4", 15000 * 2**20, False, None)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_hidden_gpu_is_none(driver, monkeypatch, hidden):
    driver("NVIDIA H100 80GB HBM3, 80000, 9.0, 700.00")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert machine.gpu() is None
    assert "gpu" not in machine.hardware()


def test_a_driver_that_fails_is_no_gpu(driver):
    driver("NVIDIA-SMI has failed", code=9)
    assert machine.gpu() is None


def test_memory_and_power_are_positive_or_unknown():
    assert 0 < machine.available_memory_bytes() <= machine.hardware()["memory_bytes"]
    watts = machine.processor_watts()
    assert watts is None or watts > 0
