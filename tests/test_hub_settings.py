"""Addresses and tokens that the hub's client cannot use, and why the hub was not asked."""

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from common import hub, models
from common.errors import InputError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in (*hub.OFFLINE, *hub.TOKENS):
        monkeypatch.delenv(name, raising=False)
    hub.settle.cache_clear()
    yield
    hub.settle.cache_clear()


def silent(monkeypatch):
    """A hub that does not answer."""

    class Session:
        def head(self, url, timeout):
            raise OSError("Connection refused")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)


def line():
    with pytest.raises(InputError) as raised:
        models.load("nobody/nothing", torch.float32)
    return str(raised.value)


@pytest.mark.parametrize("address", ["hf-mirror.com", "localhost:8080", "ftp://a", "https://"])
def test_an_address_that_is_none_is_named(address, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert f"HF_ENDPOINT {address} is not an address. Write https://HOST" in line()


@pytest.mark.parametrize("token", ["hf_abcé", "hf_ab cd", '"hf_abcd"', "hf_ab\ncd…"])
def test_a_token_that_cannot_be_sent_is_named_and_not_shown(token, tmp_path, monkeypatch):
    silent(monkeypatch)
    (tmp_path / "token").write_text(token)
    assert f"the token in {tmp_path}/token has letters" in line() and "hf_a" not in line()
    monkeypatch.setenv("HF_TOKEN", token)
    assert "the token in HF_TOKEN has letters" in line()
    with pytest.raises(InputError, match="--push-to-hub a/b: the token in HF_TOKEN has letters"):
        hub.check_push("a/b")


@pytest.mark.parametrize("token", ["", "hf_aB12345", "hf_abc\n", " hf_abc "])
def test_other_tokens_are_sent(token, monkeypatch):
    """The client strips blanks around a token."""
    silent(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", token)
    assert "token in" not in line()


def test_why_the_hub_was_not_asked_is_said(tmp_path, monkeypatch):
    silent(monkeypatch)
    assert f"{constants.ENDPOINT} does not answer (OSError: Connection refused), and " in line()
    assert f"and {tmp_path}/hub does not have model_index.json" in line()
    hub.settle.cache_clear()
    for name in hub.OFFLINE:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv(name, "1")
        assert f"{name} is set, and " in line()
        monkeypatch.delenv(name)
        hub.settle.cache_clear()
