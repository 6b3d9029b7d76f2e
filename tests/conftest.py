"""What all tests share: one thread each, a quiet hypothesis, and the only three reasons to skip."""

import os

# The workers of xdist share the cores; torch reads this once, when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.hub_fixture import Hub, running

# Same examples on every run, and no verdict that depends on how busy the machine is.
settings.register_profile(
    "loratools", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("loratools")

FIELD = Path(os.environ.get("LORATOOLS_FIELD", Path(__file__).parents[2] / "shared" / "data"))
ORACLES = Path(
    os.environ.get("LORATOOLS_ORACLES", Path.home() / ".cache" / "loratools" / "oracles")
)
REASONS = {
    "field": "no field data (set LORATOOLS_FIELD)",
    "gpu": "no GPU",
    "oracle": "no oracle environment (run `make oracles`)",
}


@pytest.fixture(scope="session")
def field_data() -> Path:
    """The folder of real files that others made; a test that asks for it is marked `field`."""
    return FIELD


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback that this process and its children use, with an empty cache of its own."""
    with running(tmp_path_factory.mktemp("hf_home"), monkeypatch) as server:
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "field_data" in getattr(item, "fixturenames", ()):
            item.add_marker("field")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers():
        if marker.name in REASONS and not is_there(marker):
            pytest.skip(REASONS[marker.name])


def is_there(marker: pytest.Mark) -> bool:
    """Whether this machine has what a test with this marker needs."""
    if marker.name == "field":
        return FIELD.is_dir()
    if marker.name == "oracle":
        return (ORACLES / marker.args[0]).is_dir()
    import torch

    return torch.cuda.is_available()


# Of the whole run: the process that reports sees the results of all workers.
skipped: Counter[str] = Counter()
unexplained: dict[str, str] = {}
refusals: list[int] = []  # of every valid real file and key list (tests/field/test_field_verdicts)


def count(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Counts a skip by its reason; a skip for any other reason, and an xfail, is unexplained."""
    reason = getattr(report, "wasxfail", None)
    if reason is None and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
    if reason in REASONS.values():
        skipped[reason] += 1
    elif reason is not None:
        unexplained[report.nodeid] = reason


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    count(report)
    if report.when == "call":
        refusals.extend(int(n) for key, n in report.user_properties if key == "refusals")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    count(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if unexplained and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if refusals:
        terminalreporter.line(f"refusals: {sum(refusals)} in {len(refusals)} valid real inputs")
    for reason, times in sorted(skipped.items()):
        terminalreporter.line(f"skipped: {times} x {reason}")
    for nodeid, reason in sorted(unexplained.items()):
        terminalreporter.line(f"FAILED {nodeid}: neither skip nor xfail is allowed for: {reason}")
