"What runs and tests set for their whole process."

import logging
import os
import random
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def process_settings():
    "Return pairs: the value of a setting, and a function that sets it."
    logger, cudnn = logging.getLogger("crackseg_nb"), torch.backends.cudnn
    memory = torch.utils.deterministic
    return [
        (torch.are_deterministic_algorithms_enabled(), torch.use_deterministic_algorithms),
        (cudnn.benchmark, partial(setattr, cudnn, "benchmark")),
        (cudnn.deterministic, partial(setattr, cudnn, "deterministic")),
        (memory.fill_uninitialized_memory, partial(setattr, memory, "fill_uninitialized_memory")),
        (torch.get_default_dtype(), torch.set_default_dtype),
        (torch.get_num_threads(), torch.set_num_threads),
        (cv2.getNumThreads(), cv2.setNumThreads),
        (logger.level, logger.setLevel),
        (logger.propagate, partial(setattr, logger, "propagate")),
        (list(logger.handlers), partial(setattr, logger, "handlers")),
        (Path.cwd(), os.chdir),
        *((signal.getsignal(each), partial(signal.signal, each)) for each in SIGNALS),
    ]


@contextmanager
def clean_process():
    "Begin with fixed random states; at the end every setting is as it was before, and no figure is open."
    before, environment = process_settings(), dict(os.environ)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    try:
        with matplotlib.rc_context():
            yield
    finally:
        plt.close("all")
        for value, restore in before:
            restore(value)
        os.environ.clear()
        os.environ.update(environment)
