"""An engine for each file, and nothing left behind: as for sessions."""

from tests.session.conftest import engine, nothing_is_left

__all__ = ["engine", "nothing_is_left"]
