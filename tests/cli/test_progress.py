"""Progress: lines at intervals, a bar on request, nothing when asked for."""

import pytest

from loratools.cli.options import Bars
from loratools.cli.progress import plain, progress


def test_lines_at_intervals(capsys):
    now = [0.0]
    told = plain(30.0, lambda: now[0])
    for second, done in ((1, 10), (31, 600_000_000), (40, 700_000_000), (62, 1_000_000_000)):
        now[0] = float(second)
        told(done, 2_000_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "600 MB of 2 GB (30%), 19.4 MB/s, 72 s left",
        "1 GB of 2 GB (50%), 16.1 MB/s, 62 s left",
    ]


def test_nothing_done_is_no_division_by_zero(capsys):
    now = [0.0]
    told = plain(30.0, lambda: now[0])
    now[0] = 30.0
    told(0, 0)
    assert capsys.readouterr().err == "0 B of 0 B (100%), 0 B/s, no speed yet\n"


@pytest.mark.parametrize(("how", "quiet"), [(Bars.none, False), (Bars.bar, True)])
def test_none_when_asked(how, quiet):
    with progress(how, quiet=quiet) as told:
        assert told is None


def test_a_bar_goes_to_stderr_without_colours(capsys):
    with progress(Bars.bar, quiet=False) as told:
        assert told is not None
        told(500, 1000)
    said = capsys.readouterr()
    assert said.out == ""
    assert "0.5/1.0 kB" in said.err
    assert "\x1b[3" not in said.err


def test_plain_lines_where_there_is_no_terminal(capsys):
    with progress(Bars.auto, quiet=False) as told:
        assert told is not None
        told(1, 2)
    assert capsys.readouterr().err == ""
