"""The generator of covering sets against its definition, and the set that the runs use."""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import Row, all_pairs, holds
from scenario import FACTORS, KINDS, LAYOUTS, PHASES, Scenario, allowed, allowed_in_pairs, full_product

sizes = st.lists(st.integers(1, 4), min_size=2, max_size=5)


def pairs_of(rows: list[Row]) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for row in rows for pair in combinations(row.items(), 2)}


@given(counts=sizes, forbidden=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=3))
def test_every_pair_that_is_possible_is_covered(counts: list[int], forbidden: set[tuple[int, int]]) -> None:
    factors = {f"f{index}": tuple(f"v{value}" for value in range(count)) for index, count in enumerate(counts)}
    banned = {(f"f{index}", f"v{value}") for index, value in forbidden if index > 0}

    def may(row: Row) -> bool:  # the first factor's first value goes with nothing that is banned
        return row.get("f0") != "v0" or not banned & set(row.items())

    everything = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    legal = [row for row in everything if may(row)]
    if not legal:
        with pytest.raises(ValueError, match="no combination"):
            all_pairs(factors, may)
        return
    rows = all_pairs(factors, may)
    assert all(may(row) for row in rows)
    assert pairs_of(rows) == pairs_of(legal)
    assert rows == all_pairs(factors, may)


def test_few_rows_are_needed() -> None:
    factors = {f"f{index}": ("on", "off") for index in range(10)}
    assert len(all_pairs(factors, lambda row: True)) <= 10


def test_holds_both_values() -> None:
    pair = (("a", "1"), ("b", "2"))
    assert holds({"a": "1", "b": "2", "c": "3"}, pair)
    assert not holds({"a": "1", "b": "3", "c": "2"}, pair)


def test_the_set_holds_every_layout_with_every_failure_and_feature() -> None:
    rows = all_pairs(FACTORS, allowed_in_pairs)
    assert all(allowed(row) for row in rows)
    assert len(rows) <= 60
    seen = {(row["layout"], row["kind"]) for row in rows}
    never = {("4x1", "two-stages"), ("4x1", "last-worker"), ("1x4", "two-in-stage")}
    assert seen == set(product(LAYOUTS, KINDS)) - never
    assert {(row["layout"], row["phase"]) for row in rows} == set(product(LAYOUTS, PHASES))
    assert {row["phase"] for row in rows if row["kind"] == "kill"} == set(PHASES)


def test_names_tell_all_runs_apart() -> None:
    product_ = full_product()
    assert len({Scenario.of(row).name for row in product_}) == len(product_)


def test_victims_are_distinct_workers_of_the_layout() -> None:
    for row in full_product():
        scenario = Scenario.of(row)
        dp, pp = LAYOUTS[scenario.layout]
        victims = scenario.victims()
        assert len(set(victims)) == len(victims) < dp * pp
        assert all(0 <= victim < dp * pp for victim in victims)
        stages = {victim % pp for victim in victims}
        if scenario.kind in ("two-in-stage", "last-worker"):
            assert len(stages) == 1
        if scenario.kind == "two-stages":
            assert len(stages) == 2
