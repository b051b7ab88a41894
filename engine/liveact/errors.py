"""The exceptions of the package. Every message is one line: what was expected, what was found."""


class LiveActError(Exception):
    """Base class of everything this package raises on purpose."""


class InputError(LiveActError, ValueError):
    """Input that cannot be used: a file, a tensor, a size, a flag. The CLI exits with code 2."""


class SessionError(LiveActError, RuntimeError):
    """A session that failed or was closed; `__cause__` holds the first error of its workers."""


class BacklogFull(LiveActError, RuntimeError):
    """More audio than a session holds; what was not taken may be pushed again later."""


class DeviceError(LiveActError, RuntimeError):
    """A device that is asked for but not usable here (no driver, no such index, no memory)."""
