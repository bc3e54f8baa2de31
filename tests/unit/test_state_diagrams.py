"""docs/reference/states.md is what the tables give, and the tables are complete."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from kvtransport._native import transfer_table
from kvtransport.protocol.handshake import Input, State, transition_table
from kvtransport.protocol.messages import Role

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "state_diagrams"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    loader = SourceFileLoader("state_diagrams", str(SCRIPT))
    spec = spec_from_loader(loader.name, loader)
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_the_page_is_current(generator: ModuleType) -> None:
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run scripts/state_diagrams"


def test_transfer_table_has_each_row_once() -> None:
    rows = transfer_table()
    roles, states, events = ({row[i] for row in rows} for i in range(3))
    assert roles == {"source", "destination"}
    places = [row[:3] for row in rows]
    assert len(set(places)) == len(places)
    assert set(places) == set(product(roles, states, events))
    assert {row[3] for row in rows} <= states


def test_handshake_table_has_each_row_once() -> None:
    places = [row[:3] for row in transition_table()]
    assert len(set(places)) == len(places)
    assert set(places) == set(product(*({x.value for x in words} for words in (Role, State, Input))))


def test_every_word_is_explained(generator: ModuleType) -> None:
    rows = transfer_table()
    assert {row[2] for row in rows} == set(generator.EVENTS)
    assert {row[4] for row in rows} == set(generator.ACTIONS) | set(generator.TRANSFER.faults)


@pytest.mark.parametrize("role", ["source", "destination"])
def test_every_state_leads_to_an_end(generator: ModuleType, role: str) -> None:
    """From wherever a transfer can be, the loss of the session and the engine's answer end it."""
    rows = generator.rows_of(transfer_table(), role)
    step = {(row.state, row.event): row for row in rows}
    for state in generator.reachable(rows, generator.TRANSFER):
        after = step[state, "lost"].to
        while after != "over":
            following = (
                step[after, "quiesced"].to if after in {"stopping", "ending"} else step[after, "lost"].to
            )
            assert following != after
            after = following


@pytest.mark.parametrize("role", ["source", "destination"])
def test_the_end_is_final(role: str) -> None:
    assert {row[3] for row in transfer_table() if row[:2] == (role, "over")} == {"over"}


@pytest.mark.parametrize("role", [role.value for role in Role])
def test_handshake_ends_are_final(role: str) -> None:
    for end in ("ESTABLISHED", "FAILED"):
        assert {row.next for row in transition_table() if (row.role, row.state) == (role, end)} == {end}


def test_reachability_sees_what_is_unreachable(generator: ModuleType) -> None:
    rows = generator.rows_of(transfer_table(), "source")
    assert "draining" not in generator.reachable(rows, generator.TRANSFER)
    assert "verdict" in generator.reachable(rows, generator.TRANSFER)
