"""The one tree of expected failures.

Owns the names of failures that a caller can meet; knows nothing of HTTP, sockets or models.

    SeallmdError
    +-- ConfigError          the configuration file is wrong (file and line in the message)
    +-- RequestError         a request cannot be served; `code` is OpenAI's word, `status` the HTTP status
    +-- ControlError         an operator's command cannot be carried out
    +-- Unreachable          the daemon does not answer on its control socket
    +-- ModelRefused         a model cannot be served correctly, with the reason

Broken invariants are not in this tree: they raise AssertionError (`check()`) or RuntimeError at once.
"""

from __future__ import annotations


class SeallmdError(Exception):
    """An expected failure. `str(error)` is one line in the caller's terms."""


class ConfigError(SeallmdError):
    """The configuration cannot be used. The message starts with `file:line:` where a line is known."""


class RequestError(SeallmdError):
    """A request that cannot be served.

    status: HTTP status (400, 404, 503, ...). code: OpenAI's error code or None. param: the field at fault.
    retry_after: seconds after which trying again makes sense; None when it does not.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after


class ControlError(SeallmdError):
    """An operator's command that cannot be carried out (unknown name, wrong state)."""


class Unreachable(SeallmdError):
    """No daemon answers on the control socket."""


class ModelRefused(SeallmdError):
    """A model that cannot be served correctly; the message says why."""
