"""Numbers as people read them."""

import pytest

from bestiary.report import format


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format.count(412_345), "412 k"),
        (format.count(999_600), "1.0 M"),
        (format.count(0), "0"),
        (format.count(7.1e9), "7.1 B"),
        (format.count(None), "-"),
        (format.count(float("nan")), "-"),
        (format.size(12_400), "12.4 kB"),
        (format.size(0), "0 B"),
        (format.rate(12_400), "12.4 k tok/s"),
        (format.bits(2.34567), "2.346"),
        (format.percent(0.125), "12.5%"),
        (format.percent(0.93), "93%"),
        (format.times(1.44), "1.4 times"),
        (format.times(1234), "1,234 times"),
        (format.duration(45), "45 s"),
        (format.duration(700), "12 min"),
        (format.duration(12_000), "3.3 h"),
        (format.context(2048), "2k"),
        (format.context(1000), "1,000"),
    ],
)
def test_a_number_is_written_for_people(shown, expected):
    assert shown == expected
