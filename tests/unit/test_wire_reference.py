"""docs/reference/wire.md says what the code says: frames, flags, codes, and the numbers of its limits."""

import re
from pathlib import Path

import pytest

from kvtransport.protocol import messages

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/reference/wire.md").read_text(encoding="utf-8")


def native(name: str) -> str:
    return (ROOT / "native" / name).read_text(encoding="utf-8")


FRAMES = native("protocol/frames.hpp")
SOURCES = (
    FRAMES + native("protocol/frames.cpp") + native("protocol/session.hpp") + native("protocol/session_peer.cpp")
    + native("protocol/session.cpp") + native("protocol/session_destination.cpp") + native("protocol/charges.hpp")
    + native("protocol/session_grants.cpp")
)  # fmt: skip


def number(name: str) -> int:
    """A native constant or default, by name: a product or a shift of literals."""
    form = r"([\d']+)u?(?: (<<|\*) ([\d']+)u?)?"
    found = [re.fullmatch(form, text) for text in re.findall(rf"\b{name} = ([^;]+);", SOURCES)]
    (words,) = [match for match in found if match]
    left, sign, right = words.groups()
    value = int(left.replace("'", ""))
    if sign is None:
        return value
    return value << int(right) if sign == "<<" else value * int(right.replace("'", ""))


