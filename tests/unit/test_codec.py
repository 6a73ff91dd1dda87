"""Frozen values to JSON and back, strictly."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casync_updater import codec
from casync_updater.model import Identity, Installed, Mark, Origin
from casync_updater.reports import CycleEnd, Outcome
from casync_updater.state import (
    ActionState,
    Answer,
    Bad,
    Intent,
    Journal,
    Kept,
    PendingAction,
    Refusal,
    State,
)

texts = st.text(max_size=8)
times = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.integers(min_value=0, max_value=2**63)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def several(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(strategy, max_size=2).map(tuple)


identities = st.builds(Identity, numbers, numbers)
installeds = st.builds(
    Installed,
    texts,
    texts,
    times,
    texts,
    st.sampled_from(Origin),
    maybe(texts),
    maybe(numbers),
    maybe(times),
    maybe(identities),
)
actions = st.builds(
    PendingAction,
    texts,
    texts,
    several(st.tuples(texts, texts)),
    maybe(times),
    st.sampled_from(ActionState),
)
bads = st.builds(Bad, texts, maybe(numbers))
journals = st.builds(
    Journal,
    intent=st.sampled_from(Intent),
    installed=installeds,
    token=texts,
    old=maybe(identities),
    new=maybe(identities),
    folder=texts,
    replaced=maybe(installeds),
    moves=several(texts),
    actions=several(actions),
    trial=st.booleans(),
    hold=maybe(texts),
    bad=several(bads),
)
states = st.builds(
    State,
    destination=texts,
    format=numbers,
    unsigned_mark=maybe(st.builds(Mark, numbers, times)),
    signed_mark=maybe(st.builds(Mark, numbers, times)),
    installed=maybe(installeds),
    previous=several(st.builds(Kept, texts, installeds, several(texts))),
    journal=maybe(journals),
    pending=several(actions),
    answers=several(st.builds(Answer, texts, texts, texts, maybe(texts), maybe(texts))),
    trial=maybe(numbers),
    bad=several(bads),
    held=maybe(texts),
    no_exchange=maybe(texts),
    refused=maybe(st.builds(Refusal, texts, texts, texts, texts, times)),
    last_check=maybe(times),
    last_error=maybe(texts),
    backup_absent=st.booleans(),
    newest_date=maybe(times),
)


@settings(max_examples=60, deadline=None)
@given(states)
def test_a_state_comes_back_as_it_was(state: State) -> None:
    assert codec.from_json(State, json.loads(json.dumps(codec.to_json(state)))) == state


def test_what_no_field_says_gets_the_default() -> None:
    assert codec.from_json(State, {"destination": "/x"}) == State("/x")


def test_a_result_comes_back_as_well() -> None:
    end = CycleEnd(Outcome.UPDATED, 0, "message", actions=("a", "b"), source=Origin.BACKUP)
    assert codec.from_json(CycleEnd, json.loads(json.dumps(codec.to_json(end)))) == end


def test_paths_of_any_bytes(tmp_path: Path) -> None:
    value = {"path": tmp_path / "\udcff", "list": [tmp_path]}
    again = json.loads(json.dumps(codec.to_json(value)))
    assert again == {"path": str(tmp_path / "\udcff"), "list": [str(tmp_path)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"destination": None}, "State.destination is NoneType, not str"),
        ({"destination": 5}, "State.destination is int, not str"),
        ({"format": True}, "State.format is bool, not int"),
        ({"format": 1.0}, "State.format is float, not int"),
        ({"last_check": True}, "State.last_check is bool, not float"),
        ({"last_check": "1"}, "State.last_check is str, not float"),
        ({"last_check": float("inf")}, "State.last_check is no number that a float can be"),
        ({"backup_absent": 0}, "State.backup_absent is int, not bool"),
        ({"unknown": 1, "another": 2}, "State has unknown fields: another, unknown"),
        ({"signed_mark": {"serial": 1}}, "State.signed_mark.date is missing"),
        ({"signed_mark": [1, 2.0]}, "State.signed_mark is no object"),
        ({"previous": {}}, "State.previous is no list"),
        ({"previous": "ab"}, "State.previous is no list"),
        ({"bad": [{"digest": "x", "serial": 1}, None]}, r"State.bad\[\] is no object"),
        (
            {"pending": [{"id": "x", "command": "y", "state": "over"}]},
            "'over' is not a valid ActionState",
        ),
        (
            {"pending": [{"id": "x", "command": "y", "env": [["a", "b", "c"]]}]},
            r"State.pending\[\].env\[\] has 3 items, not 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec.from_json(State, {"destination": "/x", **change})


@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_no_object_is_no_state(value: Any) -> None:
    with pytest.raises(ValueError, match="State is no object"):
        codec.from_json(State, value)


def test_a_whole_number_is_a_time_too() -> None:
    state = codec.from_json(State, {"destination": "/x", "last_check": 5})
    assert type(state.last_check) is float
