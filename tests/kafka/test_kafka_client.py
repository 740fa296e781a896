"""What both client libraries share above the seam."""

from __future__ import annotations

from connectors.kafka_client import LONGEST_BACKOFF_S, backoff_s


def test_waits_double_up_to_a_limit_and_differ_between_workers() -> None:
    waits = [[backoff_s(failures) for _ in range(50)] for failures in range(12)]
    for failures, each in enumerate(waits):
        longest = min(LONGEST_BACKOFF_S, 0.1 * 2**failures)
        assert all(longest / 2 <= wait_s <= longest for wait_s in each)
        assert len(set(each)) > 1
