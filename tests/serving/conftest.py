"""An engine for each file, and nothing left behind: as for sessions. Peers that meet anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from aioice import ice
from playwright.sync_api import Browser

from tests.session.conftest import engine, nothing_is_left
from tests.support.browser import browsing
from tests.support.pipeline import speech, write_wav

__all__ = ["engine", "nothing_is_left"]


@pytest.fixture(scope="session", autouse=True)
def peers_meet_on_loopback() -> Iterator[None]:
    """Where a machine has no other interface: WebRTC leaves loopback out, so nobody would meet. The
    browser of the tests is told the same by an option."""
    with pytest.MonkeyPatch.context() as patch:
        if not ice.get_host_addresses(use_ipv4=True, use_ipv6=True):
            patch.setattr(ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
        yield


@pytest.fixture(scope="module")
def microphone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speech of 2 s, silence of 2 s, and so on."""
    rate_hz = 48_000
    pcm = np.concatenate([speech(2.0, rate_hz), np.zeros((2 * rate_hz, 1), np.float32)])
    return write_wav(tmp_path_factory.mktemp("page") / "microphone.wav", pcm, rate_hz)


@pytest.fixture(scope="module")
def browser(microphone: Path) -> Iterator[Browser]:
    """Which hears that."""
    with browsing(microphone) as found:
        yield found
