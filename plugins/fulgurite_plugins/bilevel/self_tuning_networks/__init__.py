# SPDX-License-Identifier: Apache-2.0
"""MacKay, Vicol, Lorraine, Duvenaud, Grosse (2019), Self-Tuning Networks."""

from fulgurite.plugin import Component, Paper, Plugin

_TARGETS = {
    "criterion": {"LabelSmoothing": "The smoothing of the targets."},
    "dropout": {
        "Dropout": "The rates of dropout layers, by pattern of their names.",
        "EmbeddingDropout": "How often rows of an embedding are dropped.",
        "WeightDrop": "How often elements of a weight are dropped.",
    },
    "images": {
        "ColorJitter": "Hue, contrast, saturation or brightness of images.",
        "Cutout": "Length or number of the holes that are cut into images.",
    },
    "inputs": {
        "GaussianNoise": "Noise on the inputs.",
        "InputDropout": "How often elements of the inputs are dropped.",
        "InputFunction": "Any function of the inputs and a value per example.",
        "InputScale": "A random factor of each input.",
    },
    "interventions": {"InterventionWeight": "The weight of another plugin, such as the alpha of PSKD."},
    "penalties": {
        "ActivationPenalty": "The weight of a penalty on what layers return.",
        "TemporalActivationPenalty": "The weight of a penalty on how that changes in time.",
        "WeightDecay": "The decay of weights, by pattern of their names.",
    },
}

_LAYERS = (
    "HyperLinear",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperEmbedding",
    "HyperLSTMCell",
    "HyperGRUCell",
)

plugin = Plugin(
    name="self_tuning_networks",
    family="bilevel",
    summary="Tunes regularisation by gradient while the model trains once; the result is a schedule of hyperparameters.",
    paper=Paper(
        title="Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response Functions",
        authors=("Matthew MacKay", "Paul Vicol", "Jonathan Lorraine", "David Duvenaud", "Roger Grosse"),
        venue="ICLR",
        year=2019,
        identifier="arXiv:1903.03088",
        code="github.com/asteroidhouse/self-tuning-networks",
    ),
    components=(
        Component("SelfTuning", f"{__name__}.intervention:SelfTuning", "intervention", "The method, for any module."),
        Component(
            "ReplaySchedule",
            f"{__name__}.replay:ReplaySchedule",
            "intervention",
            "An ordinary training with a schedule that was found.",
        ),
        Component(
            "JitterSchedule", f"{__name__}.replay:JitterSchedule", "intervention", "A rival: fixed values with noise."
        ),
        Component(
            "SinusoidSchedule", f"{__name__}.replay:SinusoidSchedule", "intervention", "A rival: values that swing."
        ),
        Component("Hyper", f"{__name__}.hyperparameters:Hyper", "argument", "Declares a hyperparameter to be tuned."),
        *(
            Component(name, f"{__name__}.targets.{file}:{name}", "argument", summary)
            for file, targets in _TARGETS.items()
            for name, summary in targets.items()
        ),
        *(
            Component(name, f"{__name__}.layers:{name}", "module", f"`nn.{name.removeprefix('Hyper')}` with gates.")
            for name in _LAYERS
        ),
        Component("fuse_model", f"{__name__}.surgery:fuse_model", "function", "Plain layers at fixed hyperparameters."),
        Component("perturb", f"{__name__}.functional:perturb", "function", "Perturbed hyperparameters per example."),
        Component("gaussian_entropy", f"{__name__}.functional:gaussian_entropy", "function", "Entropy of the scales."),
        Component("ridge_gate", f"{__name__}.functional:ridge_gate", "function", "The exact best response of ridge."),
    ),
    capabilities=(
        "gates layers of the model (operate), which then has about twice the parameters; `fuse` gives plain layers back",
        "keeps a part of the training set for its validation steps, or tunes on data that it is given",
        "one forward pass and one backward pass for the inputs every second update",
        "refused under FSDP, ModelParallel, DeepSpeed and manual optimization",
    ),
    claim=f"{__name__}.claim:CLAIM",
    bench=f"{__name__}.bench:BENCH",
    conformance=f"{__name__}.conformance:CASES",
    card="CARD.md",
)

__getattr__, __dir__ = plugin.exports()
