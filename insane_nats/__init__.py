"""NATS for Python programs, without a NATS server: `import insane_nats as nats`.

The names of nats-py; messages travel through this host's shared memory where there is an insane_nats node at the URL, or
nobody at an address of this host, and by nats-py's own transport where there is a NATS server.
"""

from __future__ import annotations

from pkgutil import extend_path
from typing import Any

__path__ = extend_path(__path__, __name__)  # the compiled parts lie in the installed package

from insane_nats.shim import nats_py

nats_py.check()  # says what does not fit before anything fails over it

from insane_nats import aio, errors, js, nuid, protocol  # noqa: E402
from insane_nats.aio.client import Client as NATS  # noqa: E402
from insane_nats.shim.qos import QoS  # noqa: E402

__version__ = "0.1.0"
__all__ = ["NATS", "QoS", "aio", "connect", "errors", "js", "nuid", "protocol"]


async def connect(servers: str | list[str] = "nats://localhost:4222", **options: Any) -> NATS:
    """Connects, with the options of nats-py's connect() and

    qos: policies of what is published: a QoS, a dict, or a text like "consumption=low,datapath=fast".
    write_deadline: seconds that publish() waits for a subscriber that has no room.

    Raises nats.errors.NoServersError, whose text names the way out, when there is nothing to connect to.
    """
    client = NATS()
    await client.connect(servers, **options)
    return client
