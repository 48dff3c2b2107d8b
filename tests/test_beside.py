"""The report's own processes, and work that is done by several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import PATIENCE, ROOT, Lab, until
from warm import gone

from lab.beside import NoReport, Reporter
from lab.helper import has_word
from lab.packing import wanted
from lab.plan import Slot
from train_args import RunnerConfig


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A sweep that is done."""
    lab = Lab(tmp_path_factory.mktemp("swept"), data)
    assert lab.here() == 0
    return lab


def test_the_last_report(swept: Lab) -> None:
    reporter, page = Reporter(swept.folder), swept.folder / "report.html"
    page.unlink()
    reporter()
    assert reporter.helper is None and not page.exists(), "none is due"
    told = reporter.last()
    assert page.is_file() and (swept.folder / "plots/comparison.svg").is_file()
    assert told["counts"]["done"] == 2 and told["cells"] == 2 and str(page.resolve()) in told["text"]
    first = reporter.helper
    reporter.begin()
    assert reporter.last() == told and reporter.helper is first, "which has imported what draws"
    reporter.close()
    assert first is not None and first.process.poll() is not None


def test_a_helper_that_has_died_is_replaced(swept: Lab) -> None:
    """With a report on its way too."""
    reporter, page = Reporter(swept.folder), swept.folder / "report.html"
    reporter.begin(live=True)
    first = reporter.helper
    assert first is not None
    first.process.kill()
    first.process.wait()
    page.unlink()
    assert reporter.last()["cells"] == 2 and page.is_file() and reporter.helper is not first
    reporter.close()


KILLED = """
import os, sys
from pathlib import Path
from lab.beside import Reporter
reporter = Reporter(Path(sys.argv[1]))
reporter.begin()
reporter.last()
print(reporter.helper.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_helper_ends_with_its_runner(swept: Lab) -> None:
    words = [sys.executable, "-c", KILLED, str(swept.folder)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -9
    until(lambda: gone(int(done.stdout)))


def test_a_report_that_cannot_be_written(swept: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Reporter(swept.home)
    with pytest.raises(NoReport, match="is not the folder of a sweep"):
        nowhere.last()
    nowhere.close()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    reporter = Reporter(swept.folder, first=0)
    reporter()  # which is a sweep's business at its end alone
    with pytest.raises(NoReport, match="/no/such/python"):
        reporter.last()


def test_a_helper_that_cannot_begin_says_why(swept: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (
        "import os, sys\nif 'lab.beside' in sys.orig_argv:\n    os.write(2, b'no fonts here\\n')\n    os._exit(3)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(broken)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(NoReport, match="no fonts here"):
        Reporter(swept.folder).last()


def test_a_report_that_ends_its_process_leaves_the_helper(
    swept: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is ours, or a kill for want of memory: the reason is told, and the next report may go well."""
    broken = """
import sys
if "lab.beside" in sys.orig_argv:
    import os, lab.report
    plain = lab.report.write_report
    def write(*given, **named):
        if os.path.exists("broken"):
            raise KeyError("a bug")
        return plain(*given, **named)
    lab.report.write_report = write
"""
    (tmp_path / "sitecustomize.py").write_text(broken)
    (tmp_path / "broken").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.chdir(tmp_path)
    reporter = Reporter(swept.folder)
    with pytest.raises(NoReport, match=r"KeyError: 'a bug' \(exit code 1\)"):
        reporter.last()
    (tmp_path / "broken").unlink()
    assert reporter.last()["cells"] == 2
    reporter.close()


def test_a_running_sweep_has_a_page(swept: Lab) -> None:
    page = swept.folder / "report.html"
    page.unlink(missing_ok=True)
    reporter = Reporter(swept.folder, first=0)
    reporter()
    assert reporter.helper is not None and reporter.asked == [True]
    assert has_word(reporter.helper.channel, PATIENCE)
    assert "http-equiv" in page.read_text(), "it renews itself"
    reporter.first, due = 1000.0, reporter.due
    reporter()
    assert reporter.asked == [] and reporter.due > due + 900, "one that took time makes the next one wait"
    reporter.close()


def test_a_metric_that_no_result_has_is_told_at_the_end(swept: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """A result of an older version may lack a field that this one knows."""
    for label in swept.labels:
        result = swept.result(label)
        del result["tokens_per_second"]
        (swept.run(label) / "result.json").write_text(json.dumps(result))
    assert swept.here("sweep.objective.metric=tokens_per_second") == 1
    out, err = capsys.readouterr()
    assert "no report: sweep.objective.metric: no result has a field 'tokens_per_second'." in err
    assert "Traceback" not in err and out.strip().endswith("2 done")


# Several processes ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, threading, time
from pathlib import Path
from lab import process
process.cores = lambda: 3
if "thread" in sys.argv:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
wanted, deadline = 1 if "thread" in sys.argv else 3, time.monotonic() + 30
def act(i):  # waits until all processes have a piece
    Path(f"{i}.{os.getpid()}").touch()
    while len({path.suffix for path in Path().glob("?.*")}) < wanted and time.monotonic() < deadline:
        time.sleep(0.002)
    if "broken" in sys.argv and i == 4:
        raise ValueError("four")
    Path(f"{i}").write_text(str(os.getpid()))
try:
    process.side_by_side(range(6), act)
except ValueError as error:
    print(error)
print(os.getpid())
"""


def shared(folder: Path, *words: str) -> tuple[list[str], list[set[int]]]:
    """What the script says, and which pieces of work each process did."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, *words]
    said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    done: dict[str, set[int]] = {}
    for i in range(6):
        if (folder / str(i)).exists():
            done.setdefault((folder / str(i)).read_text(), set()).add(i)
    lines = said.stdout.split()
    assert lines[-1] in done or 4 not in set().union(*done.values()), "this process does its share"
    return lines[:-1], sorted(done.values(), key=min)


def test_work_is_shared_by_forks(tmp_path: Path) -> None:
    said, done = shared(tmp_path)
    assert said == [] and len(done) == 3 and sorted(i for some in done for i in some) == [*range(6)]


def test_the_error_of_a_fork_is_raised(tmp_path: Path) -> None:
    said, done = shared(tmp_path, "broken")
    assert said == ["four"]
    assert {0, 1, 2, 3, 5} == set().union(*done), "what others had to do is done"


def test_a_process_with_threads_is_not_forked(tmp_path: Path) -> None:
    assert shared(tmp_path, "thread") == ([], [{0, 1, 2, 3, 4, 5}])


# Packs ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "device", "meant"),
    [
        ({}, "cpu", "small"),
        ({"warm": False}, "cpu", "auto"),
        ({}, "cuda:0", "auto"),
        ({"executor": "slurm"}, "auto", "off"),
        ({"devices_per_trial": 2}, "cuda:0", "off"),
        ({"pack": 4}, "cpu", 4),
        ({"pack": 4, "executor": "slurm"}, "auto", 4),
        ({"pack": 4, "devices_per_trial": 2}, "cpu", "off"),
        ({"pack": "off", "warm": False}, "cpu", "off"),
    ],
)
def test_what_auto_means(settings: dict[str, Any], device: str, meant: int | str) -> None:
    assert wanted(RunnerConfig(**settings), [Slot(device, 1)]) == meant
