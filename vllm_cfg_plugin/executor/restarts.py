"""How often ranks may be started anew before the engine gives up. Pure."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from vllm_cfg_plugin.errors import RankDiedError

WINDOW_SECONDS = 600.0


class RestartLimit:
    """Counts the restarts of the last ten minutes.

    Args:
        most: restarts within that time.
        clock: seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._at: deque[float] = deque()

    def note(self, why: RankDiedError) -> None:
        """One more restart is due.

        Raises:
            RankDiedError: there were too many.
        """
        now = self._clock()
        while self._at and now - self._at[0] > WINDOW_SECONDS:
            self._at.popleft()
        if len(self._at) >= self._most:
            raise RankDiedError(
                f"{why}; cfg_max_restarts={self._most} allows no further start of the cfg ranks within "
                f"{WINDOW_SECONDS / 60:.0f} minutes: the engine ends"
            ) from None  # whose words are in these
        self._at.append(now)
