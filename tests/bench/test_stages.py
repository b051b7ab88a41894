"""benchmarks/stages.py: order, limits, verdicts, and what is left at the end."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import stages
from benchmarks.stages import Stage
from tests.support.paths import REPOSITORY


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *window: Stage) -> tuple[int, list[str]]:
    """(exit code, lines of the summary)."""
    monkeypatch.setitem(stages.WINDOWS, "first", window)
    code = stages.main([str(out), "first"])
    return code, (out / "summary.txt").read_text().splitlines()


def names(out: Path) -> set[str]:
    """Of the files in the tar."""
    with tarfile.open(out / "results.tar.gz") as tar:
        return set(tar.getnames())


def test_a_line_a_stage_one_table_and_one_tar(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = run(
        monkeypatch,
        tmp_path,
        Stage("one", 20, "echo noise; echo built"),
        Stage("two", 20, "echo '1 TFLOP/s'; echo '2 TFLOP/s'; echo last"),
        Stage("three", 20, "echo '{}' >{out}/three.json"),
    )
    assert code == 0
    assert [line.split()[0] for line in lines] == ["one", "two", "three"]
    assert lines[0].endswith("ok       built") and lines[1].endswith("1 TFLOP/s; 2 TFLOP/s")
    assert "three.json: expected a result" in lines[2]
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("\n".join(lines))
    assert {path.name for path in tmp_path.iterdir()} == {"results.tar.gz", "summary.txt"}
    assert {"one.txt", "summary.txt", "three.json"} <= names(tmp_path)


def test_what_fails_is_said_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, lines = run(
        monkeypatch,
        tmp_path,
        Stage("broken", 20, "echo the reason; exit 3"),
        Stage("needed", 20, "echo no compiler; exit 1", needed=True),
        Stage("after", 20, "echo never"),
    )
    assert code == 1
    assert "exit 3   the reason" in lines[0] and "exit 1   no compiler" in lines[1]
    assert "skipped  nothing without needed" in lines[2]
    assert "after.txt" not in names(tmp_path)


def test_what_tests_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their count and the first failure; tests that were all skipped are no success."""
    skipped = "SKIPPED [2] a.py:1: few; SKIPPED [30] b.py:2: no usable GPU; 32 skipped in 1 s"
    failed = "FAILED a.py::test_x - assert 1; FAILED a.py::test_y; 2 failed, 3 passed in 1 s"

    def printing(name: str, lines: str, status: int) -> Stage:
        words = " ".join(f"'{line.strip()}'" for line in lines.split(";"))
        return Stage(name, 20, f"printf '%s\\n' {words}; : python -m pytest x; exit {status}")

    code, lines = run(
        monkeypatch, tmp_path, printing("skips", skipped, 0), printing("fails", failed, 1)
    )
    assert code == 1
    assert lines[0].endswith("no test  32 skipped in 1 s; no usable GPU")
    assert lines[1].endswith("exit 1   2 failed, 3 passed in 1 s; FAILED a.py::test_x - assert 1")


def test_what_comes_after_a_failure_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A kernel that is wrong is neither packaged nor chosen."""
    code, lines = run(
        monkeypatch,
        tmp_path,
        Stage("wrong", 20, "exit 1"),
        Stage("package", 20, "echo never", after="wrong"),
        Stage("block", 20, "echo never", after="package"),
        Stage("right", 20, "echo fine"),
        Stage("more", 20, "echo more", after="right"),
    )
    assert code == 1
    assert lines[1].endswith("left out after wrong only")
    assert lines[2].endswith("left out after package only")
    assert lines[3].endswith("ok       fine") and lines[4].endswith("ok       more")


def test_what_was_measured_before_a_failure_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, lines = run(monkeypatch, tmp_path, Stage("a", 20, "echo 9 ms per block; echo lost; exit 1"))
    assert lines[0].endswith("exit 1   9 ms per block; lost")


def test_the_first_failure_of_real_tests_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "test_it.py"
    file.write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_fails():\n    assert 1 == 2, 'the reason'\n"
        "@pytest.mark.gpu\ndef test_skips():\n    pytest.skip('why')\n"
    )
    command = stages._pytest(str(file)).replace("{python}", sys.executable)
    (tmp_path / "out").mkdir()
    code, lines = run(monkeypatch, tmp_path / "out", Stage("tests", 60, command))
    assert code == 1
    assert "exit 1   1 failed, 1 skipped" in lines[0] and "; FAILED " in lines[0]


@pytest.mark.slow
def test_a_stage_ends_at_its_limit_with_all_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stages, "KILL_S", 1)
    file = tmp_path / "late"
    hang = f"trap '' INT; (trap '' INT; sleep 8; touch {file}) & echo hangs; sleep 30"
    start = time.monotonic()
    code, lines = run(monkeypatch, tmp_path, Stage("hang", 5, hang), Stage("next", 20, "echo fine"))
    assert code == 1 and time.monotonic() - start < 20
    assert "ended after 5 s; hangs" in lines[0] and lines[1].endswith("fine")
    time.sleep(3)
    assert not file.exists(), "a process of the stage went on"


def test_without_time_the_rest_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(stages.BUDGET_S, "first", 4)
    code, lines = run(monkeypatch, tmp_path, Stage("one", 20, "echo never"))
    assert code == 1
    assert "skipped  no time: 4 s left of 4" in lines[0]


@pytest.mark.parametrize("window", stages.WINDOWS)
def test_what_the_stages_call_exists(window: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of a benchmark is one, every test that is named is there."""
    seen = set()
    for stage in stages.WINDOWS[window]:
        assert stage.name not in seen, "names are those of files"
        seen.add(stage.name)
        text = stage.command.replace("{out}", "/out").replace("{python}", "python3")
        words = shlex.split(text)
        if words[:3] == ["python3", "-m", "benchmarks"]:
            options = command.parse(words[3:])
            assert options.json == Path(f"/out/{stage.name}.json")
        if words[:3] == ["python3", "-m", "pytest"]:
            for word in (w for w in words if w.startswith("tests/")):
                file, _, test = word.partition("::")
                source = (REPOSITORY / file).read_text() if test else ""
                assert (REPOSITORY / file).exists() and (not test or f"def {test}(" in source)


