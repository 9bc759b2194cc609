"""The fault matrix: one place, one unbroken run to compare with, and a count of what was tried and survived."""

import concurrent.futures

import pytest
from matrix import COUNTS, PAIR
from place import FOUR, Place, prepared


def pytest_terminal_summary(terminalreporter):
    for what, (survived, tried) in COUNTS.items():
        terminalreporter.write_line(f"{what}: {survived} of {tried}")


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Place:
    return prepared(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def golden(place):
    """The run that nothing disturbs, on four devices."""
    done = place.run("train", "synthetic.py", "--name", "golden", *FOUR)
    assert (done.code, done.err) == (0, "")
    return place.runs / "golden"


@pytest.fixture(scope="session")
def golden_pair(place):
    """The same on two processes of two devices."""
    done = place.run(*PAIR, "train", "synthetic.py", "--name", "golden_pair", "--keep", "2")
    assert done.code == 0, done
    return place.runs / "golden_pair"


@pytest.fixture(scope="module")
def outcome(request, place, golden):
    """outcome(row) waits for the row of the module's ROWS to be tried, two at a time, and raises what it raised."""
    mine = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    wanted = [item.callspec.params["row"] for item in mine if "row" in item.callspec.params]
    pool = concurrent.futures.ThreadPoolExecutor(2)
    futures = {row: pool.submit(request.module.ROWS[row], place, golden) for row in dict.fromkeys(wanted)}
    try:
        yield lambda row: futures[row].result()
    finally:
        pool.shutdown(cancel_futures=True)
