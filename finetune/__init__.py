"""The same loop with other objectives: instruction tuning, LoRA, classification."""

if __name__ != "millrace.finetune":
    raise ImportError(
        f"import millrace.finetune, not {__name__}: a bare import would load a second copy with a second registry"
    )

# kind -> the objective's section of the configuration (no torch in its module), and its task (see finetune/task.py)
CONFIGS = {
    "instruct": "millrace.finetune.sections:InstructConfig",
    "classify": "millrace.finetune.sections:ClassifyConfig",
}
REGISTRY = {
    "instruct": "millrace.finetune.instruct:Instruct",
    "classify": "millrace.finetune.classify:Classify",
}
