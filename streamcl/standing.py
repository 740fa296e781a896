"""A shard that has stopped: held, and brought to the end of what was logged, so that it can be changed from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from streamcl.config import Config, ConfigError
from streamcl.group.manifest import refuse_group
from streamcl.protocols import StreamclError
from streamcl.recovery import Keeper, holds, store_of
from streamcl.worker import build


@contextlib.contextmanager
def standing(config: Config, accept_changes: bool = False) -> Iterator[Keeper]:
    """Yields the keeper of a worker that has taken all that was taken, and takes nothing more.

    It is a recovery that stops where the log ends: the shard is claimed, a frozen predecessor fenced, and at-least-once
    delivery sends what may be missing. Nothing is saved: the caller does, or the next start does all of this again.

    Raises:
        Held: a worker of the shard lives.
        StreamclError: there is no checkpoint; or it is not that of a clean stop, and no control log says what followed.
    """
    with contextlib.closing(build(config)) as worker:
        keeper = Keeper(worker, store_of(config), accept_changes, beside=False)
        try:
            if not holds(keeper.store):
                raise StreamclError(f"{keeper.store.folder}: there is no checkpoint")
            restored = keeper.restore()
            if restored:
                refuse_group(restored)
            if restored and worker.control is None and not (restored.manifest["clean"] or accept_changes):
                raise ConfigError(
                    f"{keeper.store.folder}: the newest checkpoint is not that of a clean stop, and without a control "
                    "log nobody knows what was answered since: start the worker and stop it with SIGTERM, or pass "
                    "--accept-changes: what follows the checkpoint is then answered again, by another model"
                )
            keeper.catch_up()
            yield keeper
        finally:
            keeper.close()
