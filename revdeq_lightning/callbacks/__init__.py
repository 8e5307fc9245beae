"""Callbacks that watch the equilibrium and what it costs, one a file."""

from typing import TYPE_CHECKING

from revdeq_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from revdeq_lightning.callbacks.config import DiagnosticsConfig as DiagnosticsConfig
    from revdeq_lightning.callbacks.contraction import (
        Contraction as Contraction,
        ContractionWarning as ContractionWarning,
    )
    from revdeq_lightning.callbacks.cost import Cost as Cost
    from revdeq_lightning.callbacks.depth_jitter import DepthJitter as DepthJitter
    from revdeq_lightning.callbacks.depth_sweep import DepthSweep as DepthSweep
    from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations as FunctionEvaluations
    from revdeq_lightning.callbacks.gradient_error import GradientError as GradientError
    from revdeq_lightning.callbacks.reconstruction_certificate import (
        ReconstructionCertificate as ReconstructionCertificate,
    )
    from revdeq_lightning.callbacks.residual_curve import ResidualCurve as ResidualCurve
    from revdeq_lightning.callbacks.samples import ImageSamples as ImageSamples, TextSamples as TextSamples

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
