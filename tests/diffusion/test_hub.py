"""Loading of pretrained models: names, the hub without a network, and errors that are not the model's."""

import pytest

from datafree.diffusion.hub import hub_errors, prior_name
from datafree.diffusion.variation import ImageToImage, ImageVariation
from engine.runtime.errors import UserError


def test_unreachable_hub_says_how_to_fetch():
    pattern = (
        "--diffusion_model some/model: there is no such directory, .* 'hf download some/model --revision v9 --local-dir DIR'"
    )
    with pytest.raises(UserError, match=pattern) as caught:
        ImageVariation("some/model", "v9")
    assert "\n" not in str(caught.value) and "huggingface-cli download" in str(caught.value)
    with pytest.raises(UserError, match="there is no such directory"):
        ImageToImage("/no/such/directory", prompt="x")


def test_a_full_disk_is_not_a_missing_model():
    import errno

    with pytest.raises(OSError, match="full"), hub_errors("a/b", None, "--x"):
        raise OSError(errno.ENOSPC, "full")


def test_prior_names(tmp_path):
    assert prior_name("a/b") == "a/b" and prior_name("a/b", "v2") == "a/b@v2"
    (tmp_path / "mine").mkdir()
    assert prior_name(str(tmp_path / "mine"), "v2") == "mine"


def test_without_a_network_the_hub_is_not_asked(monkeypatch):
    """If the hub's host name does not resolve, only the cache is used; behind a proxy the name is not looked up."""
    import socket

    from huggingface_hub import constants

    from datafree.diffusion import hub

    def nowhere(*args):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "getaddrinfo", lambda *args: [])
    hub.notice_missing_network()
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub.socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:1"})
    hub.notice_missing_network()
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "getproxies", dict)
    with pytest.raises(UserError, match="hf download some/model"), hub.hub_errors("some/model", None, "--x"):
        raise OSError("not in the cache")
    assert constants.HF_HUB_OFFLINE
