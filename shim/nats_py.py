"""What this package relies on in nats-py beyond its documented names, and a look at import whether the installed one has it."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from importlib import metadata
from types import ModuleType
from typing import Any

_logger = logging.getLogger("insane_nats")

TESTED = (2, 16)  # minor version; pyproject.toml asks for the same
UNKNOWN = "of an unknown version"
WAY_OUT = "pip install 'nats-py>=2.16,<2.17'"

# Without these nothing can be imported.
NAMES: Mapping[str, tuple[str, ...]] = {
    "nats.errors": ("BadHeaderError", "ServerNotInPoolError"),
    "nats.aio.client": ("NO_RESPONDERS_STATUS", "Server", "Srv", "_validate_queue", "_validate_subject"),
    "nats.aio.errors": ("ErrStaleConnection",),
    "nats.aio.subscription": ("_SubscriptionMessageIterator",),
    "nats.aio.transport": ("TcpTransport",),
}

# Methods that are overridden, or called with these arguments.
PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "nats.aio.client.Client": {
        "_attempt_reconnect": "self",
        "_build_message": "self sid subject reply data headers",
        "_close": "self status do_cbs",
        "_connect_command": "self",
        "_connect_to_server": "self s",
        "_flush_pending": "self force_flush",
        "_init_request_sub": "self",
        "_parse_header_lines": "raw",
        "_ping_interval": "self",
        "_process_connect_init": "self",
        "_process_disconnect": "self",
        "_process_err": "self err_msg",
        "_process_info": "self info initial_connection",
        "_process_msg": "self sid subject reply data headers",
        "_process_op_err": "self e",
        "_remove_sub": "self sid max_msgs",
        "_request_new_style": "self subject payload timeout headers",
        "_request_sub_callback": "self msg",
        "_select_next_server": "self",
        "_send_ping": "self future",
        "_send_subscribe": "self sub",
        "_send_unsubscribe": "self sid limit",
        "_setup_server_pool": "self connect_url",
        "drain": "self",
        "flush": "self timeout",
        "force_reconnect": "self",
        "jetstream": "self opts",
        "publish": "self subject payload reply headers",
        "request": "self subject payload timeout old_style headers",
        "rtt": "self timeout",
        "subscribe": "self subject queue cb future max_msgs pending_msgs_limit pending_bytes_limit",
    },
    "nats.aio.subscription.Subscription": {
        "__init__": "self conn id subject queue cb future max_msgs pending_msgs_limit pending_bytes_limit",
        "_drain": "self",
        "_start": "self error_cb",
        "_stop_processing": "self",
        "_wait_for_msgs": "self error_cb",
        "drain": "self",
        "next_msg": "self timeout",
        "unsubscribe": "self limit",
    },
    "nats.js.client.JetStreamContext": {
        "_handle_async_reply": "self msg",
        "publish": "self subject payload timeout stream headers msg_ttl",
    },
}

# What an object has when it was made. A Subscription's are all set by ours, so one more in nats-py's counts as well.
CLIENT = (
    "_auth_configured _client_id _client_ip _closed_cb _current_server _disconnected_cb _err _error_cb _inbox_prefix "
    "_lame_duck_mode_cb _max_payload _max_pending_size _nuid _ping_interval_task _pings_outstanding _pongs_received "
    "_reconnect_to_server_handler "
    "_reconnected_cb _reconnection_task _reconnection_task_future _resp_map _resp_sub_prefix _server_info _server_pool _sid "
    "_skip_subject_validation _status _subs _transport options stats"
)
SUBSCRIPTION = (
    "_cb _closed _conn _future _id _jsi _max_msgs _message_iterator _pending_bytes_limit _pending_msgs_limit "
    "_pending_next_msgs_calls _pending_queue _pending_size _queue _received _subject _wait_for_msgs_task"
)
MESSAGE = "_client subject reply data headers _metadata _ackd _sid"


def check() -> None:
    """ImportError when a name is missing that is imported; one warning when anything else is not as it was tested."""
    version = installed()
    for path, names in NAMES.items():
        module = importlib.import_module(path)
        missing = [f"{path}.{name}" for name in names if not hasattr(module, name)]
        if missing:
            raise ImportError(f"insane_nats cannot work with nats-py {version}, which lacks {', '.join(missing)}: {WAY_OUT}")
    found = list(differences())
    if found:
        _logger.warning(
            "nats-py %s is not what insane_nats was tested with (2.16): %s. If anything fails: %s",
            version, "; ".join(found), WAY_OUT,
        )  # fmt: skip
    elif version_of(version) != TESTED and version != UNKNOWN:
        _logger.warning(
            "nats-py %s is installed, and insane_nats was tested with 2.16. It has what is relied on; if anything fails: %s",
            version, WAY_OUT,
        )  # fmt: skip


def installed() -> str:
    """Its version, where it lies with its metadata."""
    try:
        return metadata.version("nats-py")
    except metadata.PackageNotFoundError:
        return UNKNOWN


def version_of(text: str) -> tuple[int, ...]:
    """Major and minor number; what is no number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in text.split(".")[:2])


def differences() -> Iterator[str]:
    """In words, how the installed nats-py differs from what is relied on."""
    for path, methods in PARAMETERS.items():
        module, _, kind = path.rpartition(".")
        owner = getattr(importlib.import_module(module), kind, None)
        for name, expected in methods.items():
            there = getattr(owner, name, None)
            if there is None:
                yield f"{path}.{name} is missing"
            elif parameters(there) != expected:
                yield f"{path}.{name} takes ({parameters(there)}), not ({expected})"
    client = importlib.import_module("nats.aio.client")
    yield from _missing("Client", _made(client, "Client"), CLIENT)
    subscription = _made(importlib.import_module("nats.aio.subscription"), "Subscription", None)
    yield from _missing("Subscription", subscription, SUBSCRIPTION)
    for name in sorted(set(subscription) - set(SUBSCRIPTION.split())):
        yield f"Subscription has {name}, which is new"
    yield from _missing("Msg", _made(importlib.import_module("nats.aio.msg"), "Msg", None), MESSAGE)


def parameters(function: Any) -> str:
    """The names of its parameters in their order."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return " ".join(inspect.signature(function).parameters)
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return " ".join(code.co_varnames[:count])


def _made(module: ModuleType, kind: str, *arguments: object) -> dict[str, object]:
    try:
        made: dict[str, object] = vars(getattr(module, kind)(*arguments))
        return made
    except (AttributeError, TypeError):
        return {}


def _missing(kind: str, attributes: Mapping[str, object], expected: str) -> Iterator[str]:
    for name in expected.split():
        if name not in attributes:
            yield f"{kind} has no {name}"
