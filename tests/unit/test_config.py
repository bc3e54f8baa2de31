"""Config: what is accepted, what is refused and in which words, the dict, the environment, the defaults."""

import copy
import dataclasses
import logging
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransport.config import Config, default_lanes, default_movers
from kvtransport.endpoint import Endpoint
from kvtransport.errors import ConfigError


def test_defaults() -> None:
    config = Config()
    assert config.insecure is False
    assert config.dead_after_s == 2.0
    assert config.handshake_timeout_s == 3.0
    assert config.protection is None
    assert Config() == config


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lanes = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(("tcp",))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("lanes", 0, "from 1 to 32"),
        ("lanes", True, "not an integer"),
        ("lanes", "2", "not an integer"),
        ("lanes", 2.0, "not an integer"),
        ("chunk_nbytes", (1 << 20) + 1, "from 64 to 1048576"),
        ("dead_after_s", float("nan"), "out of range"),
        ("dead_after_s", float("inf"), "out of range"),
        ("dead_after_s", None, "leave it out"),
        ("dead_after_s", "2", "not a number"),
        ("insecure", 1, "neither True nor False"),
        ("insecure", None, "leave it out"),
        ("insecure", "no", "neither True nor False"),
        ("protection", "tls", "choose one of plain, digest, aead"),
        ("protection", "aead", "needs keys"),
        ("backends", "tcp", "not a list"),
        ("backends", (), "not a list"),
        ("backends", ("tpc",), "did you mean 'tcp'"),
        ("backends", ("tcp", "tcp"), "twice"),
        ("backends", ("ucx",), "not in this version"),
        ("require", {"gpu": ("tcp",)}, "choose of host, cuda"),
        ("require", {"host": "tcp"}, "not a list"),
        ("require", ("tcp",), "not a mapping"),
        ("cpus", (1 << 20,), "choose of"),
        ("cpus", (), "not a list"),
        ("cpus", "0", "not a list"),
        ("max_connections", 0, "from 1"),
    ],
)
def test_refusals_name_the_field_and_the_remedy(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Config(**{field: value})
    assert str(caught.value).startswith(field)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("field", ["keys", "key_file", "authorize"])
@pytest.mark.parametrize("value", ["", {}, {"id": b"topsecret"}, "topsecret"])
def test_keys_are_refused_and_not_shown(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="not in this version") as caught:
        Config(**{field: value})
    assert "topsecret" not in str(caught.value)
    assert field not in repr(Config())


def test_values_become_immutable() -> None:
    cpu = min(os.sched_getaffinity(0))
    config = Config.from_dict({"backends": ["tcp"], "require": {"host": ["tcp"]}, "cpus": [cpu]})
    assert config.backends == ("tcp",)
    assert config.cpus == (cpu,)
    assert config.require == {"host": ("tcp",)}
    with pytest.raises(TypeError):
        config.require["host"] = ()  # type: ignore[index]


def test_from_dict_refuses_unknown_and_suggests() -> None:
    with pytest.raises(ConfigError, match="'lane': unknown setting; did you mean 'lanes'"):
        Config.from_dict({"lane": 2})
    with pytest.raises(ConfigError, match="the settings are"):
        Config.from_dict({"zzzzzz": 2})


def test_from_env() -> None:
    config = Config.from_env(
        {
            "KVTRANSPORT_LANES": "4",
            "KVTRANSPORT_BACKENDS": "tcp, inproc",
            "KVTRANSPORT_INSECURE": "true",
            "KVTRANSPORT_DEAD_AFTER_S": "1.5",
            "KVTRANSPORT_REQUIRE": "host=tcp,inproc;cuda=tcp",
            "KVTRANSPORT_PROTECTION": "digest",
            "HOME": "/nowhere",
        }
    )
    assert config == Config(
        lanes=4,
        backends=("tcp", "inproc"),
        insecure=True,
        dead_after_s=1.5,
        require={"host": ("tcp", "inproc"), "cuda": ("tcp",)},
        protection="digest",
    )


def test_from_env_reads_the_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTRANSPORT_MOVERS", "3")
    assert Config.from_env().movers == 3


@pytest.mark.parametrize(
    ("variable", "text", "words"),
    [
        ("KVTRANSPORT_LANE", "4", "did you mean 'KVTRANSPORT_LANES'"),
        ("KVTRANSPORT_LANES", "four", "can't be read as a number"),
        ("KVTRANSPORT_LANES", "0", "from 1 to 32"),
        ("KVTRANSPORT_INSECURE", "maybe", "neither 1 nor 0"),
        ("KVTRANSPORT_PROTECTION", "", "is empty"),
        ("KVTRANSPORT_KEY_FILE", "", "is empty"),
        ("KVTRANSPORT_KEY_FILE", "/etc/keys", "not in this version"),
        ("KVTRANSPORT_CPUS", "0;1", "can't be read as a number"),
        ("KVTRANSPORT_REQUIRE", "tcp", "choose of host, cuda"),
    ],
)
def test_from_env_refusals(variable: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config.from_env({variable: text})


@given(cpus=st.integers(1, 1024))
def test_default_lanes_and_movers_can_be_configured(cpus: int) -> None:
    assert Config(lanes=default_lanes(cpus), movers=default_movers(cpus)).lanes in (1, 2)


@pytest.mark.parametrize("require", [None, {}, {"host": ("tcp",), "cuda": ("inproc", "tcp")}])
def test_copies_are_equal_and_have_the_same_hash(require: Any) -> None:
    config = Config(lanes=2, require=require, insecure=True)
    copies = (copy.copy(config), copy.deepcopy(config))  # by __reduce_ex__, as a spawned worker is handed it
    for one in copies:
        assert one == config
        assert hash(one) == hash(config)
    assert len({config, *copies, Config(lanes=2)}) == 2
    turned = require if require is None else dict(reversed(require.items()))
    assert hash(Config(lanes=2, require=turned, insecure=True)) == hash(config)


def test_who_has_set_up_no_logging_is_told_nothing_on_stderr() -> None:
    assert any(isinstance(one, logging.NullHandler) for one in logging.getLogger("kvtransport").handlers)


def test_limits_without_effect_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"max_handshakes_per_s": 5, "handshake_burst_per_address": 1, "max_connections": 7}
    with Endpoint(Config.from_dict(settings)):
        (line,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert line.name == "kvtransport.config"
    assert line.getMessage().startswith("max_handshakes_per_s, handshake_burst_per_address: without effect")
    caplog.clear()
    with Endpoint(Config(max_handshakes_per_s=100, max_connections=7)):
        assert not caplog.records


def test_the_documented_form_of_require() -> None:
    config = Config.from_env({"KVTRANSPORT_REQUIRE": "host=inproc,tcp;cuda=tcp"})
    assert config.require == {"host": ("inproc", "tcp"), "cuda": ("tcp",)}
