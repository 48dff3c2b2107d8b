"""GPUs by their UUIDs, with a driver's tool that tests make up, and trials put beside one another once one has told its memory."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import devices
from lab.executors.local import CONTEXT, LocalExecutor
from lab.plan import Slot, Wish
from lab.store import HEARTBEAT

ROWS = ["0, GPU-aaaa-1, 81559", "1, GPU-bbbb-2, 81559", "2, GPU-bcbc-3, 40960"]


@pytest.fixture(autouse=True)
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An nvidia-smi that tells of three GPUs."""
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in ROWS))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices.gpus.cache_clear()
    yield program
    devices.gpus.cache_clear()


def test_devices_have_uuids(tool: Path) -> None:
    assert {name: gpu.uuid for name, gpu in devices.gpus().items()} == {
        "cuda:0": "GPU-aaaa-1",
        "cuda:1": "GPU-bbbb-2",
        "cuda:2": "GPU-bcbc-3",
    }
    assert devices.memory("cuda:2") == 40960 << 20 and devices.memory("cpu") == 0
    assert devices.as_seen("cuda:2") == ("cuda:0", {"CUDA_VISIBLE_DEVICES": "GPU-bcbc-3"})
    assert devices.as_seen("cuda:2,cuda:0")[1] == {"CUDA_VISIBLE_DEVICES": "GPU-bcbc-3,GPU-aaaa-1"}
    assert devices.as_seen("cpu") == ("cpu", {})


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        ("2,0", ["GPU-bcbc-3", "GPU-aaaa-1"]),
        ("GPU-bb", ["GPU-bbbb-2"]),
        ("MIG-1234, 1", ["MIG-1234", "GPU-bbbb-2"]),
        ("1,7,0", ["GPU-bbbb-2"]),  # CUDA sees nothing after one that is not there
        ("", []),
    ],
)
def test_those_that_the_process_may_use(visible: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.uuid for gpu in devices.gpus().values()] == wanted


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho 'No devices were found'\n"])
def test_a_tool_that_fails_tells_of_none(text: str, tool: Path) -> None:
    tool.write_text(text)
    assert devices.gpus() == {} and devices.as_seen("cuda:1") == ("cuda:1", {})


class Sleepers(LocalExecutor):
    """Starts processes that do nothing, and keeps what they were given."""

    def _spawn(self, folders: Any, slot: Slot, device: str, more: Any, locks: Any, log: Any) -> subprocess.Popen[bytes]:
        self.given = [*getattr(self, "given", []), (slot.device, device, dict(more))]
        return subprocess.Popen(["sleep", "60"], pass_fds=locks)


def test_one_trial_is_measured_and_then_others_are_put_beside_it(tmp_path: Path) -> None:
    executor = Sleepers([Slot("cuda:1", 8)], measure=True)
    names = [f"run-{i}" for i in range(9)]
    for name in names:
        (tmp_path / name).mkdir()
    waiting = [Wish((name,)) for name in names]
    try:
        started = executor.start(waiting, lambda run: tmp_path / run)
        assert len(started) == 1, "what a trial takes is not known yet"
        assert executor.given == [("cuda:1", "cuda:0", {"CUDA_VISIBLE_DEVICES": "GPU-bbbb-2"})]
        assert list(executor.ended()) == [] and executor.start(waiting[1:], lambda run: tmp_path / run) == []
        peak = (devices.memory("cuda:1") * 9 // 10) // 4 - CONTEXT
        (tmp_path / "run-0" / HEARTBEAT).write_text(json.dumps({"peak_memory_bytes": peak}))
        assert list(executor.ended()) == []
        assert len(executor.start(waiting[1:], lambda run: tmp_path / run)) == 3, "four fit"
    finally:
        for trial in executor.live:
            process = trial.process  # type: ignore[attr-defined]
            process.kill()
            process.wait()
