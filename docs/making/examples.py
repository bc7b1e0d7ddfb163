"""The line that makes each instrument for the figures of its page, by the study whose names it uses (`studies.py`)."""

from __future__ import annotations

EXAMPLES = {
    "language": {
        # behaviour
        "ProbeLoss": "ProbeLoss(tokens)",
        "InContextLearning": "InContextLearning(tokens, 2, 20)",
        "RepeatGain": "RepeatGain(vocab, 16, 24)",
        "FewShot": "FewShot(vocab, shots=(1, 2, 4), prompts=32)",
        "TokenLoss": "TokenLoss(tokens)",
        "IntermediateSteps": "IntermediateSteps(chained, law.law.argmax(-1)[chained[:, -1]], chained[:, -2])",
        "Evaluation": "Evaluation(choices, item, start, stop, right)",
        "NgramStages": "NgramStages(corpus, tokens, vocab, (1, 2))",
        "GrammarExcess": "GrammarExcess(chained, law)",
        # attention heads
        "PreviousTokenHeads": "PreviousTokenHeads(tokens=tokens)",
        "AttentionSinks": "AttentionSinks(tokens)",
        "AttentionDistance": "AttentionDistance(tokens)",
        "AttentionContacts": "AttentionContacts(tokens[::2], repeats, fitted)",
        "InductionHeads": "InductionHeads(vocab, 16, 24)",
        "FuzzyInduction": "FuzzyInduction(matching ^ 1, 16, 18)",
        "AbstractInduction": "AbstractInduction(matching, 16, 18)",
        "HierarchicalInduction": "HierarchicalInduction((3, 4, 5), (6, 7, 8), 16, 18)",
        "CopyingHeads": "CopyingHeads(tokens=tokens)",
        "Composition": "Composition(draws=16)",
        "HeadSpectra": "HeadSpectra(sample=16, length=8)",
        # what causes what
        "ResidualAttribution": "ResidualAttribution.repeated(vocab, 16, 24, ablation_prompts=4)",
        "HeadAblation": "HeadAblation(vocab, 16, 24, heads=((0, 0), (1, 0), (1, 1)), groups=2)",
        "ActivationPatching": "ActivationPatching(pairs, exact=8)",
        "Circuit": "Circuit(pairs, steps=1, shares=(0.1, 0.3), random=1)",
        "FunctionVectorHeads": "FunctionVectorHeads(tasks, exact=8)",
        # the residual stream
        "LogitLens": "LogitLens(tokens)",
        "TunedLens": "TunedLens(tokens, steps=20)",
        "LayerRoles": "LayerRoles(tokens, permutations=9)",
        # representations
        "LinearProbe": "LinearProbe(tokens, previous)",
        "MDLProbe": "MDLProbe(tokens, previous)",
        "FrozenProbe": "FrozenProbe(trained, tokens, previous)",
        "ProbeErasure": "ProbeErasure(tokens, previous)",
        "SoftEntropy": "SoftEntropy(tokens, per_label=8, vectors=32)",
        "IntrinsicDimension": "IntrinsicDimension(tokens)",
        "Sketch": "Sketch(tokens, dims=16, outputs=True)",
        "ReferenceDrift": "ReferenceDrift(trained, tokens)",
        "Superposition": "Superposition()",
        "Polysemanticity": "Polysemanticity(tokens, previous)",
        # features and directions
        "Steering": 'Steering(pairs, tokens, ("resid_post", 1), directions, strengths=(1.0, 2.0), random=4)',
        "ConceptDirection": "ConceptDirection(chained[:12], tokens[:24:2], shuffles=4)",
        "FeatureCircuit": 'FeatureCircuit(pairs, {("resid_post", 1): dictionary}, steps=1, counts=(2, 8), random=1)',
        "Transcoder": "Transcoder({0: uncentred, 1: uncentred}, tokens[:8], tokens[:2], most=4)",
        "SparseAutoencoder": 'SparseAutoencoder(corpus, tokens, ("resid_post", 1), training, batch=256)',
        "DictionaryQuality": 'DictionaryQuality(tokens, dictionary, ("attn_out", 0))',
        "FeatureLens": 'FeatureLens(dictionary, ("resid_post", 1))',
        "Interchange": 'Interchange(exchanged, (("resid_post", 0),), (2, 8), steps=30, batch=16, random=2)',
        "SiteActivations": 'SiteActivations(tokens, ("resid_post", 1))',
        # sampling and curvature
        "LLC": "LLC(corpus, **settings)",
        "RestrictedLLC": 'RestrictedLLC(corpus, components={"first block": "transformer.h.0.*"}, **settings)',
        "Susceptibilities": 'Susceptibilities(corpus, {"texts": tokens[:4]}, parts, scored=8, nulls=4, **settings)',
        "BayesianInfluence": 'BayesianInfluence(corpus, {"a repeat": tokens[:1]}, examples=16, **settings)',
        "Curvature": "Curvature(corpus[:8], top=2, probes=4)",
        "GradientStatistics": "GradientStatistics(corpus)",
        # weights
        "ModelCode": "ModelCode(corpus, tolerance=(0.05, 0.2))",
        "WeightStatistics": "WeightStatistics()",
    },
    "grammar": {
        "BracketClosing": "BracketClosing(closing, brackets)",
        "BoundaryAttention": "BoundaryAttention(tokens, ends)",
        "AttachmentHeads": "AttachmentHeads(tokens, head, relation, sentence, fewest=20)",
        "StructuralProbe": "StructuralProbe(tokens, head, sentence, rank=8, steps=60)",
        "TreeStructure": "TreeStructure(tokens[:16], lengths[:16], ends[:, :16])",
    },
    "pairs": {"PairedEmbeddings": "PairedEmbeddings(first, second, encode)"},
    "negation": {"Negation": "Negation(prompts)"},
    "markov": {"MarkovReferences": "MarkovReferences(tokens, 3)"},
    "regression": {"RegressionReferences": "RegressionReferences(inputs, x, y, noise)"},
    "classes": {"NeuralCollapse": "NeuralCollapse(inputs, labels)"},
    "sums": {
        "RestrictedLoss": "RestrictedLoss(train)",
        "FourierSpectrum": 'FourierSpectrum(p, ("embed.weight", "unembed.weight"))',
    },
}

# Measured at every second checkpoint, for what they cost.
SELDOM = {
    *("ActivationPatching", "Circuit", "LayerRoles", "MDLProbe", "Steering", "SparseAutoencoder", "LLC"),
    *("Interchange", "ProbeErasure", "StructuralProbe", "TreeStructure", "RestrictedLLC", "Susceptibilities"),
    *("BayesianInfluence", "Curvature"),
}
