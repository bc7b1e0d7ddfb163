"""Instruments: each a frozen dataclass that reads one thing off a snapshot of the weights."""

from devmon.instruments.attachment import AttachmentHeads
from devmon.instruments.attention_contacts import AttentionContacts
from devmon.instruments.attention_distance import AttentionDistance
from devmon.instruments.attention_sinks import AttentionSinks
from devmon.instruments.boundary_attention import BoundaryAttention
from devmon.instruments.bracket_closing import BracketClosing
from devmon.instruments.circuit import Circuit
from devmon.instruments.composition import Composition
from devmon.instruments.concept_direction import ConceptDirection
from devmon.instruments.copying import CopyingHeads
from devmon.instruments.curvature import Curvature
from devmon.instruments.dictionary_quality import DictionaryQuality
from devmon.instruments.evaluation import Evaluation
from devmon.instruments.feature_circuit import FeatureCircuit
from devmon.instruments.feature_lens import FeatureLens
from devmon.instruments.few_shot import FewShot
from devmon.instruments.fourier_spectrum import FourierSpectrum
from devmon.instruments.frozen_probe import FrozenProbe
from devmon.instruments.function_vectors import FunctionVectorHeads
from devmon.instruments.fuzzy_induction import AbstractInduction, FuzzyInduction, HierarchicalInduction
from devmon.instruments.gradient_statistics import GradientStatistics
from devmon.instruments.grammar_excess import GrammarExcess
from devmon.instruments.head_ablation import HeadAblation
from devmon.instruments.head_spectra import HeadSpectra
from devmon.instruments.in_context import InContextLearning
from devmon.instruments.induction import InductionHeads
from devmon.instruments.influence import BayesianInfluence
from devmon.instruments.interchange import Interchange
from devmon.instruments.intermediate_steps import IntermediateSteps
from devmon.instruments.intrinsic_dimension import IntrinsicDimension
from devmon.instruments.layers import LayerRoles
from devmon.instruments.linear_probe import LinearProbe
from devmon.instruments.llc import LLC
from devmon.instruments.logit_lens import LogitLens
from devmon.instruments.markov_references import MarkovReferences
from devmon.instruments.mdl_probe import MDLProbe
from devmon.instruments.model_code import ModelCode
from devmon.instruments.negation import Negation
from devmon.instruments.neural_collapse import NeuralCollapse
from devmon.instruments.ngram_stages import NgramStages
from devmon.instruments.paired_embeddings import PairedEmbeddings
from devmon.instruments.patching import ActivationPatching
from devmon.instruments.polysemanticity import Polysemanticity
from devmon.instruments.previous_token import PreviousTokenHeads
from devmon.instruments.probe_erasure import ProbeErasure
from devmon.instruments.probe_loss import ProbeLoss
from devmon.instruments.reference_drift import ReferenceDrift
from devmon.instruments.regression_references import RegressionReferences
from devmon.instruments.repeat_gain import RepeatGain
from devmon.instruments.representation_sketch import Sketch
from devmon.instruments.residual_attribution import ResidualAttribution
from devmon.instruments.restricted_llc import RestrictedLLC
from devmon.instruments.restricted_loss import RestrictedLoss
from devmon.instruments.site_activations import SiteActivations
from devmon.instruments.soft_entropy import SoftEntropy
from devmon.instruments.sparse_autoencoder import SparseAutoencoder
from devmon.instruments.steering import Steering
from devmon.instruments.structural_probe import StructuralProbe
from devmon.instruments.superposition import Superposition
from devmon.instruments.susceptibilities import Susceptibilities
from devmon.instruments.token_loss import TokenLoss
from devmon.instruments.transcoder import Transcoder
from devmon.instruments.tree_structure import TreeStructure
from devmon.instruments.tuned_lens import TunedLens
from devmon.instruments.weight_statistics import WeightStatistics

__all__ = [  # noqa: RUF022 (in groups)
    # behaviour
    "ProbeLoss",
    "TokenLoss",
    "InContextLearning",
    "RepeatGain",
    "FewShot",
    "Evaluation",
    "NgramStages",
    "Negation",
    # distance to solutions that are known exactly
    "MarkovReferences",
    "RegressionReferences",
    "GrammarExcess",
    "TreeStructure",
    "BracketClosing",
    # attention heads
    "PreviousTokenHeads",
    "AttentionSinks",
    "BoundaryAttention",
    "AttachmentHeads",
    "AttentionContacts",
    "AttentionDistance",
    "InductionHeads",
    "FuzzyInduction",
    "AbstractInduction",
    "HierarchicalInduction",
    "CopyingHeads",
    "Composition",
    "HeadSpectra",
    # what causes what
    "ResidualAttribution",
    "HeadAblation",
    "ActivationPatching",
    "Circuit",
    "Interchange",
    "FunctionVectorHeads",
    # layers and representations
    "LogitLens",
    "TunedLens",
    "LayerRoles",
    "IntermediateSteps",
    "LinearProbe",
    "FrozenProbe",
    "ProbeErasure",
    "MDLProbe",
    "StructuralProbe",
    "IntrinsicDimension",
    "Sketch",
    "SoftEntropy",
    "ReferenceDrift",
    "Superposition",
    "NeuralCollapse",
    "PairedEmbeddings",
    "Polysemanticity",
    # features and directions
    "Steering",
    "ConceptDirection",
    "FeatureCircuit",
    "Transcoder",
    "SparseAutoencoder",
    "DictionaryQuality",
    "FeatureLens",
    "SiteActivations",
    # weights and geometry
    "LLC",
    "RestrictedLLC",
    "Susceptibilities",
    "BayesianInfluence",
    "Curvature",
    "GradientStatistics",
    "WeightStatistics",
    "ModelCode",
    # addition modulo p
    "RestrictedLoss",
    "FourierSpectrum",
]
