"""Call a function in a thread that does not keep the program from ending."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def start(action: Callable[[], Any]) -> Future:
    """Return a Future of action(), which runs in a daemon thread."""
    done = Future()

    def act() -> None:
        try:
            done.set_result(action())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    return done
