import threading
import time

import pytest
from lakebed.queries.arrays.side_by_side import side_by_side


def test_results_come_in_the_order_of_the_items():
    def slow_at_first(item):
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(side_by_side(slow_at_first, range(40))) == [item * item for item in range(40)]
    assert list(side_by_side(slow_at_first, [])) == []


def test_items_are_taken_in_the_callers_thread_and_only_a_few_ahead():
    taken = []

    def items():
        for item in range(1000):
            taken.append(threading.current_thread())
            yield item

    results = side_by_side(lambda item: threading.current_thread(), items())
    assert next(results) is not threading.current_thread()
    assert len(taken) < 1000
    assert threading.current_thread() not in set(results)
    assert set(taken) == {threading.current_thread()}


def test_the_first_error_is_raised():
    def refuse(item):
        if item >= 3:
            time.sleep(0.02 if item == 3 else 0)
            raise ValueError(f"item {item}")
        return item

    results = side_by_side(refuse, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(results)
