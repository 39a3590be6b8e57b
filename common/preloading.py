"""The first that a fork server imports: signals, so that it ends when it should and only then."""

import ctypes
import gc
import os
import signal
import sys

# Deaf to Ctrl-C as long as it imports (its parent hears it); afterwards multiprocessing sees to that, and to its ranks.
before = signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked by common.warm, so that none comes earlier
if sys.platform == "linux":
    # It would notice its parent's end only when all is imported, seconds later (PR_SET_PDEATHSIG, prctl(2); forks lose it).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getsid(os.getppid()) != os.getsid(0):  # it has ended already: whoever adopted this process is of another session
        sys.exit()
gc.disable()  # as common.training does
