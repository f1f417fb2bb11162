# SPDX-License-Identifier: Apache-2.0
"""Granziol, Zohren, Roberts (2022), Learning Rates as a Function of Batch Size."""

from fulgurite.plugin import Component, Paper, Plugin

_FUNCTIONS = {
    "slq_density": ("density", "The spectral density of an operator by stochastic Lanczos quadrature."),
    "hessian_variance": ("functional", "The noise of batch Hessians, from products with different batches."),
    "effective_batch_size": ("functional", "The batch size that drawing without replacement amounts to."),
    "predict_batch_extremes": ("functional", "Extreme eigenvalues of a batch Hessian: the additive noise model."),
    "predict_ggn_extremes": ("functional", "Outliers of a batch Gauss-Newton matrix: the multiplicative noise model."),
    "fit_excess": (
        "functional",
        "The law of a batch Hessian's largest eigenvalue, from measurements at two batch sizes.",
    ),
    "scale_learning_rate": ("functional", "A learning rate for another batch size."),
    "saturation_batch_size": ("functional", "The batch size from which a larger one no longer helps."),
    "heavy_ball_parameters": ("functional", "The optimal rate and momentum for a range of eigenvalues."),
    "rule_parameters": ("functional", "Rate and momentum that a rule of the learner gives for a range of eigenvalues."),
}

plugin = Plugin(
    name="batch_hessian_lr",
    family="curvature",
    summary="Spectra of batch Hessians; learning rates scaled with the batch size, or set on the fly.",
    paper=Paper(
        title="Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
        authors=("Diego Granziol", "Stefan Zohren", "Stephen Roberts"),
        venue="JMLR",
        year=2022,
        identifier="arXiv:2006.09092",
    ),
    components=(
        Component(
            "SLQLearningRate",
            f"{__name__}.intervention:SLQLearningRate",
            "intervention",
            "Rate and momentum from a few Lanczos steps per epoch.",
        ),
        Component(
            "BatchSizeLRScaling",
            f"{__name__}.scaling:BatchSizeLRScaling",
            "intervention",
            "A tuned rate, scaled to the batch size of this training.",
        ),
        Component(
            "HessianSpectrum",
            f"{__name__}.spectrum:HessianSpectrum",
            "intervention",
            "The spectral density during training, with a picture.",
        ),
        *(
            Component(name, f"{__name__}.{file}:{name}", "function", summary)
            for name, (file, summary) in _FUNCTIONS.items()
        ),
    ),
    capabilities=(
        "SLQLearningRate: some products with the Hessian of one batch per epoch; writes the optimizer's rates and momentum",
        "BatchSizeLRScaling: writes the optimizer's rates, once",
        "HessianSpectrum: changes nothing",
        "what measures is refused under FSDP, ModelParallel, DeepSpeed; SLQLearningRate under manual optimization",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
