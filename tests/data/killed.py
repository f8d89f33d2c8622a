"""A worker's task that ends the worker: light to import, since the worker does."""

import os
import signal


def killed(_):
    os.kill(os.getpid(), signal.SIGKILL)
