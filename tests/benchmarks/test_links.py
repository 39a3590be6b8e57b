"""α and β from measured times; links read back, given on a command line, and what they predict."""

import json
import random

import pytest

from benchmarks.harness import links
from benchmarks.harness.links import Fit, Link
from common.errors import UsageError

SIZES = [2**k for k in range(10, 27, 2)]


@pytest.mark.parametrize("alpha, beta", [(4e-6, 8e9), (600e-6, 1e9), (30e-6, 3e9)])
def test_a_fit_recovers_what_made_the_times(alpha, beta):
    exact = links.fit(SIZES, [alpha + n / beta for n in SIZES])
    assert exact.alpha_s == pytest.approx(alpha, rel=1e-9) and exact.beta_bytes_per_s == pytest.approx(beta, rel=1e-9)
    assert exact.largest_error < 1e-9 and exact.points == len(SIZES)
    noise = random.Random(1)
    noisy = links.fit(SIZES, [(alpha + n / beta) * noise.uniform(0.95, 1.05) for n in SIZES])
    assert noisy.alpha_s == pytest.approx(alpha, rel=0.05) and noisy.beta_bytes_per_s == pytest.approx(beta, rel=0.05)
    assert 0 < noisy.median_error < noisy.largest_error < 0.1
    assert noisy.seconds(0) == noisy.alpha_s


def test_the_largest_size_does_not_decide_alone():
    times = [50e-6 + n / 2e9 for n in SIZES]
    times[-1] *= 1.5  # least squares of absolute errors would give this point back, and an α that is far off
    found = links.fit(SIZES, times)
    assert found.alpha_s == pytest.approx(50e-6, rel=0.1) and found.beta_bytes_per_s == pytest.approx(2e9, rel=0.25)


def minimum(sizes, times, alpha, per_byte):
    return sum(((alpha + per_byte * n - t) / t) ** 2 for n, t in zip(sizes, times, strict=True))


@pytest.mark.parametrize("times", [[1e-6, 2e-6, 8e-6], [5e-6, 4e-6, 3e-6]])
def test_neither_alpha_nor_beta_is_negative_and_the_rest_is_still_the_best(times):
    sizes = [1000, 3000, 9000] if times[0] < times[1] else [1000, 2000, 4000]
    found = links.fit(sizes, times)
    per_byte = 1 / found.beta_bytes_per_s
    assert found.alpha_s >= 0 and per_byte >= 0
    best = minimum(sizes, times, found.alpha_s, per_byte)
    for alpha in (0, 1e-7, 1e-6, 4e-6):
        for other in (0, 1e-11, per_byte * 0.99, per_byte * 1.01, 1e-9):
            assert minimum(sizes, times, alpha, other) >= best - 1e-12
    if times[0] > times[-1]:
        assert per_byte == 0 and Fit.from_json(json.loads(json.dumps(found.as_json() | {"beta_gb_per_s": None}))) == found


@pytest.mark.parametrize(
    "sizes, times, told",
    [
        ([1, 2], [1.0, 2.0], "3 sizes or more"),
        ([1, 1, 2, 2], [1.0, 1.0, 2.0, 2.0], "3 sizes or more"),
        ([1, 2, 3], [1.0, 2.0], "3 sizes or more"),
        ([1, 2, 3], [1.0, 0.0, 2.0], "above 0"),
    ],
)
def test_too_little_is_refused(sizes, times, told):
    with pytest.raises(ValueError, match=told):
        links.fit(sizes, times)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_link_gives_back_what_was_measured(ranks):
    measured = Fit(40e-6, 2e9, 0.0, 0.0, 9)
    link = Link.measured("gloo", measured, ranks)
    for n in (0, 1000, 10**7):
        assert link.all_reduce_seconds(n, ranks) == pytest.approx(measured.seconds(n))
    assert link.all_reduce_seconds(10**6, 1) == 0


def test_a_ring_of_many_ranks_pays_latency_for_each_and_bandwidth_twice():
    link = Link("given", 1e-6, 1e9)
    assert link.all_reduce_seconds(0, 1024) == pytest.approx(2 * 1023 * 1e-6)
    assert link.all_reduce_seconds(1e9, 1024) == pytest.approx(2 * 1023e-6 + 2 * 1023 / 1024)
    with pytest.raises(ValueError, match="2 ranks"):
        Link.measured("nccl", Fit(1e-6, 1e9, 0.0, 0.0, 9), 1)


def test_a_link_is_given_as_microseconds_and_gigabits():
    link = links.parse_link("25, 10")
    assert (link.alpha_s, link.beta_bytes_per_s) == (pytest.approx(25e-6), pytest.approx(1.25e9))
    assert link.name == "25 µs, 10 Gbit/s" and link.as_json()["fit"] is None


@pytest.mark.parametrize("text", ["", "25", "25,", ",10", "25,0", "-1,10", "a,b", "1,2,3", "inf,1"])
def test_a_link_that_cannot_be_is_refused(text):
    with pytest.raises(ValueError, match="ALPHA_US,GBIT"):
        links.parse_link(text)


def entry(way, world_size, alpha_us, collective="all_reduce"):
    return {"collective": collective, "way": way, "world_size": world_size} | Fit(alpha_us / 1e6, 1e9, 0.1, 0.2, 9).as_json()


def test_links_are_read_back(tmp_path):
    fits = [entry("gloo", 4, 90), entry("gloo", 2, 30), entry("gloo", 2, 99, "broadcast"), entry("nccl", 1, 5)]
    (tmp_path / "collectives.json").write_text(json.dumps({"fits": fits}))
    found = links.read(tmp_path)
    assert list(found) == ["gloo"] and found["gloo"].ranks == 2  # one rank has no link
    assert found["gloo"].alpha_s == pytest.approx(15e-6) and found["gloo"].fit.alpha_s == pytest.approx(30e-6)
    assert links.read(tmp_path / "collectives.json", ranks=4)["gloo"].ranks == 4
    assert links.read(tmp_path, ranks=3)["gloo"].ranks == 2


@pytest.mark.parametrize("text", ["no json", "[]", '{"fits": [{"collective": "all_reduce"}]}', '{"summary": []}'])
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=r"x\.json: is no collectives\.json; python benchmarks/collectives\.py"):
        links.read(tmp_path / "x.json")
    with pytest.raises(UsageError, match="cannot be read"):
        links.read(tmp_path / "none.json")