def rows(head: str) -> list[list[str]]:
    """The rows of the table whose head line begins like that."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def enumerators(name: str) -> dict[str, int]:
    (body,) = re.findall(rf"enum class {name} [^{{]*\{{([^}}]*)\}}", FRAMES)
    return {word: int(value) for word, value in re.findall(r"(\w+) = (\d+)", body)}


def test_frame_types() -> None:
    assert {row[1].lower(): int(row[0]) for row in rows("type")} == enumerators("FrameType")


def test_bodies_and_flags() -> None:
    """kRules of frames.cpp, by name."""
    rules = {
        name: (sum(bit(word) for word in flag.split(" | ")), eval_length(least), eval_length(most))
        for name, flag, least, most in re.findall(
            r"\{FrameType::(\w+), ([\w| ]+), ([^,]+), ([^}]+)\}", native("protocol/frames.cpp")
        )
    }
    assert set(rules) == set(enumerators("FrameType"))
    for _, name, flag, body, _ in rows("type"):
        bounds = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", body.split(";")[0])]
        said = sum(int(bit) for bit in re.findall(r"(\d) [a-z]", flag))
        assert rules[name.lower()] == (said, bounds[0], bounds[-1]), name


def bit(name: str) -> int:
    """A flag of frames.hpp, by name."""
    return 0 if name == "0" else int(re.findall(rf"{name} =\s+(\d);", FRAMES)[0])


def eval_length(text: str) -> int:
    total = 0
    for term in text.split("+"):
        product = 1
        for factor in term.split("*"):
            word = factor.strip()
            product *= number(word) if word.startswith("k") else int(word)
        total += product
    return total


def test_flag_bits() -> None:
    for name, value in (
        ("kPoolClosed", 1),
        ("kWantPulls", 1),
        ("kWantOfWrite", 2),
        ("kLetGo", 1),
        ("kHeldNot", 1),
        ("kBehindGate", 1),
        ("kFromSource", 1),
        ("kOfferId", 2),
        ("kGateShut", 1),
    ):
        assert re.search(rf"{name} =\s+{value};", FRAMES), name


def test_codes() -> None:
    assert [int(row[0]) for row in rows("code")] == sorted(enumerators("AbortCode").values())
    assert enumerators("CloseCode") == {"closed": 1, "protocol": 2, "limit": 3}
    assert enumerators("ChunkStatus") == {"ok": 1, "aborted": 2}
    assert enumerators("DigestKind") == {"none": 0, "crc32c": 1}


LIMITS = {
    "body of a control frame": "kMaxControlBodyNbytes",
    "body of a CHUNK on a lane": "kMaxChunkNbytes",
    "body of a CHUNK on control": "kMaxInlineNbytes",
    "key": "kMaxKeyNbytes",
    "meta": "kMaxMetaNbytes",
    "unused text of an OFFER": "kMaxLocationNbytes",
    "reason": "kMaxReasonNbytes",
    "name in a POOL": "kMaxNameNbytes",
    "groups in a POOL or terms": "kMaxGroups",
    "layers in a POOL or terms": "kMaxLayers",
    "ranges in a WANT, READ or AGAIN": "kMaxRanges",
    "regions: layers of all open pools, one at least for each (H)": "regions",
    "WANTs that wait for a send, and READs (H); as many more WANTs if they answer an OFFER": "unmatched",
    "OFFERs that wait for a receive, and WRITEs (H)": "unmatched",
    "writes that have ended here and whose chunks are still to come": "kMaxServedTombstones",
    "charges of the peer's pools, of its WANTs and OFFERs that wait, and of its locations": "peer_state_nbytes",
    "charges of messages sent and not taken: half of the next": "message_window_nbytes",
    "charges of messages that wait for the user (H)": "message_queue_nbytes",
    "words awaited on transfers that ended without a verdict": "kMaxLate",
    "separate ranges of one transfer that have come": "kMaxFragments",
}


def limits() -> dict[str, int]:
    return {name: int(value.replace(",", "")) for name, value in rows("limit")}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str) -> None:
    assert limits()[name] == number(LIMITS[name])


def test_limits_that_follow() -> None:
    said = limits()
    assert said["unread answers to the peer's frames (C: more)"] == number("answers_nbytes")
    assert said["bytes of a stream"] == 1 << 62
    tombstones = number("kTombstonesPerUnmatched") * number("unmatched")
    ended = "ended receives that wait for the source's last word; more wait to be told or to meet their OFFER"
    assert said[ended] == tombstones
    charges = number("peer_state_nbytes")
    assert said["of these, charges that a sender's own pools take"] == charges // number("kPoolsShare")
    waiting = "and its WANTs and OFFERs that wait; with WANTs that answer an OFFER twice as much"
    assert said[waiting] == charges // number("kToldShare")
    assert number("kAnsweredShare") * 2 == number("kToldShare")
    assert said["leases, held and asked for"] == int(
        re.findall(r"kMaxHolds = ([\d']+)", SOURCES)[0].replace("'", "")
    )
    assert said["lanes of a session"] == messages.LANES_MAX
    assert said["record of a handshake"] == messages.RECORD_MAX_NBYTES
    assert said["strangers at once (C)"] == 64
    assert len(said) == len(LIMITS) + 9, "a limit that no test knows"


def test_charges() -> None:
    text = " ".join(PAGE.split())
    assert f"The charge of a WANT or OFFER is {number('kRecordCharge')}, the bytes of its key" in text
    assert (
        f"{number('kTermsGroupCharge')} for each group and {number('kTermsLayerCharge')} for each layer"
        in text
    )
    assert (
        f"and {number('kRangeCharge')} for each range; that of a pool is {number('kRecordCharge')}, the"
        in text
    )
    assert (
        f"{number('kPoolGroupCharge')} for each group and {number('kPoolLayerCharge')} for each layer."
        in text
    )
    head = number("kRecordCharge") + number("kLocationWord") * number("kMaxGroups")
    assert f"beyond {head:,}, {number('kLocationWord')} for each block and" in text


def test_capabilities() -> None:
    of_frames = [int(value) for value in re.findall(r"kCan\w+ = (\d+);", FRAMES)]
    assert [int(row[0]) for row in rows("bit")] == [*of_frames, messages.JOINS_NAME_RESPONDER]
    assert sum(of_frames) + messages.JOINS_NAME_RESPONDER == messages.CAPABILITIES


def test_sizes() -> None:
    assert (number("kHeaderNbytes"), number("kTrailerNbytes")) == (64, 16)
    assert (messages.PREAMBLE_NBYTES, messages.JOIN_NBYTES, messages.JOIN_ANSWER_NBYTES) == (32, 64, 16)
    assert messages.MAGIC.decode() in PAGE
    assert number("kVerdictGrace") == 80_000_000


def test_limits_of_hello() -> None:
    """What a HELLO that says nothing of a limit means is what the native side takes for it."""
    told = messages.Limits()
    assert (told.max_regions, told.max_unmatched) == (number("regions"), number("unmatched"))
    assert told.max_message_queue_nbytes == number("message_queue_nbytes")
    for said in (messages.REGIONS_MAX, messages.UNMATCHED_MAX):
        assert f"(1 to {said:,})" in PAGE
