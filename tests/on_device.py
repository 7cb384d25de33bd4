"""Harness of `pytest --device cuda`: the driver's tests, with their models on a GPU.

A model goes there when a stage gets it and comes back when the stage ends, so that a test's own
references, in fp64 and by autograd, stay where they are. kronfluence works there, too.
"""

import functools
import importlib
from importlib.util import find_spec

import dense_ekfac
from torch import nn

# Every public function that passes a model over data, by module.
STAGES = {
    "stages.fit": ("fit",),
    "stages.preparation": ("prepare_queries",),
    "stages.scan": ("score", "self_scores"),
    "stages.attribution": ("attribute_tokens",),
    "stages.references": ("referenced",),
    "validation.baselines": ("gradient_dot",),
}


def send_to(device: str) -> None:
    """Whatever is imported from here on has its models on `device` while a stage runs."""
    for name, functions in STAGES.items():
        module = importlib.import_module(f"ekfac_fast.{name}")
        for function in functions:
            setattr(module, function, there(getattr(module, function), device))
    dense_ekfac.close = _nearly(dense_ekfac.close)
    if find_spec("kronfluence") is not None:
        analyzer = importlib.import_module("kronfluence.analyzer").Analyzer
        analyzer.__init__ = _not_on_the_cpu(analyzer.__init__)


def there(stage, device):
    """`stage`, its model on `device` until it returns; parameters stay the same objects."""

    @functools.wraps(stage)
    def run(model, *args, **options):
        away = isinstance(model, nn.Module) and {p.device.type for p in model.parameters()} == {
            "cpu"
        }
        if not away:
            return stage(model, *args, **options)
        model.to(device)
        try:
            return stage(model, *args, **options)
        finally:
            model.to("cpu")

    return run


def _nearly(close):
    """Sums are made in another order there."""
    return lambda got, expected, tolerance: close(got, expected, 3 * tolerance)


def _not_on_the_cpu(init):
    @functools.wraps(init)
    def anywhere(self, *args, cpu=False, **options):
        init(self, *args, cpu=False, **options)

    return anywhere