def test_the_first_window_asks_first_whether_it_is_correct() -> None:
    """And opens no stream with the kernel that has never run before the rest is known."""
    names = [stage.name for stage in stages.FIRST]
    assert names[:5] == ["install", "build", "doctor", "products", "recorded"]
    assert names.index("block") < names.index("gluon") < names.index("gluon_package")
    assert names.index("gluon_package") < names.index("block_gluon")
    after = {stage.name: stage.after for stage in stages.FIRST if stage.after}
    assert after == {
        "gluon_time": "gluon",
        "gluon_package": "gluon",
        "block_gluon": "gluon_package",
    }
    assert [s.name for s in stages.SECOND if "triton_kernels.compile" in s.command][1:] == [
        stage.name for stage in stages.SECOND if stage.after == "gluon"
    ]
    for stage in stages.FIRST[: names.index("gluon")]:
        if "test_attention_gpu" in stage.command:
            assert "-k 'not hopper and not two_fp8'" in stage.command
        assert "hopper" not in stage.command.replace("not hopper", "").replace(
            f"--leave-out {stages.GLUON}", ""
        )
    assert f"--leave-out {stages.GLUON}" in stages.FIRST[1].command
    assert stages.BUDGET_S["first"] <= 8 * 60


@pytest.mark.slow
def test_what_is_measured_needs_no_library_for_films() -> None:
    """PyAV takes 36 MB that would have to come along."""
    modules = [f"benchmarks.{name}" for name in command.BENCHMARKS] + ["liveact.commands.doctor"]
    modules += ["liveact.commands.cli", "tests.gpu.test_gpu", "tests.gpu.test_gpu_products"]
    modules += ["tests.gpu.test_gpu_vae", "tests.support.kernels.attention_gpu", "tests.conftest"]
    code = f"import sys; sys.modules['av'] = None\nimport {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_recordings_may_lie_inside_the_tree(tmp_path: Path) -> None:
    """A copy of the checkout on another machine has nothing beside it."""
    tree = tmp_path / "tree"
    (tree / "tests" / "support").mkdir(parents=True)
    source = (REPOSITORY / "tests" / "support" / "paths.py").read_text()
    (tree / "tests" / "support" / "paths.py").write_text(source)
    code = "import tests.support.paths as p; print(p.GOLDEN)"

    def found() -> Path:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True
        )
        return Path(done.stdout.strip())

    assert found() == tmp_path / "shared" / "golden"
    (tree / "pack" / "golden").mkdir(parents=True)
    assert found() == tree / "pack" / "golden"
    (tmp_path / "shared" / "golden").mkdir(parents=True)
    assert found() == tmp_path / "shared" / "golden"


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_what_needs_two_gpus_is_left_out_without_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int
) -> None:
    monkeypatch.setattr(stages, "count_gpus", lambda: gpus)
    code, lines = run(monkeypatch, tmp_path, Stage("pair", 20, "echo both", gpus=2))
    assert code == 0
    assert lines[0].endswith("both" if gpus == 2 else f"left out needs 2 GPUs, found {gpus}")
