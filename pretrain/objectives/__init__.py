"""Objectives: modules whose forward returns the summed loss. One file and one line in each of the two tables."""

if __name__ != "millrace.pretrain.objectives":
    raise ImportError(f"import millrace.pretrain.objectives, not {__name__}: a bare import would load a second copy")

# kind -> the objective's section of the configuration (no torch in its module), and the module itself
CONFIGS = {
    "causal_lm": "millrace.pretrain.objectives.config:CausalLMConfig",
    "codec": "millrace.pretrain.objectives.config:CodecConfig",
    "contrastive": "millrace.pretrain.objectives.config:ContrastiveConfig",
    "gan": "millrace.pretrain.objectives.config:GanConfig",
    "masked_lm": "millrace.pretrain.objectives.config:MaskedLMConfig",
    "span_corruption": "millrace.pretrain.objectives.config:SpanCorruptionConfig",
}
REGISTRY = {
    "causal_lm": "millrace.pretrain.objectives.causal_lm:CausalLM",
    "codec": "millrace.pretrain.objectives.codec:CodecObjective",
    "contrastive": "millrace.pretrain.objectives.contrastive:Contrastive",
    "gan": "millrace.pretrain.objectives.gan:Gan",
    "masked_lm": "millrace.pretrain.objectives.masked_lm:MaskedLM",
    "span_corruption": "millrace.pretrain.objectives.span_corruption:SpanCorruption",
}
