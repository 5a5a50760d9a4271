"""What a file of tests leaves in its process is gone when the next one begins."""

import logging
import os
import random
import signal

import cv2
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from process import clean_process, process_settings

from crackseg_nb.core.seeds import seed_everything


def settings():
    values = [value for value, _ in process_settings()]
    return [*values, dict(os.environ), matplotlib.rcParams["font.size"], plt.get_fignums()]


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_everything_is_as_before(tmp_path):
    before = settings()
    with clean_process():
        drawn = draw()
        seed_everything(3)
        torch.backends.cudnn.benchmark = True
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        cv2.setNumThreads(cv2.getNumThreads() + 1)
        logging.getLogger("crackseg_nb").setLevel(logging.ERROR)
        logging.getLogger("crackseg_nb").propagate ^= True
        logging.getLogger("crackseg_nb").addHandler(logging.NullHandler())
        os.chdir(tmp_path)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
        os.environ["CRACKSEG_LEFT"] = "behind"
        matplotlib.rcParams["font.size"] = 77
        plt.figure()
        assert all(found != old for found, old in zip(settings(), before, strict=True))
    assert settings() == before
    with clean_process():
        assert draw() == drawn
