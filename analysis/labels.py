"""What a reader calls a series: a short and a long name, its unit in words, and what a rise or a fall of it means.

The key of a series (`watch/variable[layer=1, head=3]`) is for code and tables of data; people read these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr


@dataclass(frozen=True)
class Label:
    """`short` for a figure or a clause, `long` for a caption, `unit` in words, and what the model does when the series
    rises or falls ("learns induction"); empty where that has no name. Of two changes the one of lower `rank` names the
    transition."""

    short: str
    long: str
    unit: str = ""
    rises: str = ""
    falls: str = ""
    rank: int = 99


def _of(short: str, long: str, unit: str = "", rises: str = "", falls: str = "") -> Label:
    return Label(short, long, unit, rises, falls)


# By class of instrument and variable, in the order in which they name a transition: the most telling first.
KNOWN: dict[tuple[str, str], Label] = {
    ("InductionHeads", "prefix_matching"): _of(
        "induction", "attention to the token after the last occurrence", "of its attention", "learns induction",
        "loses induction"),
    ("RepeatGain", "gain"): _of(
        "gain on repeats", "loss on random tokens less that on their repetition", "nats per token",
        "learns to continue what it has seen before", "no longer continues what it has seen before"),
    ("FuzzyInduction", "matching"): _of(
        "fuzzy induction", "attention to the token after a similar one", "of its attention", "learns fuzzy induction"),
    ("FuzzyInduction", "gain"): _of(
        "gain on similar tokens", "loss less that after a similar token was seen", "nats per token",
        "learns to continue what it has seen in similar words"),
    ("AbstractInduction", "matching"): _of(
        "abstract induction", "attention to the token after an equivalent one", "of its attention",
        "learns abstract induction"),
    ("HierarchicalInduction", "matching"): _of(
        "hierarchical induction", "attention to the place after the last like group", "of its attention",
        "learns hierarchical induction"),
    ("FunctionVectorHeads", "gain"): _of(
        "function vector", "gain of the answer when the mean of the heads is put in", "nats", "forms function vectors"),
    ("FunctionVectorHeads", "logit_effect"): _of(
        "function-vector head", "effect of a head's mean on the answer", "logits", "forms function-vector heads"),
    ("Evaluation", "accuracy"): _of("accuracy", "share of right answers", "", "learns the task"),
    ("FewShot", "score"): _of(
        "few-shot score", "loss on the last example less that on the first", "nats", "", "learns from examples"),
    ("FewShot", "map_gain"): _of(
        "few-shot gain", "loss under a wrong map less that under the right one", "nats", "learns a task from examples"),
    ("InContextLearning", "icl_score"): _of(
        "in-context score", "loss late in the context less that early", "nats per token", "", "learns in context"),
    ("InContextLearning", "far_context"): _of(
        "use of far context", "loss with a short context less that with a long one", "nats per token",
        "learns to use far context"),
    ("InContextLearning", "loss"): _of("loss in context", "next-token loss", "nats per token"),
    ("RestrictedLoss", "test_loss"): _of(
        "test loss", "loss on held-out pairs", "nats", "", "generalises (grokking)"),
    ("RestrictedLoss", "restricted_loss"): _of(
        "restricted loss", "loss of the key frequencies alone", "nats", "", "solves the task by its key frequencies"),
    ("RestrictedLoss", "excluded_loss"): _of(
        "excluded loss", "training loss without the key frequencies", "nats", "comes to rest on the key frequencies"),
    ("RestrictedLoss", "train_loss"): _of("training loss", "loss on training pairs", "nats", "", "fits its data"),
    ("FourierSpectrum", "gini"): _of(
        "Fourier sparsity", "how few frequencies carry the weights (Gini)", "", "comes to use few frequencies"),
    ("PreviousTokenHeads", "previous_token"): _of(
        "previous-token attention", "attention to the token before", "of its attention", "forms a previous-token head"),
    ("NgramStages", "kl"): _of(
        "distance from n-grams", "divergence of the model from n-gram statistics", "nats per token",
        "leaves n-gram statistics", "learns n-gram statistics"),
    ("NgramStages", "loss_ratio"): _of("loss over n-gram loss", "loss as a ratio to that of the n-gram", "ratio"),
    ("NgramStages", "common_ratio"): _of("loss on common n-grams", "loss on common n-grams over that on all", "ratio"),
    ("GrammarExcess", "excess"): _of(
        "excess over the grammar", "divergence from the exact law of the language", "nats per token", "",
        "learns the grammar"),
    ("GrammarExcess", "impossible"): _of(
        "impossible mass", "probability of tokens that cannot come", "", "", "learns what cannot come"),
    ("StructuralProbe", "uuas"): _of(
        "tree in the states", "edges of the tree that distances of states give", "",
        "comes to hold the tree in its distances"),
    ("StructuralProbe", "spearman"): _of(
        "distances as in the tree", "rank correlation of distances of states with those in the tree", ""),
    ("TreeStructure", "structure"): _of(
        "tree-structuredness", "independence of spans at the best split above the mean split", "",
        "comes to compose spans as a tree"),
    ("TreeStructure", "f1"): _of(
        "brackets found", "brackets of the model's own tree against the true ones", "",
        "comes to compose as the grammar does"),
    ("BracketClosing", "closing"): _of(
        "right bracket closed", "probability of the right closer among all closers", "",
        "comes to remember which bracket is open", "forgets which bracket is open"),
    ("BoundaryAttention", "boundary"): _of(
        "attention between span ends", "attention from span ends to span ends, above that over the distance",
        "of its attention", "comes to look from one end of a span to another"),
    ("AttachmentHeads", "attachment"): _of(
        "attachment by attention", "tokens whose head of attention finds what they depend on", "",
        "comes to link tokens by what depends on what"),
    ("AttentionSinks", "first"): _of(
        "attention sink", "attention to the first token", "of its attention", "rests on the first token"),
    ("AttentionSinks", "high_norm"): _of(
        "states of a huge norm", "places of a norm above five medians", "", "forms massive activations"),
    ("AttentionSinks", "largest"): _of(
        "largest norm of a state", "largest norm of a sequence over the median", "", "forms massive activations"),
    ("AttentionContacts", "precision"): _of(
        "contacts in attention", "contacts among the pairs of highest attention", "", "learns which places touch"),
    ("AttentionDistance", "distance"): _of(
        "attention distance", "distance that a head looks over", "places", "looks farther", "looks nearer"),
    ("PairedEmbeddings", "gap"): _of(
        "modality gap", "distance between the means of two modalities", "", "parts its modalities",
        "brings its modalities together"),
    ("PairedEmbeddings", "alignment"): _of(
        "alignment of pairs", "squared distance of embeddings of pairs", "", "", "aligns what belongs together"),
    ("PairedEmbeddings", "uniformity_first"): _of(
        "uniformity", "log potential of embeddings", "nats", "crowds its embeddings", "spreads its embeddings evenly"),
    ("PairedEmbeddings", "recall"): _of("recall of pairs", "pairs nearest of all", "", "learns to match pairs"),
    ("Negation", "sensitivity"): _of(
        "sensitivity to negation", "logit difference that the negation makes", "logits", "learns to read negation"),
    ("Negation", "accuracy_negated"): _of(
        "negation obeyed", "negated prompts with the complement ahead", "", "learns to obey negation"),
    ("NeuralCollapse", "nc1"): _of(
        "spread within classes", "spread within classes over that between them", "", "", "collapses to class means"),
    ("NeuralCollapse", "simplex"): _of(
        "distance from a simplex", "distance of the class means from a simplex", "", "", "spreads its classes evenly"),
    ("NeuralCollapse", "duality"): _of(
        "distance of classifier and means", "distance of the classifier from the class means", "", "",
        "aligns classifier and class means"),
    ("MarkovReferences", "distance"): _of(
        "distance to a solution", "divergence from a known predictor of the chain", "nats per token",
        "leaves a known solution", "comes to a known solution"),
    ("RegressionReferences", "distance"): _of(
        "distance to a solution", "squared distance from a known predictor", "squared error per dim",
        "leaves a known solution", "comes to a known solution"),
    ("MarkovReferences", "regret"): _of(
        "regret to a solution", "loss less that of a known predictor", "nats per token"),
    ("RegressionReferences", "regret"): _of(
        "regret to a solution", "error less that of a known predictor", "squared error"),
    ("Circuit", "area"): _of(
        "circuit's faithfulness", "area under faithfulness over circuit size", "",
        "concentrates the task in a circuit"),
    ("Circuit", "signal"): _of(
        "signal of the task", "score on clean less corrupt prompts", "logits", "learns the task"),
    ("Interchange", "iia"): _of(
        "interchange accuracy", "outputs as the algorithm says with its variable exchanged", "",
        "comes to hold the variable of the algorithm"),
    ("Interchange", "difference"): _of(
        "effect of an exchange", "changed label less its own when the variable is exchanged", "logits",
        "comes to be moved by the variable of the algorithm"),
    ("ActivationPatching", "signal"): _of(
        "signal of the task", "score on clean less corrupt prompts", "logits", "learns the task"),
    ("ActivationPatching", "z_restored"): _of(
        "restored by one head", "share of the signal that patching a head restores", ""),
    ("HeadAblation", "gain_share"): _of(
        "gain carried by found heads", "share of the gain on repeats lost without the heads found", "",
        "comes to rely on few heads"),
    ("HeadAblation", "excess_loss"): _of(
        "loss without found heads", "rise of the loss without the heads found", "nats per token"),
    ("HeadSpectra", "matching"): _of("matching by weights", "positive share of the QK eigenvalues", "score"),
    ("HeadSpectra", "copying"): _of("copying by weights", "positive share of the OV eigenvalues", "score"),
    ("HeadSpectra", "copy_z"): _of("copying against random weights", "OV trace against random weights", "sd"),
    ("CopyingHeads", "copying"): _of("copying", "how much a head raises the token that it attends to", "score"),
    ("CopyingHeads", "rank"): _of("copying rank", "rank of the attended token among candidates", ""),
    ("Composition", "max"): _of("composition", "how much a head reads what an earlier one wrote", "above random"),
    ("Composition", "pair"): _of("composition of the pair", "how much one head reads another", "above random"),
    ("FeatureCircuit", "area"): _of(
        "feature circuit", "share of the effect in the first features", "mean over counts",
        "gathers the effect in few features"),
    ("FeatureCircuit", "signal"): _of(
        "features' effect", "logit difference with all features less that with none", "logits", "learns the task"),
    ("SparseAutoencoder", "fvu"): _of("unexplained by the dictionary", "fraction of variance unexplained", ""),
    ("SparseAutoencoder", "l0"): _of("latents in use", "mean number of latents that are on", "latents"),
    ("SparseAutoencoder", "loss_recovered_zero"): _of(
        "loss recovered", "loss recovered by the dictionary against zero ablation", ""),
    ("DictionaryQuality", "fvu"): _of("unexplained by the dictionary", "fraction of variance unexplained", ""),
    ("DictionaryQuality", "l0"): _of("latents in use", "mean number of latents that are on", "latents"),
    ("DictionaryQuality", "loss_recovered_zero"): _of(
        "loss recovered", "loss recovered by the dictionary against zero ablation", ""),
    ("FeatureLens", "mean_kurtosis"): _of("focus of latents on tokens", "mean kurtosis of latents' logits", ""),
    ("FeatureLens", "above"): _of("latents that name tokens", "share of latents with a kurtosis above the null", ""),
    ("SiteActivations", "norm"): _of("norm of the states", "mean norm of the activations", ""),
    ("Steering", "slope"): _of(
        "steering slope", "what a step along the direction adds to the answer", "nats per unit",
        "answers more to the direction", "answers less to the direction"),
    ("ConceptDirection", "auc"): _of(
        "concept direction", "held-out area under the curve of the direction", "",
        "comes to represent the concept by a direction"),
    ("Transcoder", "replacement_loss"): _of(
        "replacement loss", "loss added by transcoders in the place of MLPs", "nats per token"),
    ("Transcoder", "replacement"): _of(
        "replacement score", "influence of tokens over that of tokens and errors", "",
        "comes to be explained by the transcoders' features"),
    ("LinearProbe", "selectivity"): _of(
        "probe selectivity", "accuracy of a linear probe less that on random labels", "",
        "comes to represent the labels linearly"),
    ("LinearProbe", "accuracy"): _of(
        "probe accuracy", "accuracy of a linear probe", "", "makes the labels easier to read"),
    ("FrozenProbe", "accuracy"): _of(
        "accuracy of the reference's probe", "accuracy of a probe fitted on the reference", "",
        "comes to the code of the reference", "leaves the code of the reference"),
    ("FrozenProbe", "moved"): _of(
        "labels in another code", "accuracy of an own probe less that of the reference's", "",
        "changes its code", "keeps its code"),
    ("ProbeErasure", "loss_change"): _of(
        "use of the labels", "loss without what is linear of the labels, less the loss", "nats per token",
        "comes to use the labels", "no longer uses the labels"),
    ("MDLProbe", "compression"): _of(
        "probe compression", "code length of uniform labels over that by the probe", "ratio",
        "makes the labels easier to learn from its states"),
    ("MDLProbe", "selectivity"): _of("probe selectivity (code length)", "compression less that of random labels", ""),
    ("LogitLens", "kl"): _of("logit lens", "divergence of the model from an early layer's prediction", "nats"),
    ("LogitLens", "prediction_depth"): _of("prediction depth", "layer from which the prediction stands", "layers"),
    ("LogitLens", "head_effect"): _of("direct effect of a head", "what a head adds to the right logit", "logits"),
    ("TunedLens", "kl"): _of("tuned lens", "divergence of the model from a tuned early prediction", "nats"),
    ("TunedLens", "agreement"): _of("tuned lens' agreement", "places at which the early prediction stands", ""),
    ("TunedLens", "prediction_depth"): _of(
        "tuned prediction depth", "layer from which the prediction stands", "layers"),
    ("ResidualAttribution", "logit_difference"): _of(
        "logit difference", "right logit less the wrong one", "logits", "learns to tell right from wrong"),
    ("ResidualAttribution", "top_share"): _of("top component's share", "share of the largest component", ""),
    ("ResidualAttribution", "participation"): _of("components that take part", "participation ratio", "components"),
    ("ResidualAttribution", "linearity"): _of("linearity", "effect by the sum of the parts over the whole", ""),
    ("Superposition", "mean_dimensionality"): _of(
        "dimensions per feature", "mean dimensionality of features", "dimensions", "gives features room of their own",
        "packs features in superposition"),
    ("Superposition", "mean_interference"): _of("interference", "mean squared overlap of features", ""),
    ("Superposition", "directions"): _of("directions in use", "stable rank of the features", "dimensions"),
    ("Polysemanticity", "mean_entropy"): _of("entropy of top items", "entropy of the labels at a neuron's top", "nats"),
    ("Polysemanticity", "mean_purity"): _of(
        "purity of neurons", "share of one label among a neuron's top items", "", "forms purer neurons"),
    ("Polysemanticity", "mean_kurtosis"): _of("kurtosis of neurons", "excess kurtosis of activations", ""),
    ("IntrinsicDimension", "two_nn"): _of("dimension (two-NN)", "intrinsic dimension of the states", "dimensions"),
    ("IntrinsicDimension", "participation"): _of("dimension (participation)", "participation ratio", "dimensions"),
    ("Sketch", "spread"): _of("spread of states", "mean distance of the states from their mean", ""),
    ("Sketch", "output_spread"): _of("spread of outputs", "mean distance of the outputs from their mean", ""),
    ("LayerRoles", "drop_layer"): _of("layer that can be left out", "rise of the loss without it", "nats"),
    ("LayerRoles", "centre_layer"): _of("centre of gravity", "layer at which the work is centred", "layers"),
    ("SoftEntropy", "past"): _of(
        "information on the past", "what directions of states hold of the token, above shuffled labels", "",
        "holds more of its tokens", "forgets its tokens"),
    ("SoftEntropy", "future"): _of(
        "information on the future", "what directions of states hold of the next token, above shuffled labels", "",
        "comes to hold what follows"),
    ("SoftEntropy", "entropy"): _of(
        "entropy of directions", "how evenly the directions of states are spread", "", "spreads its states",
        "compresses its states"),
    ("ModelCode", "bits"): _of(
        "model code", "fewest bits that say the weights within the loss", "bits", "grows more complex",
        "grows simpler"),
    ("WeightStatistics", "model_l2"): _of("norm of the weights", "Euclidean norm of all weights", ""),
    ("WeightStatistics", "mean_spectral"): _of("spectral norm", "mean largest singular value", ""),
    ("WeightStatistics", "density"): _of("density of the weights", "‖w‖₁² over n ‖w‖₂²", ""),
    ("ReferenceDrift", "kl"): _of(
        "distance from the model before", "divergence of the model's predictions from those before", "nats per token",
        "moves away from the model before"),
    ("ReferenceDrift", "loss_change"): _of(
        "forgetting", "loss on general text less that of the model before", "nats per token",
        "forgets general text"),
    ("Susceptibilities", "mean"): _of("susceptibility", "response of a component to a shift of the data", ""),
    ("BayesianInfluence", "mean"): _of("influence", "covariance of losses over draws", ""),
    ("ProbeLoss", "icl_score"): _of(
        "in-context score", "loss late in the text less that early", "nats per token", "",
        "learns in context"),
    ("ProbeLoss", "loss"): _of("loss", "next-token loss", "nats per token", "", "improves its predictions"),
    ("IntermediateSteps", "bridge"): _of(
        "intermediate step", "reciprocal rank of the unsaid step in the lens", "", "comes to the step between"),
    ("IntermediateSteps", "answer"): _of(
        "answer in two steps", "reciprocal rank of the answer in the lens", "", "learns to answer in two steps"),
    ("TokenLoss", "loss"): _of("loss", "next-token loss", "nats per token", "", "improves its predictions"),
    ("LLC", "llc"): _of("λ̂", "local learning coefficient", "", "grows more complex", "grows simpler"),
    ("RestrictedLLC", "llc"): _of("λ̂", "local learning coefficient", "", "grows more complex", "grows simpler"),
}  # fmt: skip
KNOWN = {key: replace(label, rank=rank) for rank, (key, label) in enumerate(KNOWN.items())}


def label_of(watch: str, dataset: xr.Dataset, variable: str, element: str = "") -> Label:
    """The label of a followed variable of a watch, or of its largest element ("max"), or of one of its elements.

    `element` is "max" or e.g. "layer=1, head=3". A variable that is not in the table goes by its `long_name`, else by
    its own name beside that of its watch.
    """
    kind = str(dataset.attrs.get("instrument", "")).rpartition(".")[2]
    array = dataset.get(variable)
    attrs: Mapping[str, Any] = {} if array is None else array.attrs
    label = KNOWN.get((kind, variable))
    if label is None:
        words = _spaced(variable)
        short = words if _spaced(watch) in (words, "") else f"{_spaced(watch)}: {words}"
        long = str(attrs.get("long_name", "")) or short
        label = Label(short, long, "" if attrs.get("units") in (None, "1", "share") else str(attrs["units"]))
    elif attrs.get("units") in ("nats", "bits", "logits"):  # of another task than the table's
        label = replace(label, unit=str(attrs["units"]))
    return _of_element(label, [] if array is None else list(map(str, array.dims)), element)


def distinct(labels: Mapping[str, Label]) -> dict[str, Label]:
    """Labels by the keys of series: those of one short name have the watch beside it."""
    counts: dict[str, int] = {}
    for label in labels.values():
        counts[label.short] = counts.get(label.short, 0) + 1
    return {
        name: replace(label, short=_beside(label.short, _spaced(name.partition("/")[0])))
        if counts[label.short] > 1
        else label
        for name, label in labels.items()
    }


def _beside(short: str, watch: str) -> str:
    """A short name with the watch in its brackets."""
    return f"{short[:-1]}, {watch})" if short.endswith(")") else f"{short} ({watch})"


def _of_element(label: Label, dims: Sequence[str], element: str) -> Label:
    """The label of the largest element, or of the one at these coordinates."""
    if not element:
        return label
    if element == "max":
        inner = [dim for dim in dims if dim != "step"]
        part = _spaced(inner[-1]).removesuffix(" to").removesuffix(" from") if inner else "element"
        return replace(label, short=f"{label.short} (best {part})", long=f"best {part}: {label.long}")
    place = dict(pair.split("=", 1) for pair in element.split(", ") if "=" in pair)
    if set(place) == {"layer", "head"}:
        words = f"head {place['layer']}.{place['head']}"
    else:
        words = ", ".join(f"{_spaced(dim)} {value}" for dim, value in place.items()) or element
    return replace(label, short=f"{label.short} ({words})", long=f"{words}: {label.long}")


def _spaced(name: str) -> str:
    return name.replace("_", " ").strip()
