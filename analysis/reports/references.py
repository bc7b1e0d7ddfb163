"""Whom a report cites, for each class of instrument and for the detection of events."""

from __future__ import annotations

from collections.abc import Iterable

_LLC = "Lau et al. (2023), The local learning coefficient: a singularity-aware complexity measure. arXiv:2308.12108"
_OLSSON = "Olsson et al. (2022), In-context learning and induction heads. arXiv:2209.11895"
_HOOGLAND = "Hoogland et al. (2024), The developmental landscape of in-context learning. arXiv:2402.02364"
_ELHAGE = "Elhage et al. (2021), A mathematical framework for transformer circuits. Transformer Circuits Thread"
_WANG = (
    "Wang et al. (2022), Interpretability in the wild: indirect object identification in GPT-2 small. arXiv:2211.00593"
)
_TOY = "Elhage et al. (2022), Toy models of superposition. arXiv:2209.10652"
_HEWITT = "Hewitt & Liang (2019), Designing and interpreting probes with control tasks. arXiv:1909.03368"
_NANDA = "Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability. arXiv:2301.05217"
_CKA = "Kornblith et al. (2019), Similarity of neural network representations revisited. arXiv:1905.00414"
_SAE = (
    "Bricken et al. (2023), Towards monosemanticity: decomposing language models with dictionary learning. "
    "Transformer Circuits Thread"
)
_GAO = "Gao et al. (2024), Scaling and evaluating sparse autoencoders. arXiv:2406.04093"
CITED = {
    "SparseAutoencoder": (_SAE, _GAO),
    "DictionaryQuality": (_SAE, _GAO),
    "FeatureLens": ("nostalgebraist (2020), Interpreting GPT: the logit lens. LessWrong", _SAE),
    "SiteActivations": (_SAE,),
    "Evaluation": ("Gao et al. (2023), A framework for few-shot language model evaluation. Zenodo",),
    "GradientStatistics": ("McCandlish et al. (2018), An empirical model of large-batch training. arXiv:1812.06162",),
    "ReferenceDrift": (_CKA,),
    "LLC": (
        _LLC,
        "Watanabe (2009), Algebraic geometry and statistical learning theory. Cambridge University Press",
        _HOOGLAND,
        "Vehtari et al. (2021), Rank-normalization, folding, and localization: an improved R̂. Bayesian Analysis 16(2)",
    ),
    "RestrictedLLC": (
        _LLC,
        "Wang et al. (2024), Differentiation and specialization of attention heads via the refined local learning "
        "coefficient. arXiv:2410.02984",
    ),
    "InductionHeads": (_OLSSON,),
    "PreviousTokenHeads": (_OLSSON,),
    "RepeatGain": (_OLSSON,),
    "ProbeLoss": (_OLSSON,),
    "TokenLoss": ("Chang & Bergen (2022), Word acquisition in neural language models. arXiv:2110.02406",),
    "InContextLearning": (_OLSSON,),
    "FewShot": ("Brown et al. (2020), Language models are few-shot learners. arXiv:2005.14165",),
    "NgramStages": (_HOOGLAND,),
    "MarkovReferences": (
        "Edelman et al. (2024), The evolution of statistical induction heads: in-context learning Markov chains. "
        "arXiv:2402.11004",
        "Park et al. (2024), Competition dynamics shape algorithmic phases of in-context learning. arXiv:2412.01003",
    ),
    "AttentionSinks": (
        "Xiao et al. (2023), Efficient streaming language models with attention sinks. arXiv:2309.17453",
        "Sun et al. (2024), Massive activations in large language models. arXiv:2402.17762",
    ),
    "AttentionContacts": (
        "Rao et al. (2020), Transformer protein language models are unsupervised structure learners. bioRxiv "
        "2020.12.15.422761",
    ),
    "AttentionDistance": (
        "Dosovitskiy et al. (2020), An image is worth 16x16 words: transformers for image recognition at scale. "
        "arXiv:2010.11929",
    ),
    "PairedEmbeddings": (
        "Liang et al. (2022), Mind the gap: understanding the modality gap in multi-modal contrastive representation "
        "learning. arXiv:2203.02053",
        "Wang & Isola (2020), Understanding contrastive representation learning through alignment and uniformity on "
        "the hypersphere. arXiv:2005.10242",
    ),
    "Negation": ("Zhou, Zhou, Jia & May (2026), How language models process negation. arXiv:2605.03052",),
    "NeuralCollapse": (
        "Papyan, Han & Donoho (2020), Prevalence of neural collapse during the terminal phase of deep learning "
        "training. PNAS 117(40)",
    ),
    "GrammarExcess": (
        "Allen-Zhu & Li (2023), Physics of language models: part 1, learning hierarchical language structures. "
        "arXiv:2305.13673",
    ),
    "StructuralProbe": (
        "Hewitt & Manning (2019), A structural probe for finding syntax in word representations. NAACL",
    ),
    "TreeStructure": (
        "Murty et al. (2023), Characterizing intrinsic compositionality in transformers with tree projections. "
        "arXiv:2211.01288",
    ),
    "BracketClosing": (
        "Hewitt et al. (2020), RNNs can generate bounded hierarchical languages with optimal memory. arXiv:2010.07515",
    ),
    "BoundaryAttention": (
        "Allen-Zhu & Li (2023), Physics of language models: part 1, learning hierarchical language structures. "
        "arXiv:2305.13673",
    ),
    "AttachmentHeads": (
        "Chen et al. (2023), Sudden drops in the loss: syntax acquisition, phase transitions, and simplicity bias in "
        "MLMs. arXiv:2309.07311",
    ),
    "RegressionReferences": (
        "Raventós et al. (2023), Pretraining task diversity and the emergence of non-Bayesian in-context learning for "
        "regression. arXiv:2306.15063",
    ),
    "FuzzyInduction": (_OLSSON,),
    "AbstractInduction": (_OLSSON,),
    "HierarchicalInduction": (_OLSSON,),
    "CopyingHeads": (_OLSSON,),
    "Composition": (_ELHAGE,),
    "HeadSpectra": (_ELHAGE,),
    "ResidualAttribution": (_ELHAGE, _WANG),
    "HeadAblation": (_WANG,),
    "ActivationPatching": (
        _WANG,
        "Zhang & Nanda (2023), Towards best practices of activation patching in language models. arXiv:2309.16042",
        "Heimersheim & Nanda (2024), How to use and interpret activation patching. arXiv:2404.15255",
    ),
    "Circuit": (
        "Hanna et al. (2024), Have faith in faithfulness: going beyond circuit overlap. arXiv:2403.17806",
        "Tigges et al. (2024), LLM circuit analyses are consistent across training and scale. arXiv:2407.10827",
    ),
    "Interchange": (
        "Geiger et al. (2023), Finding alignments between interpretable causal variables and distributed neural "
        "representations. arXiv:2303.02536",
        "Makelov et al. (2023), Is this the subspace you are looking for? An interpretability illusion for subspace "
        "activation patching. arXiv:2311.17030",
    ),
    "FunctionVectorHeads": ("Todd et al. (2023), Function vectors in large language models. arXiv:2310.15213",),
    "LogitLens": ("nostalgebraist (2020), Interpreting GPT: the logit lens. LessWrong",),
    "TunedLens": ("Belrose et al. (2023), Eliciting latent predictions with the tuned lens. arXiv:2303.08112",),
    "LayerRoles": (_CKA,),
    "IntermediateSteps": ("nostalgebraist (2020), Interpreting GPT: the logit lens. LessWrong",),
    "SoftEntropy": (
        "Conklin et al. (2026), Learning is forgetting: LLM training as lossy compression. arXiv:2604.07569",
    ),
    "ModelCode": ("DeMoss et al. (2024), The complexity dynamics of grokking. arXiv:2412.09810",),
    "LinearProbe": (_HEWITT,),
    "FrozenProbe": (_HEWITT,),
    "ProbeErasure": ("Belrose et al. (2023), LEACE: perfect linear concept erasure in closed form. arXiv:2306.03819",),
    "MDLProbe": (
        _HEWITT,
        "Voita & Titov (2020), Information-theoretic probing with minimum description length. arXiv:2003.12298",
    ),
    "IntrinsicDimension": (
        "Facco et al. (2017), Estimating the intrinsic dimension of datasets by a minimal neighborhood information. "
        "Scientific Reports 7",
    ),
    "Sketch": (_CKA, _HOOGLAND),
    "Superposition": (_TOY,),
    "Polysemanticity": (_TOY,),
    "Steering": (
        "Turner et al. (2023), Steering language models with activation engineering. arXiv:2308.10248",
        "Heimersheim & Nanda (2024), How to use and interpret activation patching. arXiv:2404.15255",
    ),
    "ConceptDirection": (
        "Zou et al. (2023), Representation engineering: a top-down approach to AI transparency. arXiv:2310.01405",
    ),
    "FeatureCircuit": (
        "Marks et al. (2024), Sparse feature circuits: discovering and editing interpretable causal graphs in language "
        "models. arXiv:2403.19647",
    ),
    "Transcoder": (
        "Dunefsky et al. (2024), Transcoders find interpretable LLM feature circuits. arXiv:2406.11944",
        "Ameisen et al. (2025), Circuit tracing: revealing computational graphs in language models. Transformer "
        "Circuits Thread",
    ),
    "Susceptibilities": (
        "Baker et al. (2025), Structural inference: interpreting small language models with susceptibilities. "
        "arXiv:2504.18274",
        "Wang et al. (2025), Embryology of a language model. arXiv:2508.00331",
    ),
    "BayesianInfluence": (
        "Kreer et al. (2025), Bayesian influence functions for Hessian-free data attribution. arXiv:2509.26544",
    ),
    "Curvature": (
        "Ghorbani et al. (2019), An investigation into neural net optimization via Hessian eigenvalue density. "
        "arXiv:1901.10159",
        "Meyer et al. (2021), Hutch++: optimal stochastic trace estimation. arXiv:2010.09649",
    ),
    "WeightStatistics": ("Hu et al. (2023), Latent state models of training dynamics. arXiv:2308.09543",),
    "RestrictedLoss": (_NANDA,),
    "FourierSpectrum": (
        _NANDA,
        "Hurley & Rickard (2009), Comparing measures of sparsity. IEEE Transactions on Information Theory 55(10)",
    ),
}
_DETECTION = (
    "Benjamini & Hochberg (1995), Controlling the false discovery rate. J. R. Stat. Soc. B 57(1)",
    "Besag & Clifford (1991), Sequential Monte Carlo p-values. Biometrika 78(2)",
)


def references(instruments: Iterable[str]) -> list[str]:
    """Whom to cite for these instrument classes and for the detection of events."""
    cited = {reference for name in instruments for reference in CITED.get(name.rpartition(".")[2], ())}
    return sorted(cited | set(_DETECTION))
