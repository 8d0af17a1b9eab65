"""Objectives: modules whose forward returns the summed loss. One file and one line in each of the two tables."""

if __name__ != "millrace.pretrain.objectives":
    raise ImportError(f"import millrace.pretrain.objectives, not {__name__}: a bare import would load a second copy")

# kind -> the objective's section of the configuration (no torch in its module), and the module itself
CONFIGS = {
    "any_to_any": "millrace.pretrain.objectives.config:AnyToAnyConfig",
    "causal_lm": "millrace.pretrain.objectives.config:CausalLMConfig",
    "codec": "millrace.pretrain.objectives.config:CodecConfig",
    "consistency": "millrace.pretrain.objectives.config:ConsistencyConfig",
    "contrastive": "millrace.pretrain.objectives.config:ContrastiveConfig",
    "distillation": "millrace.pretrain.objectives.config:DistillationConfig",
    "gan": "millrace.pretrain.objectives.config:GanConfig",
    "masked_image": "millrace.pretrain.objectives.config:MaskedImageConfig",
    "masked_lm": "millrace.pretrain.objectives.config:MaskedLMConfig",
    "self_distillation": "millrace.pretrain.objectives.config:SelfDistillationConfig",
    "span_corruption": "millrace.pretrain.objectives.config:SpanCorruptionConfig",
    "vision_language": "millrace.pretrain.objectives.config:VisionLanguageConfig",
}
REGISTRY = {
    "any_to_any": "millrace.pretrain.objectives.any_to_any:AnyToAny",
    "causal_lm": "millrace.pretrain.objectives.causal_lm:CausalLM",
    "codec": "millrace.pretrain.objectives.codec:CodecObjective",
    "consistency": "millrace.pretrain.objectives.consistency:Consistency",
    "contrastive": "millrace.pretrain.objectives.contrastive:Contrastive",
    "distillation": "millrace.pretrain.objectives.distillation:Distillation",
    "gan": "millrace.pretrain.objectives.gan:Gan",
    "masked_image": "millrace.pretrain.objectives.masked_image:MaskedImage",
    "masked_lm": "millrace.pretrain.objectives.masked_lm:MaskedLM",
    "self_distillation": "millrace.pretrain.objectives.self_distillation:SelfDistillation",
    "span_corruption": "millrace.pretrain.objectives.span_corruption:SpanCorruption",
    "vision_language": "millrace.pretrain.objectives.vision_language:VisionLanguage",
}
