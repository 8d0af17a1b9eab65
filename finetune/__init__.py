"""The same loop with other objectives: instruction tuning, LoRA, classification."""

if __name__ != "millrace.finetune":
    raise ImportError(
        f"import millrace.finetune, not {__name__}: a bare import would load a second copy with a second registry"
    )
