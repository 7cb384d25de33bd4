"""Harness: trainings that can be sent to other processes, whose outcome is linear in the data."""

import os
import signal

import numpy as np

N, Q = 24, 3
# [Q,N]: how much each sequence lowers each query's measurement.
LINEAR = np.random.default_rng(7).standard_normal((Q, N))
DATA = [{"input_ids": [i, i + 1, i + 2]} for i in range(N)]
QUESTIONS = [{"input_ids": [q, 5, q + 1], "labels": [-100, 5, q + 1]} for q in range(Q)]


def trained(indices, seed):
    """The model: what is measured of it."""
    return 7 - LINEAR[:, indices].sum(1) / N


def measured(model):
    """[Q]"""
    return model


class Counting:
    """`trained`, until it has been called so many times."""

    def __init__(self, after, then):
        self.left, self.then = after, then

    def __call__(self, indices, seed):
        if not self.left:
            self.then()
        self.left -= 1
        return trained(indices, seed)


def killed(after):
    """Ends its process."""
    return Counting(after, lambda: os.kill(os.getpid(), signal.SIGKILL))


def bank(folder, train=trained, measure=measured, **settings):
    """Of 24 random halves. Other processes need nothing but the functions above."""
    from ekfac_fast.validation import retrain

    return retrain(folder, train, DATA, QUESTIONS, **{"measure": measure, "subsets": 24} | settings)
